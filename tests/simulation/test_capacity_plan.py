"""`duet-cloud plan`: how many GPUs some edges need, and what a token costs beside plain serving."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from cloud_service.cli import app
from cloud_service.planning.plan import Demand, make_plan
from cloud_service.planning.report import plan_notes
from cloud_service.planning.tables import ServerTable
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


def test_a_plan_keeps_answers_fast_enough_on_the_fewest_gpus():
    fleet = make_plan(DEMAND, TABLE, price_per_hour=2).speculative
    assert fleet is not None
    assert fleet.behaviour.speed_p5 >= DEMAND.min_speed
    assert fleet.num_gpus * fleet.edges_per_gpu >= DEMAND.num_edges
    asked_per_hour = 200 * 60 * 100
    assert fleet.cost_per_million == pytest.approx(fleet.num_gpus * 2 / asked_per_hour * 1e6)


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


@pytest.mark.parametrize(
    ("acceptance_length", "said"),
    [
        pytest.param(1.2, "plain streams are cheaper here", id="drafts that are hardly kept"),
        pytest.param(9, "drafts are cheaper here", id="drafts that are all kept"),
    ],
)
def test_it_says_which_way_is_cheaper(acceptance_length, said):
    demand = dataclasses.replace(
        DEMAND,
        num_edges=400,
        answers_per_hour=600,
        tokens_per_round=acceptance_length,
        rtt_s=0.01,
        draft_s=0.01,
    )
    assert said in plan_notes(make_plan(demand, TABLE, price_per_hour=2), demand)[0]


def test_where_one_gpu_is_enough_either_way_costs_the_same():
    demand = dataclasses.replace(DEMAND, num_edges=20)
    assert plan_notes(make_plan(demand, TABLE, price_per_hour=2), demand) == [
        "a token costs the same either way"
    ]


@pytest.mark.parametrize("tokens_per_round", [0.5, 9.5])
def test_more_tokens_a_round_than_a_draft_holds_are_refused(tokens_per_round):
    with pytest.raises(InvalidSetting, match="commit 1 to 9 tokens"):
        make_plan(dataclasses.replace(DEMAND, tokens_per_round=tokens_per_round), TABLE, price_per_hour=2)


def test_the_command_prints_a_table_or_json():
    asked = ["plan", "--model", "7b", "--edges", "40", "--answers-per-hour", "60"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert "plain" in shown.output
    assert "Measured:" in shown.output
    parsed = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert parsed["speculative"]["num_gpus"] == 1
    assert parsed["measured"]["model"] == "7b"
