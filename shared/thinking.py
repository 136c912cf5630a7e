"""Tells the thinking of a reasoning model from its answer. Pure."""

from __future__ import annotations

from enum import Enum, auto

from shared.text import length_of_possible

_OPEN, _CLOSE = "<think>", "</think>"


class _Part(Enum):
    BEGINNING = auto()
    """Nothing but white space so far, or the beginning of a tag."""
    THINKING = auto()
    ANSWER = auto()


class ThinkingSplitter:
    """Splits a text that comes in pieces. A thought stands between `<think>` at the very beginning and
    `</think>`; the tags, and white space after the second one, belong to neither.

    >>> splitter = ThinkingSplitter()
    >>> [splitter.feed(piece) for piece in ("<thi", "nk>2+2", " is 4</think>\\n\\n", "Four.")]
    [[], [(True, '2+2')], [(True, ' is 4')], [(False, 'Four.')]]
    """

    def __init__(self, splits: bool = True) -> None:
        """
        Args:
            splits: otherwise all of the text is answer.
        """
        self._part = _Part.BEGINNING if splits else _Part.ANSWER
        self._held = ""
        self._trims = False

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Runs of (is it thinking?, text) that are certain now."""
        self._held += text
        runs: list[tuple[bool, str]] = []
        if self._part is _Part.BEGINNING:
            begun = self._held.lstrip()
            if begun.startswith(_OPEN):
                self._part, self._held = _Part.THINKING, begun[len(_OPEN) :]
            elif _OPEN.startswith(begun):  # nothing yet counts as well
                return []
            else:
                self._part = _Part.ANSWER
        if self._part is _Part.THINKING:
            thought, tag, rest = self._held.partition(_CLOSE)
            if tag:
                self._part, self._held, self._trims = _Part.ANSWER, rest, True
            else:
                keep = length_of_possible(_CLOSE, thought)
                thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            runs.append((True, thought))
        if self._part is _Part.ANSWER:
            answer, self._held = self._held.lstrip() if self._trims else self._held, ""
            self._trims = self._trims and not answer
            runs.append((False, answer))
        return [run for run in runs if run[1]]

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back."""
        held, self._held = self._held, ""
        return [(self._part is _Part.THINKING, held)] if held else []
