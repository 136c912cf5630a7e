"""One answer as a terminal shows it: solid text, corrections that flash, drafts dim behind it. Pure.

Text scrolls away line by line: what is solid, and no longer flashes, is handed out once, to be printed for
good; the rest is drawn again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.text import Text as RichText

FLASH_S = 0.8
"""How long a correction stays highlighted."""
DRAFT_STYLE = "dim"
FLASH_STYLE = "bold reverse"


@dataclass(frozen=True, slots=True)
class _Flash:
    start: int
    end: int
    until: float


class AnswerDisplay:
    """Offsets count characters of the solid text not handed out yet; times are by a caller's clock, s."""

    def __init__(self) -> None:
        self.solid = ""
        self.draft = ""
        """Provisional text, after the solid one."""
        self._flashes: list[_Flash] = []

    def commit(self, text: str, now: float, *, correction: bool = False) -> None:
        """Append text that stands. A draft that said so turns solid; another one is gone."""
        text = printable(text)
        self.draft = self.draft[len(text) :] if self.draft.startswith(text) else ""
        if correction and text.strip():
            start = len(self.solid) + len(text) - len(text.lstrip())
            self._flashes.append(_Flash(start, len(self.solid) + len(text.rstrip()), now + FLASH_S))
        self.solid += text

    def propose(self, text: str) -> None:
        """Replace the draft."""
        self.draft = printable(text)

    def is_flashing(self, now: float) -> bool:
        return any(flash.until > now for flash in self._flashes)

    def settle(self, width: int, now: float) -> list[RichText]:
        """Hand out the lines that will not change any more."""
        starts = line_starts(self.solid, width)
        held = min((self._word(flash)[0] for flash in self._flashes if flash.until > now), default=None)
        done = starts[-1] if held is None else max(start for start in starts if start <= held)
        lines = _lines(RichText(self.solid[:done]), [start for start in starts if start < done], width)
        self._drop(done)
        return lines

    def live(self, width: int, height: int, now: float) -> list[RichText]:
        """The lines that are still under way, at most the last `height` of them."""
        text = self.solid + self.draft
        styled = RichText(text)
        styled.stylize(DRAFT_STYLE, len(self.solid))
        for flash in self._flashes:
            if flash.until > now:
                styled.stylize(FLASH_STYLE, *self._word(flash))
        return _lines(styled, line_starts(text, width), width)[-height:]

    def finish(self, width: int) -> list[RichText]:
        """The end: all that is left, without what was never confirmed."""
        lines = _lines(RichText(self.solid), line_starts(self.solid, width), width)
        self.solid = self.draft = ""
        self._flashes = []
        return lines

    def _word(self, flash: _Flash) -> tuple[int, int]:
        """The whole words that a flash lies in: a token may be part of one."""
        start, end = flash.start, flash.end
        while start > 0 and not self.solid[start - 1].isspace():
            start -= 1
        while end < len(self.solid) and not self.solid[end].isspace():
            end += 1
        return start, end

    def _drop(self, num_characters: int) -> None:
        self.solid = self.solid[num_characters:]
        moved = (
            replace(flash, start=max(0, flash.start - num_characters), end=flash.end - num_characters)
            for flash in self._flashes
        )
        self._flashes = [flash for flash in moved if flash.end > 0]


def printable(text: str) -> str:
    """Text that cannot move the cursor or change the terminal: a model may write any byte."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\t":
        return "    "
    is_control = character < " " or "\x7f" <= character < "\xa0"
    return "\N{REPLACEMENT CHARACTER}" if is_control and character != "\n" else character


def line_starts(text: str, width: int) -> list[int]:
    """Offsets at which lines begin: after each newline, and before a word that does not fit any more.

    Args:
        width: cells of the terminal, >= 1; a word longer than that is cut.

    >>> line_starts("one two three", 8)
    [0, 8]
    """
    starts = [0]
    column = 0
    word = 0  # where the word began that is being written
    for i, character in enumerate(text):
        if character == "\n":
            starts.append(i + 1)
            column, word = 0, i + 1
        elif character == " ":  # spaces at the end of a line hang over it
            column += 1
            word = i + 1
        else:
            size = cell_len(character)
            while column + size > width and i > starts[-1]:
                starts.append(word if word > starts[-1] else i)
                column = cell_len(text[starts[-1] : i])
            column += size
    return starts


def _lines(text: RichText, starts: list[int], width: int) -> list[RichText]:
    """The lines that begin at `starts`, without newlines and without spaces that hang over."""
    lines = list(text.divide(starts[1:])) if starts else []
    return [line[: len(_fitting(line.plain.removesuffix("\n"), width))] for line in lines]


def _fitting(line: str, width: int) -> str:
    while line.endswith(" ") and cell_len(line) > width:
        line = line[:-1]
    return line
