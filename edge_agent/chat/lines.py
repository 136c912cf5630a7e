"""What the user says: lines typed at a prompt, or lines of a pipe."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "


async def typed_lines(
    *, history: Path | None, status: Callable[[], str], completions: Callable[[str], Iterable[str]]
) -> AsyncIterator[str]:
    """Ask for line after line at the terminal, until Ctrl-D. Ctrl-C empties the line.

    Args:
        history: file of earlier lines; None keeps none.
        status: shown below the line.
        completions: of what stands there so far, as whole lines.
    """
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=_LineCompleter(completions),
        bottom_toolbar=status,
        refresh_interval=1.0,
        key_bindings=_keys(),
        prompt_continuation="  ",
    )
    while True:
        try:
            line = await session.prompt_async(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield _whole_characters(line.encode("utf-8", "surrogateescape"))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        """Alt-Enter begins a new line."""
        event.current_buffer.insert_text("\n")

    return keys


class _LineCompleter(Completer):
    def __init__(self, completions: Callable[[str], Iterable[str]]) -> None:
        self._completions = completions

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        written = document.text_before_cursor
        for line in self._completions(written):
            yield Completion(line, start_position=-len(written))


async def plain_lines(*, prompt: bool) -> AsyncIterator[str]:
    """Lines of standard input, until it ends: of a pipe, or of a terminal too simple for more.

    Args:
        prompt: ask for each line.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[bytes | None] = asyncio.Queue()

    def read() -> None:
        rest = b""
        # Not through sys.stdin: a read that waits would hold its lock while Python ends.
        while block := os.read(sys.stdin.fileno(), 1 << 16):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(arrived.put_nowait, line)
        for last in (rest, None) if rest else (None,):
            loop.call_soon_threadsafe(arrived.put_nowait, last)

    # Nothing can wake a thread that reads: it must not keep Python from ending.
    threading.Thread(target=read, name="duet-stdin", daemon=True).start()
    while True:
        if prompt:
            sys.stdout.write(PROMPT)
            sys.stdout.flush()
        line = await arrived.get()
        if line is None:
            return
        yield _whole_characters(line)


def _whole_characters(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")
