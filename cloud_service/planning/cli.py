"""The command `duet-cloud plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def plan(
    model: Annotated[str, typer.Option(help="Target model, as the tables of measurements name it.")],
    edges: Annotated[int, typer.Option(min=1, help="Edges in all.")],
    gpu: Annotated[str, typer.Option(help="GPU, as the tables name it.")] = "h100",
    scheme: Annotated[str | None, typer.Option(help="request or resident; the faster one otherwise.")] = None,
    rtt: Annotated[float, typer.Option(min=0.0, help="Round trip between edge and cloud, ms.")] = 50.0,
    draft_ms: Annotated[
        float, typer.Option(min=0.0, help="Time of one draft token at the edge (`duet bench`), ms.")
    ] = 10.0,
    acceptance_length: Annotated[
        float, typer.Option(min=1.0, help="Tokens that a round commits, the target's own included.")
    ] = 4.0,
    answers_per_hour: Annotated[float, typer.Option(min=0.01, help="Of one edge.")] = 20.0,
    answer_tokens: Annotated[float, typer.Option(min=1.0, help="Mean length of an answer.")] = 300.0,
    min_speed: Annotated[
        float, typer.Option(min=0.0, help="Tokens per second that 95% of answers shall reach.")
    ] = 10.0,
    price: Annotated[float, typer.Option(min=0.0, help="Of a GPU, per hour.")] = 2.5,
    table: Annotated[Path | None, typer.Option(help="YAML file of your own measurements.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How many GPUs a number of edges needs, and what a token costs, beside plain serving.

    Simulates the edges of one GPU event by event on what such a GPU was measured to do (docs/deploy.md says
    how to measure yours), and finds the most edges at which answers are still fast enough.
    """
    # The simulation is imported here, so that the other commands start without it.
    from cloud_service.planning.plan import Demand, make_plan
    from cloud_service.planning.report import plan_json, plan_notes, plan_table
    from cloud_service.planning.tables import load_tables

    measured = load_tables(table).find(model, gpu, scheme)
    demand = Demand(
        num_edges=edges,
        answers_per_hour=answers_per_hour,
        answer_tokens=answer_tokens,
        tokens_per_round=acceptance_length,
        draft_s=draft_ms * measured.max_draft_tokens / 1e3,
        rtt_s=rtt / 1e3,
        min_speed=min_speed,
    )
    made = make_plan(demand, measured, price_per_hour=price)
    if as_json:
        typer.echo(plan_json(made, demand, measured))
        return
    console = Console(soft_wrap=True)
    console.print(plan_table(made))
    for note in plan_notes(made, demand):
        console.print(note)
    console.print(
        f"Measured: {measured.source}, {measured.model} on {measured.gpu}, scheme {measured.scheme}."
    )
