"""Services to measure against, each in a process of its own, ended with the block that started it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def duet_cloud(*arguments: str) -> Iterator[tuple[str, int]]:
    """`duet-cloud serve` on a free port; yields its address and process id."""
    command = [str(Path(sys.executable).with_name("duet-cloud")), "serve", "--log-level", "warning"]
    with _service([*command, "--listen", "127.0.0.1:0", *arguments]) as started:
        yield started


@contextmanager
def duet_serve(*arguments: str) -> Iterator[str]:
    """`duet serve` on a free port; yields its URL."""
    command = [str(Path(sys.executable).with_name("duet")), "serve", "--port", "0"]
    with _service([*command, *arguments]) as (url, _):
        yield url


@contextmanager
def scripted_cloud() -> Iterator[tuple[str, int]]:
    """Our own service over a target that costs nothing: what is left is our overhead."""
    with _service([sys.executable, "-m", "benchmarks.services"]) as started:
        yield started


@contextmanager
def _service(command: list[str]) -> Iterator[tuple[str, int]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"{command[0]} did not start (exit code {process.wait()})")
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.wait()


def _serve_script() -> None:
    from cloud_service.server import serve
    from shared.config import CloudConfig
    from shared.logs import configure_logging
    from tests.scripted_target import ScriptedTarget

    config = CloudConfig(listen="127.0.0.1:0", log_level="warning", max_draft_tokens=64)
    configure_logging(config.log_format, config.log_level)
    target = ScriptedTarget(lambda text: 1 + len(text) % 250)
    asyncio.run(serve(config, lambda: target, on_ready=lambda a: print(f"listening on {a}", flush=True)))


if __name__ == "__main__":
    _serve_script()
