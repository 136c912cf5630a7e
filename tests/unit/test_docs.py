"""The documentation hangs together: links lead somewhere, and the reference is made from the commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.cli_page import PAGE, page
from docs.site_hooks import on_page_markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READ = [*sorted(ROOT.glob("*.md")), *PAGES]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
_FENCE = re.compile(r"^(`{3,}).*?^\1", flags=re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """As mkdocs and GitHub make them of headings."""
    titles = re.findall(r"^#+ +(.+)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def menu(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for below in entry.values():
                yield from menu(below if isinstance(below, list) else [below])


@pytest.mark.parametrize("path", READ, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(path):
    for link in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_every_page_is_in_the_menu_once():
    """A new page needs a line under `nav` in mkdocs.yml."""
    assert sorted(menu(SITE["nav"])) == [path.name for path in PAGES]


def test_the_site_asks_other_hosts_for_nothing():
    assert SITE["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "analytics"} & {*SITE, *SITE.get("extra", {})}
    for path in PAGES:
        assert "```mermaid" not in path.read_text(encoding="utf-8"), "its script would come from elsewhere"
        assert not re.search(r"!\[[^\]]*\]\(https?:", prose(path)), f"{path.name} shows a foreign image"


def test_links_out_of_the_site_become_their_text():
    assert on_page_markdown("see [`a.py`](../a.py), [b](b.md)") == "see `a.py`, [b](b.md)"


def test_the_reference_is_made_from_the_commands():
    """If this fails: python docs/cli_page.py"""
    assert PAGE.read_text(encoding="utf-8") == page()
