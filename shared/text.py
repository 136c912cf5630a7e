"""From token bytes to text that may be shown: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Generic, TypeVar

Tag = TypeVar("Tag")


class TextStream(Generic[Tag]):
    """Decodes pieces as they come; every shown character carries the tag of the piece that completed it.

    A suffix that could still become a stop string is held back until it cannot.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """
        Args:
            stop: the text ends before the first of these to be complete; not empty ones.
        """
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._tags: list[Tag] = []
        self._last_tag: Tag | None = None

    def feed(self, piece: bytes, tag: Tag) -> list[tuple[str, Tag]]:
        """Add a token's bytes; returns runs of text that may be shown now. Ignored once stopped."""
        self._last_tag = tag
        return self._take(self._decoder.decode(piece), tag)

    def finish(self) -> list[tuple[str, Tag]]:
        """The end: what was held back, and a replacement character for an unfinished one."""
        if self._last_tag is None:
            return []
        shown = self._take(self._decoder.decode(b"", final=True), self._last_tag)
        return shown if self.stopped else shown + self._show(len(self._held))

    def preview(self, pieces: Sequence[bytes]) -> str:
        """What would follow the text shown so far if these pieces came next and no more: whole characters,
        none past a stop string. Changes nothing."""
        if self.stopped:
            return ""
        state = self._decoder.getstate()
        text = self._held + self._decoder.decode(b"".join(pieces))
        self._decoder.setstate(state)
        return text[: self._first_stop(text)]

    def _take(self, text: str, tag: Tag) -> list[tuple[str, Tag]]:
        if self.stopped:
            return []
        self._held += text
        self._tags += [tag] * len(text)
        if (end := self._first_stop(self._held)) is not None:
            self.stopped = True
            return self._show(end)
        return self._show(len(self._held) - self._possible_stop())

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string to be complete begins: so the same text ends alike however it is split
        into tokens."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _show(self, length: int) -> list[tuple[str, Tag]]:
        runs: list[tuple[str, Tag]] = []
        for character, tag in zip(self._held[:length], self._tags[:length], strict=True):
            if runs and runs[-1][1] == tag:
                runs[-1] = (runs[-1][0] + character, tag)
            else:
                runs.append((character, tag))
        self._held = self._held[length:]
        del self._tags[:length]
        return runs


def length_of_possible(tag: str, text: str) -> int:
    """Length of the longest end of the text that begins the tag, and is not all of it."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
