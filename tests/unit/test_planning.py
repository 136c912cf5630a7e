"""The measured tables that `duet-cloud plan` reads, and its simulation of edges against one GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cloud_service.planning.simulation import Load, simulate
from cloud_service.planning.tables import ServerTable, load_tables
from shared.errors import InvalidSetting

ROOT = Path(__file__).parents[2]
# A pass over n rounds takes 8 + n ms; an edge alone waits 3 ms more.
TABLE = ServerTable(
    model="toy",
    gpu="toy",
    scheme="request",
    max_draft_tokens=8,
    source="made up for tests",
    edges=(1, 2, 10, 100),
    rounds_per_s=(1 / 0.012, 2 / 0.018, 10 / 0.026, 100 / 0.116),
    streams=(1, 100),
    plain_tokens_per_s=(100, 2000),
)


def table(**changes) -> ServerTable:
    return ServerTable.model_validate(TABLE.model_dump() | changes)


def load(**changes) -> Load:
    alone = Load(num_edges=1, cycle_s=0, answer_tokens=50, tokens_per_round=4, round_pause_s=0.09)
    return dataclasses.replace(alone, **changes)


@pytest.mark.parametrize("num_rounds", [1, 3, 5, 20, 50, 99])
def test_the_time_of_a_pass_is_found_from_edges_that_are_served_in_two_groups_by_turns(num_rounds):
    assert TABLE.pass_seconds(num_rounds) == pytest.approx(0.008 + num_rounds / 1000)


def test_what_an_edge_alone_waits_for_besides_is_overhead():
    assert TABLE.overhead_s == pytest.approx(0.003)


def test_without_two_edges_a_pass_over_one_round_is_as_short_as_any():
    few = table(edges=(1, 10), rounds_per_s=(1 / 0.02, 10 / 0.026))
    assert few.pass_seconds(1) == few.pass_seconds(5) == pytest.approx(0.013)
    assert few.overhead_s == pytest.approx(0.007)


def test_an_edge_that_was_measured_alone_is_all_pass():
    one = table(edges=(1,), rounds_per_s=(100,))
    assert (one.pass_seconds(1), one.overhead_s) == (pytest.approx(0.01), 0.0)


def test_beyond_what_was_measured_the_rate_stays():
    assert TABLE.pass_seconds(300) == pytest.approx(300 / 99 * TABLE.pass_seconds(99))
    assert TABLE.step_seconds(300) == pytest.approx(300 / 2000)


def test_an_edge_alone_takes_its_draft_the_round_trip_and_one_pass():
    alone = load(answer_tokens=4000, overhead_s=TABLE.overhead_s)
    seen = simulate(alone, TABLE.pass_seconds, max_batch=100, seconds=400)
    assert seen.tokens_per_s == pytest.approx(4 / (0.09 + 0.012), rel=0.02)
    assert seen.round_p50_s == pytest.approx(0.012)
    assert seen.busy == pytest.approx(0.009 / 0.102, abs=0.01)


@pytest.mark.parametrize("num_edges", [10, 100])
def test_edges_that_hardly_think_get_the_measured_rate(num_edges):
    crowd = load(num_edges=num_edges, round_pause_s=0.004, answer_tokens=1e6)
    seen = simulate(crowd, TABLE.pass_seconds, max_batch=100, seconds=10)
    assert seen.tokens_per_s == pytest.approx(4 * num_edges / (0.016 + num_edges / 1000), rel=0.05)
    assert seen.busy == pytest.approx(1.0, abs=0.01)


def test_users_who_pause_leave_the_gpu_idle():
    seen = simulate(load(num_edges=50, cycle_s=30), TABLE.pass_seconds, max_batch=100, seconds=600)
    assert seen.tokens_per_s == pytest.approx(50 * 50 / 30, rel=0.1)
    assert seen.busy < 0.2


def test_the_same_seed_gives_the_same_day():
    runs = [simulate(load(num_edges=9, cycle_s=2), TABLE.pass_seconds, max_batch=9, seconds=20) for _ in "ab"]
    assert runs[0] == runs[1]


def test_more_edges_are_slower_each_and_more_together():
    few, many = (
        simulate(load(num_edges=n, answer_tokens=100), TABLE.pass_seconds, max_batch=100, seconds=10)
        for n in (5, 200)
    )
    assert many.speed_p50 < few.speed_p50
    assert many.tokens_per_s > few.tokens_per_s


def test_short_answers_are_not_slow_for_a_last_round_that_is_not_full():
    seen = simulate(load(answer_tokens=5), TABLE.pass_seconds, max_batch=100, seconds=200)
    assert seen.speed_p50 == pytest.approx(4 / (0.09 + 0.009), rel=0.1)


@pytest.mark.parametrize(
    "impossible",
    [
        pytest.param({"num_edges": 0}, id="no edges"),
        pytest.param({"answer_tokens": 0.5}, id="answers of less than a token"),
        pytest.param({"tokens_per_round": 0.9}, id="rounds that commit nothing"),
    ],
)
def test_a_load_that_cannot_be_is_refused(impossible):
    with pytest.raises(ValueError, match="a load has"):
        simulate(load(**impossible), TABLE.pass_seconds, max_batch=1, seconds=1)


def test_of_two_schemes_the_faster_is_taken_unless_one_is_named():
    assert load_tables().find("7b", "h100", None).scheme == "resident"
    assert load_tables().find("7b", "h100", "request").scheme == "request"


def test_the_tables_that_come_with_the_package_are_what_the_benchmarks_say():
    for table in load_tables().rows:
        result = json.loads((ROOT / table.source.split(" ")[0]).read_text())
        shown = [[cell.replace(",", "") for cell in row] for row in result["rows"]]
        if table.scheme == "request":
            assert table.rounds_per_s == tuple(float(row[1]) for row in shown)
            assert table.plain_tokens_per_s == tuple(float(row[4]) for row in shown)
        else:
            rounds = {row[1]: float(row[5]) / 5 for row in shown if row[3:5] == ["5 a round", "0"]}
            assert table.rounds_per_s == pytest.approx(tuple(rounds.values()), rel=1e-3)
            plain = {row[1]: float(row[5]) for row in shown if row[0] == "plain decoding"}
            assert table.plain_tokens_per_s == tuple(plain.values())


def test_a_gpu_that_nobody_measured_is_named_beside_those_that_were():
    with pytest.raises(InvalidSetting, match=r"no measurement of 7b on abacus; .*--gpu h100"):
        load_tables().find("7b", "abacus", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: 1", "no list", id="no list"),
        pytest.param("- {model: x}", "gpu: field required", id="a field is missing"),
        pytest.param("[", "is not YAML", id="no YAML"),
        pytest.param(
            "- {model: a, gpu: b, scheme: c, max_draft_tokens: 1, source: d, edges: [2, 1],"
            " rounds_per_s: [1, 1], streams: [1], plain_tokens_per_s: [1]}",
            "edges must ascend",
            id="edges in disorder",
        ),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, said):
    file = tmp_path / "table.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match=said):
        load_tables(file)
