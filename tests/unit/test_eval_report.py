"""The report on evaluation runs: its plots, its page and its summary."""

from __future__ import annotations

import functools
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.linear_model import LinearRegression, LogisticRegression

from edge_agent.evaluation import crossfit, plots, sections
from edge_agent.evaluation.metrics import Bins
from edge_agent.evaluation.page import Page, Part, Picture, Section, Table, to_html, to_markdown
from edge_agent.evaluation.plots import Curve, Group, Setting
from edge_agent.evaluation.report import write_report
from shared.bootstrap import Estimate
from shared.errors import InvalidRequest, InvalidSetting
from tests.eval_runs import Row, length_rows, routing_rows, speculation_rows, write_run

EXTERNAL = re.compile(r"""(?:src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import|<script|<link|<iframe""")
X = np.linspace(0.0, 1.0, 11)
NAN = float("nan")

FIGURES = {
    "cost_quality": lambda: plots.cost_quality(
        [Curve("blend", X, 0.4 + 0.2 * X**0.5, "blend"), Curve("random", X, 0.4 + 0.2 * X, "random")],
        0.4,
        0.6,
    ),
    "cost_quality of two equal models": lambda: plots.cost_quality(
        [Curve("blend", X, np.full(11, 0.5), "blend")], 0.5, 0.5
    ),
    "gap_recovered": lambda: plots.gap_recovered([Curve("a run", X, X**0.5, "c0")]),
    "gap_recovered of runs with long names": lambda: plots.gap_recovered(
        [Curve(f"{i}: {'a model of a long name ' * 5}", X, X**0.5, "c0") for i in range(3)]
    ),
    "calibration": lambda: plots.calibration(
        Bins(np.array([0.0, 0.5, 1.0]), np.array([0.2, NAN]), np.array([0.3, NAN]), np.array([7, 0]))
    ),
    "score_histograms": lambda: plots.score_histograms(
        {"edge right": np.array([0.1, 0.2]), "both wrong": np.array([])}, 0.9
    ),
    "confusion": lambda: plots.confusion(np.array([[3, 1], [0, 2]])),
    "confusion of nothing": lambda: plots.confusion(np.zeros((2, 2), int)),
    "subjects": lambda: plots.subjects([Group("anatomy", 4, 0.5, 0.75, 0.25)]),
    "subjects of the edge alone": lambda: plots.subjects([Group("anatomy", 4, 0.5, NAN, NAN)]),
    "probe_dots": lambda: plots.probe_dots(
        {"AUROC": [[Estimate(0.6, 0.5, 0.7), None], [None, Estimate(0.55)]]}, ["who", "rating"], ["a", "b"]
    ),
    "probe_dots of long names": lambda: plots.probe_dots(
        {name: [[Estimate(0.6, 0.5, 0.7)] * 2] * 2 for name in ("AUROC (hard)", "AUROC (need)", "APGR")},
        ["value of words-first-line", "letters-few-shot.entropy"],
        ["mmlu: qwen2.5-coder-0.5b → qwen2.5-coder-1.5b, this run's pair", "b"],
    ),
    "lengths": lambda: plots.lengths(
        np.array([10.0, 300.0]), np.array([12.0, 512.0]), np.array([False, True])
    ),
    "pareto": lambda: plots.pareto(
        [Setting("lossless-8", "lossless", 0.4, 1.0), Setting("bild-8", "bild", 0.5, 0.9)],
        "agreement",
    ),
    "acceptance_by_category": lambda: plots.acceptance_by_category(
        {"a": {"coding": Estimate(2.0, 1.5, 2.5)}, "b": {"math": Estimate(3.0)}}, 9.0
    ),
    "acceptance_by_draft_length": lambda: plots.acceptance_by_draft_length(
        {"lossless": [(2, Estimate(1.8)), (4, Estimate(2.2, 2.0, 2.4))]}
    ),
}


