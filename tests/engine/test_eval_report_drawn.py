"""A report on runs of each kind with every plot drawn, which takes a while."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from xml.etree import ElementTree

from matplotlib.image import imread

from edge_agent.evaluation.report import write_report
from tests.eval_runs import length_rows, routing_rows, speculation_rows, write_run

NUM_PLOTS = 23
"""Of a labelled routing run, a run of lengths and one of speculation."""


def test_every_plot_is_drawn_in_two_forms_and_stands_on_the_page(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "routing", "routing", routing_rows(60)),
        write_run(tmp_path / "length", "length", length_rows(30)),
        write_run(tmp_path / "speculation", "speculation", speculation_rows()),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="edge_agent|matplotlib")
        files = write_report(runs, tmp_path / "out")
    drawn = {suffix: [path for path in files.plots if path.suffix == suffix] for suffix in (".svg", ".png")}
    assert {path.stem for path in drawn[".svg"]} == {path.stem for path in drawn[".png"]}
    assert len({path.read_bytes() for path in files.plots}) == 2 * NUM_PLOTS
    for path in drawn[".png"]:
        assert imread(io.BytesIO(path.read_bytes())).std() > 0.01, path.stem
    for path in drawn[".svg"]:
        assert ElementTree.fromstring(path.read_text("utf-8")).findall(".//{*}text"), path.stem
    assert files.page.read_text("utf-8").count("<svg") == NUM_PLOTS
