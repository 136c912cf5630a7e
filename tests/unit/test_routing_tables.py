"""The tables of docs/routing.md: each has a maker of its name, which takes the rows of `duet eval`."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.routing_tables import PAGE, TABLES, Pool, exact_apgr, replaced
from edge_agent.evaluation import metrics
from tests.eval_runs import routing_rows


def test_every_table_of_the_page_has_its_maker_and_the_other_way_round():
    page = PAGE.read_text("utf-8")
    assert re.findall(r"<!-- table (\S+) -->", page) == re.findall(r"<!-- end (\S+) -->", page)
    assert set(re.findall(r"<!-- table (\S+) -->", page)) == set(TABLES)
    for name in TABLES:
        assert f"(`{name}`)" in page, "a reader finds the name of the table above it"


def test_a_table_replaces_the_one_of_its_name_and_nothing_else():
    page = "a\n\n<!-- table x -->\n\nold\n\n<!-- end x -->\n\nb\n\n<!-- table y -->\n\nz\n\n<!-- end y -->\n"
    made = replaced(page, "x", "| \\1 |")
    assert made == page.replace("old", "| \\1 |")
    assert replaced(made, "x", "old") == page
    with pytest.raises(ValueError, match="0 times"):
        replaced(page, "none", "new")


def test_a_number_counts_as_it_stands_and_prompt_length_is_no_better_than_itself():
    pool = Pool(routing_rows(120), "own")
    name, hard, need, apgr, difference, *_ = pool.length()
    lengths = np.array([row["prompt_tokens"] for row in pool.rows], float)
    assert name.startswith("prompt length")
    assert hard == f"{metrics.auroc(lengths, ~pool.edge):.3f}"
    assert need == f"{metrics.auroc(lengths, ~pool.edge & pool.cloud):.3f}"
    assert apgr.startswith(f"{metrics.apgr(lengths, pool.edge, pool.cloud):.3f} [")
    assert difference == "0.000 [0.000, 0.000] unresolved"


def test_exact_fits_are_worth_what_answers_drawn_from_them_give():
    edge, cloud = np.array([0.0] * 30 + [1.0] * 30), np.ones(60)
    assert exact_apgr(edge, cloud, draws=3) == pytest.approx(metrics.apgr(cloud - edge, edge, cloud))
    assert exact_apgr(np.full(60, 0.2), np.full(60, 0.9), draws=300) == pytest.approx(0.5, abs=0.02)