@functools.cache
def figure_of(name: str) -> Figure:
    """One of FIGURES, drawn once; a warning fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return FIGURES[name]()


@functools.cache
def svg_of(name: str) -> str:
    return plots.to_svg(figure_of(name))


def texts(figure: Figure) -> list[str]:
    """Every piece of text of a figure, as its SVG has it."""
    root = ElementTree.fromstring(plots.to_svg(figure))
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_whole_and_within_its_borders(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = imread(io.BytesIO(plots.to_png(figure_of(name))))[:, :, :3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert np.ptp(border, axis=0).max() == 0, "something is cut at the edge"
    assert pixels.std() > 0.01


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_on_the_page_takes_every_colour_from_the_page(name):
    svg = plots.inline(svg_of(name), "here", "what it shows")
    assert "var(--ink)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}


def test_pictures_on_one_page_share_no_id():
    svg = svg_of("cost_quality")
    ids = [set(re.findall(r'\bid="([^"]*)"', plots.inline(svg, name, ""))) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]
    for name in ("a", "b"):
        picture = plots.inline(svg, name, "")
        used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', picture))
        assert {a or b for a, b in used} <= set(re.findall(r'\bid="([^"]*)"', picture))


def test_panels_of_scores_share_a_height_that_holds_the_tallest_bar():
    few, many = np.array([0.1]), np.full(50, 0.3)
    for scores in ({"edge right": few, "both wrong": many}, {"edge right": many, "both wrong": few}):
        for axes in plots.score_histograms(scores, 0.5).axes:
            assert axes.get_ylim()[0] == 0
            assert axes.get_ylim()[1] >= 50


def test_a_long_name_in_a_legend_keeps_its_end():
    shown = " ".join(texts(plots.gap_recovered([Curve(f"{'a long name ' * 7}(0.646)", X, X, "c0")])))
    assert "(0.646)" in shown


def test_every_colour_has_its_dark_twin():
    assert plots.COLOURS.keys() == plots.DARK.keys()


def test_levels_are_named_beside_the_axes_and_pushed_apart_where_they_would_touch():
    def heights(edge: float, cloud: float) -> list[float]:
        figure = plots.cost_quality([Curve("blend", X, np.linspace(edge, 0.9, 11), "blend")], edge, cloud)
        figure.draw_without_rendering()
        boxes = {t.get_text().split(" ")[0]: t.get_window_extent() for t in figure.axes[0].texts}
        return [boxes["edge"].y1, boxes["cloud"].y0]

    for levels in ((0.4, 0.6), (0.5, 0.501)):
        below, above = heights(*levels)
        assert below < above


def test_names_from_data_are_not_read_as_formulas():
    assert "cost in $x^2$ (3)" in texts(plots.subjects([Group("cost in $x^2$", 3, 0.5, 0.5, 0.5)]))


def test_fifty_seven_subjects_are_all_named_and_do_not_touch():
    figure = plots.subjects([Group(f"subject {i}", 10, 0.5, 0.6, 0.2) for i in range(57)])
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 57
    assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))


def test_only_settings_that_no_other_beats_are_named_on_the_front():
    points = {"a": (0.2, 0.8), "b": (0.3, 0.8), "c": (0.3, 0.9), "d": (0.5, 0.85), "e": (0.6, 1.0)}
    shown = texts(plots.pareto([Setting(name, "bild", *at) for name, at in points.items()], "agreement"))
    assert [name for name in points if name in shown] == ["a", "c", "e"]


def test_answers_that_were_cut_off_are_marked_apart_and_counted():
    labels = texts(figure_of("lengths"))
    assert "ended by itself (n = 1)" in labels
    assert "cut off at the limit: longer than shown (n = 1)" in labels


def one_page(**changes: object) -> Page:
    part = {
        "title": "a run",
        "tables": [
            Table(title="Figures", columns=["", "a|b"], rows=[["<b>APGR</b>", "0.6 | 0.7"]], note="95%")
        ],
        "pictures": [
            Picture(name="curve", title="A curve", caption="n = 3", figure=figure_of("gap_recovered"))
        ],
        "missing": ["the cloud's answers: none"],
        **changes,
    }
    section = Section(name="routing", title="Routing", lead="What it is.", parts=[Part(**part)])
    return Page(title="A report", subtitle="Of today.", sections=[section])


def html_of(page: Page) -> str:
    svgs = {p.name: plots.inline(plots.to_svg(p.figure), p.name, p.caption) for p in page.pictures}
    return to_html(page, svgs, plots.COLOURS, plots.DARK)


class Balance(HTMLParser):
    """Raises where an element is not closed in its turn."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> None:
    """Whole, self-contained, and readable without JavaScript, in the dark and on a phone."""
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert not EXTERNAL.search(html)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width' in html


def test_a_page_is_one_file_that_asks_for_nothing_else():
    check_page(html_of(one_page()))


@pytest.mark.parametrize("bad", ['<img src="https://x/y">', "a { background: url(https://x) }", "<script>"])
def test_the_check_on_pages_sees_what_is_loaded_from_elsewhere(bad):
    assert EXTERNAL.search(bad)


def test_a_page_without_tables_pictures_or_gaps_is_whole():
    check_page(html_of(one_page(tables=[], pictures=[], missing=[])))


def test_what_data_contain_is_text_on_the_page():
    html = html_of(one_page())
    assert "&lt;b&gt;APGR&lt;/b&gt;" in html
    assert "<b>APGR</b>" not in html


