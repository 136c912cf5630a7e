"""`duet-cloud plan`: measured tables, the simulation of edges against a GPU, and how many GPUs they need."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from cloud_service.cli import app
from cloud_service.planning.plan import Demand, make_plan
from cloud_service.planning.simulation import Load, simulate
from cloud_service.planning.tables import ServerTable, load_tables
from shared.errors import InvalidSetting

TABLE = ServerTable(
    model="toy",
    gpu="toy",
    scheme="request",
    max_draft_tokens=8,
    source="made up for tests",
    edges=(1, 10, 100),
    rounds_per_s=(100, 500, 1000),
    streams=(1, 100),
    plain_tokens_per_s=(100, 2000),
)
DEMAND = Demand(
    num_edges=200,
    answers_per_hour=60,
    answer_tokens=100,
    tokens_per_round=4,
    draft_s=0.05,
    rtt_s=0.05,
    min_speed=10,
)


def load(**changes) -> Load:
    alone = Load(num_edges=1, pause_s=0, answer_tokens=50, tokens_per_round=4, round_pause_s=0.09)
    return dataclasses.replace(alone, **changes)


def test_a_pass_takes_what_was_measured_and_between_measurements_what_lies_between():
    assert TABLE.pass_seconds(1) == pytest.approx(1 / 100)
    assert TABLE.pass_seconds(10) == pytest.approx(10 / 500)
    assert TABLE.pass_seconds(1) < TABLE.pass_seconds(5) < TABLE.pass_seconds(10)


def test_beyond_what_was_measured_the_rate_stays():
    assert TABLE.pass_seconds(300) == pytest.approx(300 / 1000)


def test_an_edge_alone_takes_its_draft_the_round_trip_and_one_pass():
    seen = simulate(load(answer_tokens=4000), TABLE.pass_seconds, max_batch=100, seconds=400)
    assert seen.tokens_per_s == pytest.approx(4 / (0.09 + 0.01), rel=0.02)
    assert seen.round_p50_s == pytest.approx(0.01)
    assert seen.busy == pytest.approx(0.1, abs=0.01)


def test_edges_that_never_think_get_the_measured_rate():
    crowd = load(num_edges=100, round_pause_s=0, answer_tokens=4000)
    seen = simulate(crowd, TABLE.pass_seconds, max_batch=100, seconds=60)
    assert seen.tokens_per_s == pytest.approx(4 * 1000, rel=0.05)
    assert seen.busy == pytest.approx(1.0, abs=0.01)


def test_users_who_pause_leave_the_gpu_idle():
    seen = simulate(load(num_edges=50, pause_s=60), TABLE.pass_seconds, max_batch=100, seconds=3000)
    per_answer_s = 50 / 4 * 0.1 + 60
    assert seen.tokens_per_s == pytest.approx(50 * 50 / per_answer_s, rel=0.1)
    assert seen.busy < 0.2


def test_the_same_seed_gives_the_same_day():
    runs = [simulate(load(num_edges=9, pause_s=2), TABLE.pass_seconds, max_batch=9, seconds=60) for _ in "ab"]
    assert runs[0] == runs[1]


def test_more_edges_are_slower_each_and_more_together():
    few, many = (
        simulate(load(num_edges=n, answer_tokens=200), TABLE.pass_seconds, max_batch=100, seconds=60)
        for n in (5, 400)
    )
    assert many.speed_p50 < few.speed_p50
    assert many.tokens_per_s > few.tokens_per_s


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


def test_a_plan_keeps_answers_fast_enough_on_the_fewest_gpus():
    fleet = make_plan(DEMAND, TABLE, price_per_hour=2).speculative
    assert fleet is not None
    assert fleet.behaviour.speed_p5 >= DEMAND.min_speed
    assert fleet.num_gpus * fleet.edges_per_gpu >= DEMAND.num_edges
    assert fleet.cost_per_million == pytest.approx(2 / (fleet.behaviour.tokens_per_s * 3600) * 1e6)


def test_a_higher_speed_takes_more_gpus():
    needed = []
    for min_speed in (10, 30):
        demand = dataclasses.replace(DEMAND, num_edges=300, answers_per_hour=400, min_speed=min_speed)
        fleet = make_plan(demand, TABLE, price_per_hour=2).speculative
        assert fleet is not None
        needed.append(fleet.num_gpus)
    assert needed[0] < needed[1]


def test_a_speed_that_no_edge_reaches_is_said_to_be_out_of_reach():
    assert (
        make_plan(
            dataclasses.replace(DEMAND, num_edges=20, min_speed=41), TABLE, price_per_hour=2
        ).speculative
        is None
    )


@pytest.mark.parametrize("tokens_per_round", [0.5, 9.5])
def test_more_tokens_a_round_than_a_draft_holds_are_refused(tokens_per_round):
    with pytest.raises(InvalidSetting, match="commit 1 to 9 tokens"):
        make_plan(dataclasses.replace(DEMAND, tokens_per_round=tokens_per_round), TABLE, price_per_hour=2)


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


def test_the_command_prints_a_table_or_json():
    asked = ["plan", "--model", "7b", "--edges", "40", "--answers-per-hour", "60"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert "plain" in shown.output
    assert "Measured:" in shown.output
    parsed = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert parsed["speculative"]["num_gpus"] == 1
    assert parsed["measured"]["model"] == "7b"
