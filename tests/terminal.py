"""A command at a pseudo-terminal, and what its screen shows: dim and highlighted text apart from the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pyte

from tests.service import clean_environment, command

COLUMNS, ROWS = 120, 40


class _Screen(pyte.HistoryScreen):
    """pyte knows no dim text: it stands as struck through here, which nothing of ours is."""

    def __init__(self, answer: Callable[[str], object]) -> None:
        """
        Args:
            answer: what the terminal says when it is asked, as for where the cursor is.
        """
        super().__init__(COLUMNS, ROWS, history=1000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def select_graphic_rendition(self, *attributes: int, **more: Any) -> None:
        is_colour = 38 in attributes or 48 in attributes
        super().select_graphic_rendition(*(9 if a == 2 and not is_colour else a for a in attributes), **more)


class Terminal:
    """One command at a terminal. Its output is read while somebody waits for something to show."""

    def __init__(self, child: pexpect.spawn) -> None:
        self.raw = b""
        """All bytes that the command wrote."""
        self._child = child
        self._screen = _Screen(child.send)
        self._stream = pyte.ByteStream(self._screen)

    def type(self, text: str) -> None:
        self._child.send(text)

    def enter(self, line: str) -> None:
        self._child.send(f"{line}\r")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._child.sendintr()

    @property
    def lines(self) -> list[str]:
        """What scrolled away, and what is on the screen."""
        gone = ["".join(line[x].data for x in range(COLUMNS)) for line in self._screen.history.top]
        return [line.rstrip() for line in (*gone, *self._screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def dim(self) -> str:
        return self._with("strikethrough")

    @property
    def flashing(self) -> str:
        """Bold and reversed: the status line is reversed only."""
        return self._with("bold", "reverse")

    async def shows(self, condition: Callable[[], object], *, within_s: float = 60.0) -> None:
        """Read on until the condition holds; fails where it does not in time."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, self.text
            self._read()
            await asyncio.sleep(0)

    async def ends(self, *, within_s: float = 20.0) -> int:
        """The exit code, once the command has ended."""
        deadline = time.monotonic() + within_s
        while self._child.isalive():
            assert time.monotonic() < deadline, self.text
            self._read()
            await asyncio.sleep(0.01)
        return int(self._child.exitstatus)

    def _read(self) -> None:
        try:
            read = self._child.read_nonblocking(4096, timeout=0.01)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += read
        self._stream.feed(read)

    def _with(self, *attributes: str) -> str:
        rows = (self._screen.buffer[y][x] for y in range(ROWS) for x in range(COLUMNS))
        return "".join(cell.data for cell in rows if all(getattr(cell, name) for name in attributes))


@contextmanager
def at_terminal(*arguments: str, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Run `duet` at a terminal, with `folder` as the working and the home folder; ended afterwards."""
    child = pexpect.spawn(
        command("duet"),
        list(arguments),
        cwd=str(folder),
        env={"TERM": "xterm-256color", **clean_environment(folder), **(env or {})},
        dimensions=(ROWS, COLUMNS),
        timeout=None,
    )
    child.delaybeforesend = None
    try:
        yield Terminal(child)
    finally:
        child.close(force=True)
