"""docs/benchmarks.md holds what the result files say, and nothing typed by hand."""

from __future__ import annotations

from benchmarks.harness import Summary, quantile, summarise
from benchmarks.report import PAGE, page


def test_the_page_is_generated_from_the_results():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_an_interval_of_many_runs_leaves_out_the_extremes():
    assert summarise([float(i) for i in range(1, 21)]) == Summary(10.5, 6.0, 15.0, 20)


def test_an_interval_of_few_runs_is_their_range():
    assert summarise([3.0, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0, 3)


def test_a_quantile_is_a_value_that_was_seen():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
