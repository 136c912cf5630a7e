"""Admission by predicted length against first come: waiting, throughput and starvation, by load.

The line is the service's own (`cloud_service.waiting.WaitingLine`), on a virtual clock: answers come at
random, a target with so many places writes one token of each a step. Lengths are of real answers, and what
the edge predicts of them is cross-fitted from what mode `auto` reads of the question. Input: runs of
`duet eval routing` with a cloud (or of `duet eval pair`); nothing of them is kept but the summary.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import save
from cloud_service.waiting import AGEING, OVERRUN, Order, Ticket, WaitingLine, expected_tokens
from edge_agent.evaluation.crossfit import crossfit_length, feature_names, feature_table
from edge_agent.evaluation.runs import read_run
from edge_agent.routing.probes import SHAPE_FEATURES, default_probes

PLOT = Path(__file__).parent.parent / "docs" / "scheduling.svg"
LOADS = (0.5, 0.8, 1.0, 1.2, 1.5)
PLACES = (4, 16)
NUM_ANSWERS = 600
NUM_SEEDS = 20
MAX_TOKENS = 512
REREAD = 0.2
"""Steps that a token of its text costs an answer that comes back to a place: all of it, as with no cache."""
TENANT = "anybody"
ORDERS = ("first come", "predicted", "true lengths")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of real answers, tokens."""

    name: str
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]

    @property
    def error(self) -> float:
        return float(np.abs(self.true - self.predicted).mean())


@dataclass(frozen=True, slots=True)
class Waited:
    """What became of the answers of one simulation."""

    waited: NDArray[np.float64]
    """[answers], steps in line, all times together."""
    num_gave_way: int
    seconds: float
    """Steps until the last had ended."""
    num_ended_in_time: int
    """By the time that the last came."""


def lengths_of(runs: Sequence[Path]) -> Lengths:
    """As many answers of each run, and what one calibration for all of them predicts."""
    read = [[row for row in read_run(run)[1] if row["cloud"] is not None] for run in runs]
    rng = np.random.default_rng(0)
    size = min(map(len, read))
    rows = [rows[i] for rows in read for i in rng.permutation(len(rows))[:size]]
    probes = {probe.name for probe in default_probes()}
    names = [n for n in feature_names(rows) if n.startswith(SHAPE_FEATURES) or n.partition(".")[0] in probes]
    true = np.array([row["cloud"]["tokens"] for row in rows], float)
    name = " and ".join(run.name.removeprefix("pair-") for run in runs)
    return Lengths(name, true, crossfit_length(feature_table(rows, names), true))


@dataclass(eq=False, slots=True)
class _Answer:
    number: int
    came: float
    left: int
    expected: int
    written: int = 0
    written_here: int = 0
    joined: float = 0.0


class _Simulation:
    """One target with places, and the answers that come to it."""

    def __init__(self, order: Order, num_places: int, num_answers: int) -> None:
        self._line = WaitingLine(order, num_places)
        self._due: list[tuple[float, int, _Answer]] = []
        self._order = count()
        self._waiting: dict[Ticket, _Answer] = {}
        self.waited = np.zeros(num_answers)
        self.ended = np.zeros(num_answers)
        self.num_gave_way = 0

    def run(self, answers: Sequence[_Answer]) -> None:
        for answer in answers:
            self._after(answer.came, answer)
        while self._due:
            now, _, answer = heapq.heappop(self._due)
            if answer.left == 0:
                self.ended[answer.number] = now
                self._leave(now)
            elif answer.written_here:
                self._go_on(now, answer)
            else:
                self._come(now, answer)

    def _after(self, when: float, answer: _Answer) -> None:
        heapq.heappush(self._due, (when, next(self._order), answer))

    def _come(self, now: float, answer: _Answer) -> None:
        if self._line.num_free and not len(self._line):
            self._line.take(TENANT)
            self._begin(now, answer)
        else:
            self._wait(now, answer, returns=False)

    def _wait(self, now: float, answer: _Answer, *, returns: bool) -> None:
        answer.joined = now
        self._waiting[self._line.join(TENANT, answer.expected, returns=returns)] = answer

    def _leave(self, now: float) -> None:
        self._line.give_back(TENANT)
        if (ticket := self._line.call_next()) is not None:
            answer = self._waiting.pop(ticket)
            self.waited[answer.number] += now - answer.joined
            self._begin(now, answer)

    def _begin(self, now: float, answer: _Answer) -> None:
        """Write up to the end, or until it may have to give way."""
        answer.written_here = 0
        self._write(now + REREAD * answer.written, answer, max(1, int(OVERRUN * answer.expected)))

    def _go_on(self, now: float, answer: _Answer) -> None:
        if len(self._line) and self._line.is_runaway(answer.expected, answer.written_here):
            self.num_gave_way += 1
            answer.expected = answer.written_here
            self._wait(now, answer, returns=True)
            self._leave(now)
        else:
            self._write(now, answer, 1)

    def _write(self, now: float, answer: _Answer, num_tokens: int) -> None:
        num_tokens = min(num_tokens, answer.left)
        answer.left -= num_tokens
        answer.written += num_tokens
        answer.written_here += num_tokens
        self._after(now + num_tokens, answer)


