"""A report as a page: sections with tables and pictures, written as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell names the row."""
    note: str = ""
    """What kind of interval it shows, and the like."""
    look: str = "numbers"
    """`numbers`, or `about` for facts in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    name: str
    """Of its files and its anchor on the page."""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Several runs together, or one of them."""

    title: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    missing: Sequence[str] = ()
    """What cannot be shown, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """An experiment."""

    name: str
    title: str
    lead: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for part in section.parts for picture in part.pictures]


def to_html(page: Page, svgs: Mapping[str, str], light: Mapping[str, str], dark: Mapping[str, str]) -> str:
    """One file without any other.

    Args:
        svgs: name of each picture -> its inline SVG.
        light, dark: role of a colour -> colour, for screens of either kind.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("edge_agent.evaluation").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        page=page, svg={name: Markup(svg) for name, svg in svgs.items()}, light=light, dark=dark
    )


def to_markdown(page: Page, plots: str) -> str:
    """The same for pasting; its pictures lie as PNG in the folder `plots`."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    for section in page.sections:
        lines += [f"## {section.title}", "", section.lead, ""]
        for part in section.parts:
            if part.title:
                lines += [f"### {part.title}", ""]
            if part.missing:
                lines += ["Not shown:", "", *(f"- {line}" for line in part.missing), ""]
            for table in part.tables:
                lines += [f"**{table.title}**", "", *_markdown_table(table), ""]
                lines += [table.note, ""] if table.note else []
            for picture in part.pictures:
                lines += [f"![{picture.title}]({plots}/{picture.name}.png)", ""]
                lines += [f"{picture.title}. {picture.caption}", ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    return [line(table.columns), line(["---"] * len(table.columns)), *map(line, table.rows)]
