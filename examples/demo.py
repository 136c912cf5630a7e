"""One question in three modes: the edge alone, the cloud alone, and both together. Run by `make demo`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_agent.opening import open_agent
from edge_agent.show import OriginWriter
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET, EdgeConfig
from shared.errors import DuetError, outcome
from shared.events import Answer, Text
from shared.models import ModelCache, Registry, default_cache_dir, resolve
from shared.terminal import pull_progress

QUESTION = (
    "Write a Python function that returns the n-th Fibonacci number without recursion, and call it once."
)
MODES = ("local", "cloud", "speculate")
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    try:
        announce_downloads()
        with pull_progress() as progress:
            for name in (DEFAULT_DRAFT, DEFAULT_TARGET):
                resolve(name, Registry.load(), progress=progress)
        with running_cloud() as address:
            answers = [asyncio.run(ask(mode, address)) for mode in MODES]
    except DuetError as error:
        console.print(f"demo: {error}")
        return outcome(error).exit_code
    console.print(comparison(answers))
    return 0


def announce_downloads() -> None:
    cache = ModelCache(default_cache_dir())
    missing = [e for n in (DEFAULT_DRAFT, DEFAULT_TARGET) if not cache.has(e := Registry.load().entry(n))]
    if missing:
        names = " and ".join(entry.name for entry in missing)
        total = sum(entry.size_bytes for entry in missing) / 1e9
        console.print(f"Downloading {names}, {total:.1f} GB, to {cache.folder} (once).")


@contextmanager
def running_cloud() -> Iterator[str]:
    """`duet-cloud serve` on a free loopback port; stopped afterwards."""
    command = [str(Path(sys.executable).with_name("duet-cloud")), "serve"]
    console.print(f"\nStarting the cloud: duet-cloud serve, {DEFAULT_TARGET} on llama.cpp")
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--log-level", "warning"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            sys.exit(process.wait())  # it has said why
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


async def ask(mode: str, address: str) -> Answer:
    console.print(f'\n[bold]duet ask --mode {mode}[/bold] "{QUESTION}"')
    settings = EdgeConfig(mode=mode, cloud=address, max_tokens=160)
    writer = OriginWriter()
    async with open_agent(settings) as agent, aclosing(agent.ask(QUESTION)) as events:
        async for event in events:
            if isinstance(event, Text):
                writer.write(event)
            elif isinstance(event, Answer):
                writer.finish(event)
                return event
    raise AssertionError("an answer ends every request")


def comparison(answers: list[Answer]) -> Table:
    table = Table(title="The same question, three ways", title_justify="left")
    table.add_column("mode", no_wrap=True)
    for column in (
        "tokens",
        "first\ntoken",
        "per\ntoken",
        "target\npasses",
        "tokens\na pass",
        "drafts\nkept",
    ):
        table.add_column(column, justify="right")
    table.add_column("bytes\na token", justify="right")
    for answer in answers:
        drafted = answer.drafted_tokens
        table.add_row(
            answer.mode,
            str(answer.completion_tokens),
            figure(answer.ttft_ms, "{:.0f} ms"),
            figure(answer.tpot_ms, "{:.0f} ms"),
            str(answer.rounds or (answer.completion_tokens if answer.mode == "cloud" else 0)),
            figure(answer.acceptance_length, "{:.2f}"),
            figure(100 * answer.accepted_tokens / drafted if drafted else None, "{:.0f}%"),
            figure(answer.bytes_per_token, "{:.1f}"),
        )
    return table


def figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
