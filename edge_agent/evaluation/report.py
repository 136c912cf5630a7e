"""`duet eval report`: runs on disk -> one HTML page, its plots as files, and a summary in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from edge_agent.evaluation.page import Page, to_html, to_markdown
from shared.errors import InvalidRequest, InvalidSetting

PAGE, SUMMARY, PLOTS = "index.html", "summary.md", "plots"


@dataclass(frozen=True, slots=True)
class ReportFiles:
    page: Path
    summary: Path
    plots: tuple[Path, ...]


def write_report(run_dirs: Sequence[Path], out: Path) -> ReportFiles:
    """Write `index.html`, `summary.md` and `plots/`; runs of one experiment stand side by side.

    Raises:
        InvalidRequest: a folder holds no run, or `out` cannot be written.
        InvalidSetting: matplotlib is not installed.
    """
    try:
        from edge_agent.evaluation import plots, sections
    except ModuleNotFoundError as error:
        raise InvalidSetting(f"reports need {error.name}; run: pip install 'duet-llm[eval]'") from None
    now = datetime.now(timezone.utc)
    page = Page(
        title="duet evaluation",
        subtitle=f"Written on {now:%Y-%m-%d at %H:%M} UTC by duet {version('duet-llm')}.",
        sections=sections.sections(run_dirs),
    )
    svgs, files = {}, {}
    for picture in page.pictures:
        svg = plots.to_svg(picture.figure)
        svgs[picture.name] = plots.inline(svg, picture.name, f"{picture.title}. {picture.caption}")
        files[out / PLOTS / f"{picture.name}.svg"] = svg.encode()
        files[out / PLOTS / f"{picture.name}.png"] = plots.to_png(picture.figure)
    report = ReportFiles(out / PAGE, out / SUMMARY, tuple(files))
    files[report.page] = to_html(page, svgs, plots.COLOURS, plots.DARK).encode()
    files[report.summary] = to_markdown(page, PLOTS).encode()
    try:
        (out / PLOTS).mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            path.write_bytes(data)
    except OSError as error:
        raise InvalidRequest(
            f"the report cannot be written to {out}: {error}; choose another --out"
        ) from None
    return report
