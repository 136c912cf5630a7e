"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math

from rich.table import Table

from cloud_service.planning.plan import Demand, Fleet, Plan
from cloud_service.planning.tables import ServerTable


def plan_json(plan: Plan, demand: Demand, table: ServerTable) -> str:
    """One object; figures that do not exist are null."""
    return json.dumps(
        _without_nan(
            {
                "demand": dataclasses.asdict(demand),
                "measured": table.model_dump(
                    include={"model", "gpu", "scheme", "max_draft_tokens", "source"}
                ),
                "speculative": plan.speculative and dataclasses.asdict(plan.speculative),
                "plain": plan.plain and dataclasses.asdict(plan.plain),
            }
        )
    )


def plan_table(plan: Plan) -> Table:
    table = Table(title="What the demand takes", title_justify="left")
    for column in (
        "",
        "GPUs",
        "edges a GPU",
        "busy",
        "round p95, ms",
        "tokens/s, p50",
        "p5",
        "cost/M tokens",
    ):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("edges draft", *_cells(plan.speculative))
    table.add_row("plain streams", *_cells(plan.plain))
    return table


_ALIKE = 0.05
"""Costs that differ by less are the simulation's noise."""


def plan_notes(plan: Plan, demand: Demand) -> list[str]:
    """What a reader of the table has to know; one line each."""
    notes = []
    if plan.speculative and plan.plain:
        notes.append(_cheaper(plan.speculative.cost_per_million, plan.plain.cost_per_million))
    for name, fleet in (("edges draft", plan.speculative), ("plain streams", plan.plain)):
        if fleet is None:
            notes.append(
                f"{name}: even one edge alone does not reach {demand.min_speed:g} tokens/s; lower --min-speed"
            )
        elif fleet.beyond_measured:
            notes.append(
                f"{name}: more rounds wait at once than were measured, so that the figures are a guess"
            )
    return notes


def _cheaper(speculative: float, plain: float) -> str:
    """Which way costs less, in a line."""
    if abs(speculative - plain) < _ALIKE * plain:
        return "a token costs the same either way"
    if speculative > plain:
        return f"plain streams are cheaper here: drafts make a token {speculative / plain:.1f} times as dear"
    return f"drafts are cheaper here: a token costs {1 - speculative / plain:.0%} less than in plain streams"


def _cells(fleet: Fleet | None) -> list[str]:
    if fleet is None:
        return ["-"] * 7
    seen = fleet.behaviour
    return [
        f"{fleet.num_gpus}",
        f"{fleet.edges_per_gpu}",
        f"{seen.busy:.0%}",
        f"{1e3 * seen.round_p95_s:.0f}",
        f"{seen.speed_p50:.1f}",
        f"{seen.speed_p5:.1f}",
        f"{fleet.cost_per_million:.2f}",
    ]


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
