"""Two routing runs over the same questions, each of one model alone -> one run of the pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_agent.evaluation.runs import Row, Run, read_run
from shared.errors import InvalidRequest


def pair_runs(edge: Path, cloud: Path, out: Path) -> int:
    """Write the run that asking both at once would have made; returns its number of rows.

    Answers of a model do not depend on who is compared with it, so that one run of a large model serves
    many edges. Questions that only one of the two has are left out.

    Raises:
        InvalidRequest: not two routing runs over the same data with answers of the same length and count.
    """
    edge_manifest, edge_rows = read_run(edge)
    cloud_manifest, cloud_rows = read_run(cloud)
    ours, theirs = edge_manifest["identity"], cloud_manifest["identity"]
    for folder, identity in ((edge, ours), (cloud, theirs)):
        if identity["experiment"] != "routing":
            raise InvalidRequest(f"{folder} is no routing run; pair two routing runs over the same data")
    for name in ("items_sha256", "letter_request_sha256", "max_answer_tokens"):
        if ours.get(name) != theirs.get(name):
            raise InvalidRequest(
                f"{edge} and {cloud} differ in {name}; pair two routing runs over the same data"
            )
    if (ours["cloud"] is None) != (theirs["cloud"] is None):  # then one counts letters and the other words
        raise InvalidRequest(
            f"only one of {edge} and {cloud} was asked beside a cloud, so that multiple choice counts"
            " differently; pair two runs of one model alone"
        )
    identity = {
        **ours,
        "cloud": theirs["edge"]["model"],
        "cloud_sha256": theirs["edge"]["sha256"],
        "paired": True,
    }
    answers = {row["id"]: row["edge"] for row in cloud_rows if row["edge"] is not None}
    with Run.open(out, identity, edge_manifest["about"]) as run:
        for row in _paired(edge_rows, answers):
            if row["id"] not in run.done:
                run.append(row)
        return len(run.done)


def _paired(rows: list[Row], answers: dict[str, Row]) -> Iterator[Row]:
    for row in rows:
        if row["edge"] is not None and row["id"] in answers:
            yield {**row, "cloud": answers[row["id"]]}