def simulate(lengths: Lengths, order: str, num_places: int, load: float, seed: int) -> Waited:
    """The same answers come at the same times whatever the order."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(lengths.true), NUM_ANSWERS)
    comes = np.cumsum(rng.exponential(lengths.true.mean() / num_places / load, NUM_ANSWERS))
    said = lengths.true if order == "true lengths" else lengths.predicted
    answers = [
        _Answer(number, come, int(lengths.true[i]), expected_tokens(said[i], MAX_TOKENS)[0])
        for number, (come, i) in enumerate(zip(comes, drawn, strict=True))
    ]
    how = Order.FIRST_COME if order == "first come" else Order.SHORTEST
    simulation = _Simulation(how, num_places, NUM_ANSWERS)
    simulation.run(answers)
    return Waited(
        simulation.waited,
        simulation.num_gave_way,
        float(simulation.ended.max()),
        int((simulation.ended <= comes[-1]).sum()),
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """Means over seeds; `of` are quotients to first come with the same answers."""

    lengths: str
    num_places: int
    load: float
    order: str
    mean: float
    of_mean: float
    of_p95: float
    of_max: float
    """Median over seeds."""
    of_ended: float
    starved: float
    """Share that waited longer than twice the longest wait of first come."""
    gave_way: float
    """Times an answer."""


def measure(lengths: Lengths, num_places: int, load: float) -> list[Cell]:
    found = {
        order: [simulate(lengths, order, num_places, load, seed) for seed in range(NUM_SEEDS)]
        for order in ORDERS
    }
    first = found["first come"]

    def quotient(values: list[float], base: list[float]) -> float:
        return float(np.mean(values) / np.mean(base)) if np.mean(base) else 1.0

    cells = []
    for order, runs in found.items():
        longest = [
            (w.waited.max() or 1.0) / (f.waited.max() or 1.0) for w, f in zip(runs, first, strict=True)
        ]
        cells.append(
            Cell(
                lengths=lengths.name,
                num_places=num_places,
                load=load,
                order=order,
                mean=float(np.mean([w.waited.mean() for w in runs])),
                of_mean=quotient([w.waited.mean() for w in runs], [f.waited.mean() for f in first]),
                of_p95=quotient(
                    [np.quantile(w.waited, 0.95) for w in runs], [np.quantile(f.waited, 0.95) for f in first]
                ),
                of_max=float(np.median(longest)),
                of_ended=quotient([w.num_ended_in_time for w in runs], [f.num_ended_in_time for f in first]),
                starved=float(
                    np.mean(
                        [
                            (w.waited > 2 * f.waited.max()).mean() if f.waited.max() else 0.0
                            for w, f in zip(runs, first, strict=True)
                        ]
                    )
                ),
                gave_way=float(np.mean([w.num_gave_way for w in runs])) / NUM_ANSWERS,
            )
        )
    return cells


def plot(cells: Sequence[Cell]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "duet", "font.size": 9})
    names = list(dict.fromkeys(cell.lengths for cell in cells))
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for order, colour in (("predicted", "tab:blue"), ("true lengths", "tab:green")):
            line = [c for c in cells if (c.lengths, c.order, c.num_places) == (name, order, PLACES[0])]
            loads = [cell.load for cell in line]
            axis.plot(loads, [c.of_mean for c in line], marker=".", color=colour, label=f"{order}: mean")
            longest = [c.of_max for c in line]
            axis.plot(loads, longest, linestyle="--", color=colour, label=f"{order}: longest")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("load, of capacity")
    axes[0].set(ylabel="waiting, of first come", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="routing runs with a cloud")
    arguments = parser.parse_args()
    kinds = [lengths_of(arguments.runs)]
    if len(arguments.runs) > 1:
        kinds += [lengths_of([run]) for run in arguments.runs]
    cells = [
        cell
        for lengths in kinds
        for num_places in PLACES
        for load in LOADS
        for cell in measure(lengths, num_places, load)
    ]
    plot(cells)
    about = "; ".join(
        f"{kind.name}: {len(kind.true)} answers of {kind.true.mean():.0f} tokens on average, predicted with a"
        f" mean error of {kind.error:.0f}"
        for kind in kinds
    )
    save(
        "scheduling",
        command=f"python -m benchmarks.scheduling {' '.join(run.name for run in arguments.runs)}",
        title="Admission by predicted length against first come (simulated)",
        notes=f"**Simulated** on a virtual clock by the service's own line: {NUM_ANSWERS} answers come at"
        f" random, {NUM_SEEDS} times over; a place writes a token a step. Lengths of real answers of the"
        f" target, predictions of the edge, cross-fitted ({about}). Ageing {AGEING}, giving way at"
        f" {OVERRUN:g} times the prediction; an answer that comes back reads its text again at {REREAD:g}"
        " steps a token. Waiting: in line, all times together. Ended: by the time that the last came."
        " Starved: waited longer than twice the longest wait of first come. Aim at load 1.2 with"
        f" predictions: mean <= 0.6, longest <= 2.\n\n![waiting by load]({PLOT.name})",
        columns=[
            "answers",
            "places",
            "load",
            "shortest by",
            "mean wait, steps",
            "first come, steps",
            "of first come",
            "p95, of first come",
            "longest, of first come",
            "ended, of first come",
            "starved",
            "gave way, an answer",
        ],
        rows=[row(cell) for cell in cells if cell.order != "first come"],
    )


def row(cell: Cell) -> list[str]:
    return [
        cell.lengths,
        str(cell.num_places),
        f"{cell.load:g}",
        cell.order,
        f"{cell.mean:,.0f}",
        f"{cell.mean / cell.of_mean:,.0f}",
        f"{cell.of_mean:.2f}",
        f"{cell.of_p95:.2f}",
        f"{cell.of_max:.2f}",
        f"{cell.of_ended:.2f}",
        f"{cell.starved:.1%}",
        f"{cell.gave_way:.2f}",
    ]


if __name__ == "__main__":
    main()
