"""A run on disk: a manifest that says what it is, and rows that are appended, one question a line.

Whatever stops a run, every row that was written stays: on resume a torn last line is dropped, and what is
there is not asked again. A folder takes rows of one run only; its identity is in the manifest.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from shared.errors import InvalidRequest

MANIFEST = "manifest.json"
ROWS = "rows.jsonl"

Row = dict[str, Any]

_PACKAGES = ("duet-llm", "llama-cpp-python", "numpy", "grpcio")


class Run:
    """An open run folder. Holds its lock, so that two processes never append to one file."""

    def __init__(self, folder: Path, rows: TextIO, done: set[str], lock: FileLock) -> None:
        self.folder = folder
        self.done = done
        """Ids of the rows that are there."""
        self._rows = rows
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> Run:
        """Start a run, or go on with it.

        Args:
            identity: what makes two runs the same; compared with the manifest that is there.
            about: further facts for the manifest, as they were when the run began.
        Raises:
            InvalidRequest: the folder holds another run, or one that is being written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InvalidRequest(
                f"another process writes to {folder}; wait for it, or choose another --out"
            ) from None
        try:
            _check_or_write_manifest(folder, identity, about)
            done = _drop_torn_line(folder / ROWS)
            return cls(folder, (folder / ROWS).open("a", encoding="utf-8"), done, lock)
        except BaseException:
            lock.release()
            raise

    def append(self, row: Row) -> None:
        """Write a row; it is on its way to the disk when this returns, and outlives a kill of the process."""
        self._rows.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._rows.flush()
        self.done.add(row["id"])

    def close(self) -> None:
        self._rows.close()
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_run(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Manifest and rows of a run, in the order of their ids.

    Raises:
        InvalidRequest: there is no run, or a line of it cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{folder} holds no run: {error}; make one with `duet eval`") from None
    rows = list(_complete_rows(folder / ROWS))
    return manifest, sorted(rows, key=lambda row: str(row["id"]))


def about_this_machine() -> dict[str, Any]:
    """Versions and hardware, for a manifest; no names of the machine or its user."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "command": " ".join(["duet", *sys.argv[1:]]),
    }


def _check_or_write_manifest(folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        if (folder / ROWS).exists():
            raise InvalidRequest(f"{folder} holds rows without a manifest; choose another --out")
        text = json.dumps({"identity": identity, "about": about}, indent=2, ensure_ascii=False) + "\n"
        part = path.with_suffix(".part")  # so that a kill leaves no half of a manifest
        part.write_text(text, "utf-8")
        os.replace(part, path)
        return
    try:
        found = json.loads(path.read_text("utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise InvalidRequest(f"{path} cannot be read; choose another --out") from None
    if differences := list(_differences(found, json.loads(json.dumps(identity)))):
        raise InvalidRequest(
            f"{folder} holds another run: {'; '.join(differences)}."
            " Choose another --out, or repeat its settings"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} was {_short(found)} and is {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _drop_torn_line(path: Path) -> set[str]:
    """Cut off what a kill left of an unfinished line; returns the ids of the others."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole != len(raw):
        with path.open("r+b") as file:
            file.truncate(whole)
    return {str(row["id"]) for row in _complete_rows(path)}


def _complete_rows(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    raw = path.read_bytes()
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            row["id"]
        except (ValueError, KeyError, TypeError):
            raise InvalidRequest(f"{path}, line {number} is not a row of a run; remove that line") from None
        yield row


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
