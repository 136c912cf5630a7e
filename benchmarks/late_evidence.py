"""What `doubt_threshold` does: which recorded local answers would move to the cloud, and were those wrong?

The input is JSON lines with `id`, `correct` and `logprobs` (nats, of each token that the edge wrote), or
rows of a routing run with these under `edge`; rows without them are passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import save
from edge_agent.evaluation.metrics import auroc
from shared.bootstrap import bootstrap_interval
from shared.json_lines import numbered_lines
from shared.routing import WATCH_TOKENS


@dataclass(frozen=True, slots=True)
class Recorded:
    """One local answer."""

    correct: bool
    lowest: float
    """See `lowest_window`."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a threshold does to recorded answers."""

    threshold: float
    num_moved: int
    num_wrong_moved: int
    num_wrong: int
    num_answers: int


def lowest_window(logprobs: Sequence[float]) -> float:
    """The least that `shared.routing.DoubtWatch` sees of an answer: it moves at any threshold above this.

    Args:
        logprobs: [num_tokens], nats, at least one.
    Returns:
        The lowest geometric mean probability of `WATCH_TOKENS` tokens in a row; of all, where they are fewer.
    """
    width = min(WATCH_TOKENS, len(logprobs))
    return math.exp(min(sum(logprobs[i : i + width]) / width for i in range(len(logprobs) - width + 1)))


def read(lines: Iterable[str]) -> list[Recorded]:
    recorded = []
    for line in lines:
        row = json.loads(line)
        answer = row.get("edge", row)
        if answer.get("logprobs") and answer.get("correct") is not None:
            recorded.append(Recorded(bool(answer["correct"]), lowest_window(answer["logprobs"])))
    return recorded


def moved(answers: Sequence[Recorded], threshold: float) -> Moved:
    over = [answer for answer in answers if answer.lowest < threshold]
    return Moved(
        threshold,
        len(over),
        sum(not answer.correct for answer in over),
        sum(not answer.correct for answer in answers),
        len(answers),
    )


def separation(answers: Sequence[Recorded]) -> tuple[float, float, float]:
    """AUROC, and its 95% interval, of a low window as a sign of a wrong answer; needs both kinds."""
    doubt = np.array([-answer.lowest for answer in answers])
    wrong = np.array([not answer.correct for answer in answers])
    estimate = bootstrap_interval(auroc, doubt, wrong)
    return estimate.value, estimate.low, estimate.high


def share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    arguments = parser.parse_args()
    answers = read(line for _, line in numbered_lines(arguments.answers.read_text("utf-8")))
    if len({answer.correct for answer in answers}) < 2:
        parser.error(f"{arguments.answers} needs right and wrong answers with logprobs")
    area, low, high = separation(answers)
    save(
        "late_evidence",
        command=shlex.join(["python", "-m", "benchmarks.late_evidence", *sys.argv[1:]]),
        title="Late evidence: which local answers would move, and were they wrong?",
        notes=f"{len(answers)} recorded local answers. AUROC of the lowest mean probability of"
        f" {WATCH_TOKENS} tokens in a row against a wrong answer: {area:.3f} ({low:.3f} to {high:.3f});"
        " 0.5 is chance.",
        columns=["doubt_threshold", "answers that move", "wrong among these", "wrong among those that stay"],
        rows=[
            [
                f"{m.threshold:g}",
                share(m.num_moved, m.num_answers),
                share(m.num_wrong_moved, m.num_moved),
                share(m.num_wrong - m.num_wrong_moved, m.num_answers - m.num_moved),
            ]
            for m in (moved(answers, threshold) for threshold in arguments.thresholds)
        ],
    )


if __name__ == "__main__":
    main()
