"""Services to measure against, each in a process of its own, ended with the block that started it."""

from __future__ import annotations

import json
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
def scripted_cloud(**settings: object) -> Iterator[tuple[str, int]]:
    """Our own service over a target that costs nothing: what is left is our overhead."""
    with _service([sys.executable, "-m", "tests.scripted_service", json.dumps(settings)]) as started:
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