def test_the_summary_has_tables_that_markdown_reads_pictures_and_gaps():
    lines = to_markdown(one_page(), "plots").splitlines()
    assert "|  | a\\|b |" in lines
    assert "| --- | --- |" in lines
    assert "| &lt;b>APGR&lt;/b> | 0.6 \\| 0.7 |" in lines
    assert "![A curve](plots/curve.png)" in lines
    assert "- the cloud's answers: none" in lines


def change(**fields: object) -> Callable[[Row], Row]:
    return lambda row: {**row, **fields}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few bootstrap draws and the plainest fits: these tests look at the page, not at the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("summarise_routing", "summarise_length", "summarise_speculation"):
            patch.setattr(sections, name, functools.partial(getattr(sections, name), draws=20))
        for name, model in (("_classifier", LogisticRegression), ("_regressor", LinearRegression)):
            patch.setattr(crossfit, name, lambda *_, model=model: crossfit._scaled(model()))
        yield


def folders_of(tmp_path: Path, *runs: tuple[str, list[Row]]) -> list[Path]:
    return [
        write_run(tmp_path / f"run {number}", experiment, rows)
        for number, (experiment, rows) in enumerate(runs)
    ]


@contextmanager
def no_layout() -> Iterator[None]:
    """Pictures that nobody looks at need no place for their labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw_without_rendering", lambda figure: None)
        yield


def report(tmp_path: Path, *runs: tuple[str, list[Row]]) -> str:
    """Markdown of a report on runs, its page checked for wholeness; the pictures are left empty."""
    with no_layout():
        made = sections.sections(folders_of(tmp_path, *runs))
    page = Page(title="", subtitle="", sections=made)
    check_page(to_html(page, {p.name: "<svg></svg>" for p in page.pictures}, plots.COLOURS, plots.DARK))
    return to_markdown(page, "plots")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files, HTML and Markdown: two routing runs, one of them labelled, and one run of each other kind.

    One small picture stands for all; tests/engine/test_eval_report_drawn.py draws them.
    """
    folder = tmp_path_factory.mktemp("whole")
    runs = folders_of(
        folder,
        ("routing", routing_rows(80, change=change(labels={}))),
        ("speculation", speculation_rows()),
        ("length", length_rows()),
        ("routing", routing_rows(60, seed=1)),
    )
    svg, png = svg_of("calibration"), plots.to_png(figure_of("calibration"))
    with no_layout(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "to_svg", lambda figure: svg)
        patch.setattr(plots, "to_png", lambda figure: png)
        files = write_report(runs, folder / "out")
    return files, files.page.read_text("utf-8"), files.summary.read_text("utf-8")


@pytest.mark.parametrize(
    "title",
    [
        "Quality against cost",
        "Calibration of the blend",
        "Scores by outcome",
        "Route against need",
        "Subjects",
        "Every probe",
        "Predicted against actual: bins",
        "Predicted against actual: words-first-line",
        "Agreement against cost",
        "Acceptance length by category",
        "Acceptance length against draft length",
    ],
)
def test_every_plot_is_on_the_page_and_in_the_summary(whole, title):
    _, html, markdown = whole
    assert f"<b>{title}</b>" in html
    assert f"![{title}]" in markdown


@pytest.mark.parametrize(
    "fact",
    [
        "edge-0.5b (sha256 1d1d1d1d1d1d)",
        "cloud-1.5b",
        "mmlu.jsonl (sha256 343434343434)",
        "Some CPU, 2 cores, Linux x86_64",
        "python 3.11.7, duet-llm 0.1.0, numpy 2.4.6",
        "duet eval routing --data mmlu.jsonl",
        "2026-11-24T15:42:26+00:00",
    ],
)
def test_the_head_of_an_experiment_says_what_was_run_and_on_what(whole, fact):
    assert all(fact in text for text in whole[1:])


def test_a_package_that_was_not_there_has_no_version(whole):
    assert "llama-cpp-python" not in whole[1]


def test_a_report_is_a_page_a_summary_and_every_plot_in_two_forms(whole):
    files, html, markdown = whole
    check_page(html)
    plots_of = {suffix: {p.stem for p in files.plots if p.suffix == suffix} for suffix in (".png", ".svg")}
    assert plots_of[".png"] == plots_of[".svg"] == set(re.findall(r'<figure id="([^"]*)">', html))
    assert {f"plots/{name}.png" for name in plots_of[".png"]} == set(re.findall(r"\]\(([^)]*)\)", markdown))
    assert all(path.stat().st_size > 1000 for path in files.plots)
    assert html.count("<svg") == len(plots_of[".svg"])


