"""Where a chat is shown: a terminal that can be drawn on, or plain lines for a pipe and a dumb terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text as RichText

from edge_agent.chat.display import AnswerDisplay, printable
from shared.events import Event, Notice, Provisional, Text
from shared.session import Origin

_DRAWN_EVERY_S = 0.04
_STATUS_STYLE = "reverse"
_NOTICE_STYLE = "italic"


class AnswerView(Protocol):
    """One answer on its way."""

    def take(self, event: Event) -> None: ...


class View(Protocol):
    """Shows answers and what the chat itself has to say."""

    def say(self, lines: Sequence[str]) -> None:
        """Lines that are no answer."""

    def answering(self, status: Callable[[], str]) -> AbstractAsyncContextManager[AnswerView]:
        """Show one answer, and below it the status line, for as long as the context lasts."""


class PlainView:
    """Answers on standard output as they are committed, the rest on standard error."""

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            typer.echo(f"duet: {line}", err=True)

    @asynccontextmanager
    async def answering(self, status: Callable[[], str]) -> AsyncIterator[AnswerView]:
        try:
            yield _PlainAnswer(self)
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()


class _PlainAnswer:
    def __init__(self, view: PlainView) -> None:
        self._view = view
        # A terminal must not obey what a model writes; a pipe gets it as it is.
        self._clean = printable if sys.stdout.isatty() else str

    def take(self, event: Event) -> None:
        if isinstance(event, Text):
            sys.stdout.write(self._clean(event.text))
            sys.stdout.flush()
        elif isinstance(event, Notice):
            self._view.say([event.message])


class TerminalView:
    """Drafts dim at once, solid when they are confirmed; a status line below."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._console.print(RichText(printable(line), _NOTICE_STYLE))

    @asynccontextmanager
    async def answering(self, status: Callable[[], str]) -> AsyncIterator[AnswerView]:
        with (
            _no_echo(),
            Live(console=self._console, auto_refresh=False, transient=True, redirect_stderr=False) as live,
        ):
            answer = _DrawnAnswer(self._console, live, status)
            drawing = asyncio.create_task(answer.draw_on())
            try:
                yield answer
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)
                answer.finish()


class _DrawnAnswer:
    def __init__(self, console: Console, live: Live, status: Callable[[], str]) -> None:
        self._console = console
        self._live = live
        self._status = status
        self._display = AnswerDisplay()
        self._drawn_status = ""
        self._changed = True
        self._draw()

    def take(self, event: Event) -> None:
        self._changed = True
        if isinstance(event, Text):
            self._display.commit(event.text, time.monotonic(), correction=event.origin is Origin.CORRECTION)
        elif isinstance(event, Provisional):
            self._display.propose(event.text)
        elif isinstance(event, Notice):
            self._console.print(RichText(printable(event.message), _NOTICE_STYLE))

    async def draw_on(self) -> None:
        while True:
            await asyncio.sleep(_DRAWN_EVERY_S)
            if self._changed or self._status() != self._drawn_status:
                self._draw()

    def finish(self) -> None:
        self._live.update("", refresh=True)
        self._print(self._display.finish(self._width))

    @property
    def _width(self) -> int:
        return max(1, self._console.width)

    def _draw(self) -> None:
        now = time.monotonic()
        self._print(self._display.settle(self._width, now))
        # One row is the status line's, one stays free for the cursor.
        lines = self._display.live(self._width, max(1, self._console.height - 2), now)
        self._drawn_status = self._status()
        status = RichText(self._drawn_status, _STATUS_STYLE, no_wrap=True, overflow="ellipsis")
        self._live.update(Group(*lines, status), refresh=True)
        self._changed = self._display.is_flashing(now)  # which will end

    def _print(self, lines: Sequence[RichText]) -> None:
        for line in lines:
            self._console.print(line, soft_wrap=True)


def choose_view() -> PlainView | TerminalView:
    """The terminal, where there is one at both ends that can move its cursor."""
    console = Console(highlight=False)
    drawn = sys.stdin.isatty() and console.is_terminal and not console.is_dumb_terminal
    return TerminalView(console) if drawn else PlainView()


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile for the next line, and off the screen."""
    try:
        import termios
    except ImportError:  # Windows echoes a line only while it is read
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = list(before)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
