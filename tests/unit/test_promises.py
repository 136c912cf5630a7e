"""Each promise of docs/security.md and docs/reliability.md names a test or a command, which exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("security", "reliability")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_COMMAND = re.compile(r"`make ([\w-]+)`")


def promises(page: str) -> list[tuple[str, str]]:
    """What is promised, and what proves it: the rows of all tables that end in a column of tests."""
    found: list[tuple[str, str]] = []
    counts = False
    for line in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            counts = False
        elif cells[-1].startswith("test"):
            counts = True
        elif counts and not line.startswith("|---"):
            found.append((cells[0], cells[-1]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_names_what_proves_it(page):
    without = [
        what for what, proof in promises(page) if not _TEST.search(proof) and not _COMMAND.search(proof)
    ]
    assert without == []


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    missing = [
        f"{path}::{name}"
        for path, name in _TEST.findall(text)
        if not (ROOT / path).is_file()
        or not re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert missing == []
    assert set(_COMMAND.findall(text)) <= targets
    assert len(_TEST.findall(text)) == text.count(".py::"), "a test is named in full: `tests/FILE.py::NAME`"


def test_the_pages_promise_something():
    assert len(promises("security")) >= 30
    assert len(promises("reliability")) >= 12
