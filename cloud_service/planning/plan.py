"""How many GPUs a number of edges needs, and what a token costs, beside plain serving of the same answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from cloud_service.planning.simulation import Behaviour, Load, simulate
from cloud_service.planning.tables import ServerTable
from shared.errors import InvalidSetting

_MOST_SIMULATED_ROUNDS = 30_000
"""Of one trial, so that a plan takes seconds."""

_SHORTEST_S, _LONGEST_S = 30.0, 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Who uses the service, and how."""

    num_edges: int
    answers_per_hour: float
    """Of one edge."""
    answer_tokens: float
    tokens_per_round: float
    """Acceptance length at the table's draft length."""
    draft_s: float
    """Time to write a draft at the edge."""
    rtt_s: float
    min_speed: float
    """Tokens per second that 95% of answers shall reach."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The fewest GPUs that serve a demand."""

    num_gpus: int
    edges_per_gpu: int
    behaviour: Behaviour
    """Of one of these GPUs."""
    cost_per_million: float
    """Of committed tokens, in the currency of the price."""
    beyond_measured: bool
    """More rounds at once than were measured: the rate is taken to stay what it was there."""


@dataclass(frozen=True, slots=True)
class Plan:
    speculative: Fleet | None
    """None: no number of GPUs reaches the demand's speed, as even an edge alone is slower."""
    plain: Fleet | None
    """The target's own streams, without edges that draft."""


def make_plan(demand: Demand, table: ServerTable, *, price_per_hour: float, seed: int = 0) -> Plan:
    """Simulate ever larger shares of the edges on one GPU, and take the largest that is fast enough.

    Args:
        price_per_hour: of one GPU.
    Raises:
        InvalidSetting: the demand names no edges, tokens or answers.
    """
    if demand.num_edges < 1 or demand.answers_per_hour <= 0.0 or demand.answer_tokens < 1.0:
        raise InvalidSetting(
            "a plan needs at least one edge, answers per hour above 0 and tokens in an answer"
        )
    if not 1.0 <= demand.tokens_per_round <= table.max_draft_tokens + 1:
        raise InvalidSetting(
            f"rounds of {table.max_draft_tokens} draft tokens commit 1 to {table.max_draft_tokens + 1}"
            f" tokens, not {demand.tokens_per_round:g}"
        )
    speculative = _fleet(
        demand,
        price_per_hour,
        table.pass_seconds,
        table.most_edges,
        tokens_per_round=demand.tokens_per_round,
        round_pause_s=demand.draft_s + demand.rtt_s,
        overhead_s=table.overhead_s,
        seed=seed,
    )
    plain = _fleet(
        demand,
        price_per_hour,
        table.step_seconds,
        int(table.streams[-1]),
        tokens_per_round=1.0,
        round_pause_s=0.0,
        overhead_s=0.0,
        seed=seed,
    )
    return Plan(speculative, plain)


def _fleet(
    demand: Demand,
    price_per_hour: float,
    pass_seconds: Callable[[int], float],
    most_measured: int,
    *,
    tokens_per_round: float,
    round_pause_s: float,
    overhead_s: float,
    seed: int,
) -> Fleet | None:
    rounds_per_edge_s = demand.answers_per_hour / 3600.0 * demand.answer_tokens / tokens_per_round

    @cache
    def trial(num_edges: int) -> Behaviour:
        load = Load(
            num_edges=num_edges,
            cycle_s=3600.0 / demand.answers_per_hour,
            answer_tokens=demand.answer_tokens,
            tokens_per_round=tokens_per_round,
            round_pause_s=round_pause_s,
            overhead_s=overhead_s,
        )
        seconds = min(_LONGEST_S, max(_SHORTEST_S, _MOST_SIMULATED_ROUNDS / (num_edges * rounds_per_edge_s)))
        return simulate(load, pass_seconds, max_batch=most_measured, seconds=seconds, seed=seed)

    def enough(behaviour: Behaviour) -> bool:
        return behaviour.speed_p5 >= demand.min_speed

    best: tuple[int, Behaviour] | None = None
    most = (
        int(most_measured / pass_seconds(most_measured) / rounds_per_edge_s) + 1
    )  # at which the GPU never rests
    low, high = 0, min(demand.num_edges, most) + 1  # low is known to be served, high is not
    probe = high - 1
    while high - low > max(1, low // 25):
        behaviour = trial(probe)
        if enough(behaviour):
            low, best = probe, (probe, behaviour)
        else:
            high = probe
        probe = (low + high) // 2
    if best is None:
        return None
    num_gpus = -(-demand.num_edges // best[0])
    per_gpu = -(-demand.num_edges // num_gpus)
    # Near the limit two trials may differ: what is promised is what was seen.
    while not enough(behaviour := trial(per_gpu)) and per_gpu > 1:
        num_gpus += 1
        per_gpu = -(-demand.num_edges // num_gpus)
    in_system = behaviour.tokens_per_s / tokens_per_round * behaviour.round_p50_s  # Little's law
    asked = demand.answers_per_hour * demand.answer_tokens / 3600.0
    made = demand.num_edges * min(
        asked, behaviour.speed_p50
    )  # tokens/s; an edge that asks for more never rests
    cost = num_gpus * price_per_hour / (made * 3600.0) * 1e6
    return Fleet(num_gpus, per_gpu, behaviour, cost, beyond_measured=in_system > most_measured)
