"""How much memory is left, on a machine and in a container, and what becomes of new streams then."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from cloud_service.pressure import MemoryGuard, free_bytes
from shared.errors import CloudOverloaded

MB = 2**20


def test_without_a_group_the_machine_says_what_is_left(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        pytest.param("104857600", 60 * MB, 0, 40 * MB, id="what the group may still take"),
        pytest.param(
            "104857600", 90 * MB, 50 * MB, 60 * MB, id="pages of files are dropped before anybody is killed"
        ),
    ],
)
def test_a_container_has_what_its_group_has(
    tmp_path: Path, limit: str, used: int, cached: int, free: int
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert free_bytes(tmp_path) == free


def test_a_group_without_a_limit_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    assert free_bytes(tmp_path) > 100 * MB


def test_new_streams_are_refused_while_memory_is_short() -> None:
    left = [99 * MB]
    guard = MemoryGuard(100 * MB, lambda: left[0])
    with pytest.raises(CloudOverloaded, match="short of memory") as caught:
        guard.check()
    assert caught.value.retry_after_s
    MemoryGuard(99 * MB, lambda: left[0]).check()


def test_memory_is_not_measured_for_every_stream() -> None:
    looks: list[int] = []

    def look() -> int:
        looks.append(1)
        return 10**9

    guard = MemoryGuard(1, look)
    for _ in range(100):
        guard.check()
    assert len(looks) < 5
