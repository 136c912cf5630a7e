"""How much memory is left to this process, so that new streams are refused before running ones are killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from shared.errors import CloudOverloaded

_LOOK_S = 0.25
"""A reading counts for so long: reading costs 0.1 ms, and streams can come in hundreds."""
_RETRY_S = 5.0
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(group: Path = _GROUP) -> int:
    """What is left on the machine, or in the container's control group (v2, else v1) where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            limit = (group / limit_file).read_text().strip()
            used = int((group / used_file).read_text())
            stat = (group / stat_file).read_text()
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Files in the page cache count as used, and are dropped before anybody is killed.
            cached = next(
                (int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0
            )
            free = min(free, int(limit) - used + cached)
        break
    return free


class MemoryGuard:
    """Refuses new streams while memory is short."""

    def __init__(self, min_free_bytes: int, read: Callable[[], int] = free_bytes) -> None:
        self._min_free_bytes = min_free_bytes
        self._read = read
        self._free = 0
        self._looked: float | None = None

    @property
    def free_bytes(self) -> int:
        """As of a moment ago."""
        now = time.monotonic()
        if self._looked is None or now - self._looked >= _LOOK_S:
            self._free, self._looked = self._read(), now
        return self._free

    def check(self) -> None:
        """Raises CloudOverloaded while less than the minimum is free."""
        if self.free_bytes < self._min_free_bytes:
            raise CloudOverloaded(
                f"the service is short of memory and takes no new streams; try again in {_RETRY_S:g} s",
                retry_after_s=_RETRY_S,
                limit="memory",
            )