def test_every_table_of_figures_says_what_its_intervals_are(whole):
    tables = re.findall(r"\*\*([^*]+)\*\*\n\n((?:\|.*\n)+)\n(.*)", whole[2])
    with_intervals = {title: note for title, body, note in tables if re.search(r"\d%? \[-?\d", body)}
    assert len(with_intervals) >= 5
    assert {title for title, note in with_intervals.items() if "95%" not in note} == set()


def test_runs_of_one_experiment_stand_side_by_side_and_others_apart(whole):
    _, html, markdown = whole
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == [
        "## Routing",
        "## Answer length",
        "## Speculation",
    ]
    assert "<b>The blends side by side</b>" in html
    assert "| questions | 80 | 60 | 60 |" in markdown


def test_two_runs_of_length_or_speculation_share_tables(tmp_path):
    rows = [row for row in speculation_rows(4) if row["policy"] == "lossless"]
    markdown = report(
        tmp_path,
        ("speculation", rows),
        ("speculation", rows[:4]),
        ("length", length_rows(4)),
        ("length", length_rows(5)),
    )
    assert re.search(r"^\| lossless-2 \| [\d.]+ \[.*\] \| [\d.]+ \[.*\] \|$", markdown, re.MULTILINE)
    assert re.search(r"^\| lossless-8 \| [\d.]+ \[.*\] \| – \|$", markdown, re.MULTILINE)
    assert re.search(r"^\| best constant \| [\d.]+ \[.*\] \| [\d.]+ \[.*\] \|$", markdown, re.MULTILINE)


def test_runs_of_the_same_data_and_models_are_told_apart_by_their_folders(tmp_path):
    markdown = report(tmp_path, ("routing", []), ("routing", []))
    assert "mmlu: edge-0.5b → cloud-1.5b (run 0)" in markdown
    assert "mmlu: edge-0.5b → cloud-1.5b (run 1)" in markdown


ROUTING_GAPS = {
    "no row": ([], "no question"),
    "three rows": (routing_rows(3), "too few"),
    "no cloud answer": (routing_rows(change=change(cloud=None, labels={})), "cloud"),
    "only labels": (routing_rows(change=change(edge=None, cloud=None)), None),
    "nothing but probes": (routing_rows(change=change(edge=None, cloud=None, labels={})), "no question"),
    "an edge that is always right": (
        routing_rows(change=lambda row: {**row, "edge": {**row["edge"], "correct": True}, "labels": {}}),
        "blend",
    ),
    "a cloud that is always wrong": (
        routing_rows(change=lambda row: {**row, "cloud": {**row["cloud"], "correct": False}, "labels": {}}),
        "blend",
    ),
    "no probe": (
        routing_rows(change=change(features={}, values={}, distributions={}, texts={}, labels={})),
        None,
    ),
    "open questions": (
        routing_rows(change=lambda row: {**row, "edge": {**row["edge"], "correct": None}, "labels": {}}),
        "no question",
    ),
}


@pytest.mark.parametrize(("rows", "said"), ROUTING_GAPS.values(), ids=ROUTING_GAPS)
def test_what_a_routing_run_lacks_is_named(tmp_path, rows, said):
    markdown = report(tmp_path, ("routing", rows))
    if said is not None:
        missing = markdown.partition("Not shown:")[2]
        assert said in missing


@pytest.mark.parametrize("experiment", ["length", "speculation"])
def test_a_run_without_rows_is_named_as_such(tmp_path, experiment):
    markdown = report(tmp_path, (experiment, []))
    assert "no answer yet" in markdown


def test_speculation_at_one_draft_length_says_that_it_shows_no_sweep(tmp_path):
    rows = [row for row in speculation_rows() if row["setting"] == "lossless-8"]
    markdown = report(tmp_path, ("speculation", rows))
    assert "every setting has the same draft length" in markdown


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no run"):
        write_report([tmp_path], tmp_path / "out")


def test_an_unknown_experiment_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", "cooking", [])
    with pytest.raises(InvalidRequest, match="'cooking', which has no report; there are routing"):
        write_report([folder], tmp_path / "out")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = write_run(tmp_path / "run", "routing", [])
    with pytest.raises(InvalidRequest, match=r"cannot be written to .*; choose another --out"):
        write_report([folder], tmp_path / "file" / "out")


def test_without_matplotlib_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("edge_agent.evaluation.")]:
        if name.endswith((".plots", ".sections")):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(sys.modules["edge_agent.evaluation"], name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidSetting, match=r"reports need matplotlib; run: pip install 'duet-llm\[eval\]'"):
        write_report([], tmp_path)
