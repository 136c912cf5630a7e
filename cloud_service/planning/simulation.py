"""Edges against one GPU, event by event: how fast answers come at a given load.

A pass takes all rounds that wait (continuous batching) and lasts what was measured for so many; between
its rounds an edge drafts and the link carries. Users ask when they would, and wait where the answer before
is not finished. Reading prompts is left out. SimPy keeps the clock.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import simpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the edges of one GPU do."""

    num_edges: int
    cycle_s: float
    """Mean time between two questions of a user (exponential); 0 asks again at once."""
    answer_tokens: float
    """Mean of an answer's length (geometric)."""
    tokens_per_round: float
    """Acceptance length: tokens that a round commits, the target's own included; 1 for a plain stream."""
    round_pause_s: float
    """Mean time from a verdict's leaving the service to the next draft's arriving there: drafting and the
    round trip. Each is another, evenly from half to one and a half of it. 0 for a plain stream."""
    overhead_s: float = 0.0
    """Of a round at the service, beside waiting and its pass."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a simulated GPU did, after its warm-up."""

    tokens_per_s: float
    """Committed, of all edges together."""
    round_p50_s: float
    """From a draft's arrival at the service to its verdict."""
    round_p95_s: float
    speed_p50: float
    """Tokens per second of an answer while it is made, its last round taken for a whole one."""
    speed_p5: float
    """The slowest twentieth of answers is slower."""
    busy: float
    """Share of time in which the GPU works."""


class Pass(Protocol):
    def __call__(self, num_rounds: int, /) -> float:
        """Seconds of a pass over so many waiting rounds."""


@dataclass
class _Gpu:
    env: simpy.Environment
    pass_seconds: Pass
    max_batch: int
    waiting: list[simpy.Event] = field(default_factory=list)
    busy_s: float = 0.0
    wake: simpy.Event | None = None

    def run(self) -> Generator[simpy.Event, None, None]:
        while True:
            if not self.waiting:
                self.wake = self.env.event()
                yield self.wake
            batch, self.waiting = self.waiting[: self.max_batch], self.waiting[self.max_batch :]
            seconds = self.pass_seconds(len(batch))
            self.busy_s += seconds
            yield self.env.timeout(seconds)
            for verdict in batch:
                verdict.succeed()

    def verify(self) -> simpy.Event:
        verdict = self.env.event()
        self.waiting.append(verdict)
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()
        return verdict


def simulate(load: Load, pass_seconds: Pass, *, max_batch: int, seconds: float, seed: int = 0) -> Behaviour:
    """Run the edges of one GPU for `seconds` of simulated time, the first fifth of which is not counted.

    Args:
        pass_seconds: measured duration of a pass, see `ServerTable.pass_seconds`.
        max_batch: rounds that one pass takes at most.
    Raises:
        ValueError: a load of no edges, tokens or time.
    """
    if load.num_edges < 1 or load.tokens_per_round < 1.0 or load.answer_tokens < 1.0 or not seconds > 0.0:
        raise ValueError("a load has edges, answers of at least a token, rounds of at least one, and time")
    rng = np.random.default_rng(seed)
    env = simpy.Environment()
    gpu = _Gpu(env, pass_seconds, max_batch)
    begin = seconds / 5.0
    rounds: list[float] = []
    speeds: list[float] = []
    committed = [0.0]

    def edge() -> Generator[simpy.Event, None, None]:
        # Edges start at different moments, as they would be met at any time.
        due = rng.uniform(0.0, load.cycle_s + load.round_pause_s)
        while True:
            yield env.timeout(max(0.0, due - env.now))
            started, left, num_rounds = env.now, float(rng.geometric(1.0 / load.answer_tokens)), 0
            while left > 0.0:
                if load.round_pause_s:
                    yield env.timeout(load.round_pause_s * rng.uniform(0.5, 1.5))
                asked = env.now
                if load.overhead_s:
                    yield env.timeout(load.overhead_s)
                yield gpu.verify()
                gained = min(left, load.tokens_per_round)
                left -= gained
                num_rounds += 1
                if env.now >= begin:
                    rounds.append(env.now - asked)
                    committed[0] += gained
            if started >= begin:
                speeds.append(num_rounds * load.tokens_per_round / (env.now - started))
            due += rng.exponential(load.cycle_s)

    env.process(gpu.run())
    for _ in range(load.num_edges):
        env.process(edge())
    env.run(until=begin)
    busy_before = gpu.busy_s
    env.run(until=seconds)
    span = seconds - begin
    none = float("nan")
    return Behaviour(
        tokens_per_s=committed[0] / span,
        round_p50_s=float(np.percentile(rounds, 50)) if rounds else none,
        round_p95_s=float(np.percentile(rounds, 95)) if rounds else none,
        speed_p50=float(np.percentile(speeds, 50)) if speeds else none,
        speed_p5=float(np.percentile(speeds, 5)) if speeds else none,
        busy=min(1.0, (gpu.busy_s - busy_before) / span),
    )
