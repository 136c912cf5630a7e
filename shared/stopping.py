"""When a draft stops: pure rules that can be combined, and what confidence says about acceptance."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol


class StopRule(Protocol):
    """Asked before each draft token whether the draft ends in front of it."""

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        """
        Args:
            probs: [num_unverified + 1]: the drafter's own probability of each draft token that is not yet
                verified, the candidate last; None where a drafter has none.
            top_prob: of the likeliest token at the candidate's position; None where there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """Only an end of text, or nothing to propose, ends a draft."""

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Ends where one of the rules does."""

    rules: tuple[StopRule, ...]

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        return any(rule.ends_before(probs, top_prob) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class TopProbBelow:
    """Fallback of BiLD (Kim et al. 2023, arXiv:2302.07863), dynamic exit of Kangaroo (arXiv:2404.18911).

    A proposal without a probability is never doubted.

    >>> TopProbBelow(0.5).ends_before([0.9, 0.2], top_prob=0.4)
    True
    """

    threshold: float
    """In [0, 1]; 0 never ends a draft."""

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        return top_prob is not None and top_prob < self.threshold


@dataclass(frozen=True, slots=True)
class AcceptanceEstimate:
    """How often the target accepts a draft token of a given confidence, learned from verdicts.

    Confidence falls into equal bins. Each bin has a Beta prior around its middle, as if confidence were
    right, and counts what the target did. Neighbours that would make acceptance fall while confidence
    rises are pooled (isotonic regression by pool-adjacent-violators). Immutable, so that a thread may
    read one while the next is made. Proposals without a probability have a bin of their own.
    """

    counts: tuple[tuple[float, float], ...] = ()
    """Per bin (accepted, rejected), the prior included; empty is the prior alone."""
    unrated: tuple[float, float] = (1.0, 1.0)
    """The same for proposals without a probability."""
    _levels: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", _PRIOR)
        object.__setattr__(self, "_levels", _isotonic(self.counts))

    def of(self, prob: float | None) -> float:
        """Probability, strictly between 0 and 1, that the target accepts; never falls as `prob` rises.

        Raises:
            ValueError: `prob` is no probability.
        """
        if prob is None:
            accepted, rejected = self.unrated
            return accepted / (accepted + rejected)
        return self._levels[_bin(prob)]

    def updated(self, verdicts: Sequence[tuple[float | None, bool]]) -> AcceptanceEstimate:
        """The estimate after more verdicts, each a confidence and whether the target accepted."""
        counts, unrated = list(self.counts), self.unrated
        for prob, accepted in verdicts:
            accepted_rejected = (float(accepted), float(not accepted))
            if prob is None:
                unrated = _added(unrated, accepted_rejected)
            else:
                counts[_bin(prob)] = _added(counts[_bin(prob)], accepted_rejected)
        return AcceptanceEstimate(tuple(counts), unrated)


@dataclass(frozen=True, slots=True)
class SurvivalBelow:
    """Ends where the whole unverified run, the candidate included, would hardly be accepted."""

    threshold: float
    """In [0, 1]; 0 never ends a draft."""
    estimate: AcceptanceEstimate

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        if not self.threshold:
            return False
        return prod(self.estimate.of(prob) for prob in probs) < self.threshold


@dataclass(frozen=True, slots=True)
class Following:
    """A rule for a draft that follows others which are not verified yet."""

    earlier_probs: tuple[float | None, ...]
    rule: StopRule

    def ends_before(self, probs: Sequence[float | None], top_prob: float | None) -> bool:
        return self.rule.ends_before((*self.earlier_probs, *probs), top_prob)


_NUM_BINS = 10
_EDGES = tuple(i / _NUM_BINS for i in range(1, _NUM_BINS))
_PRIOR_STRENGTH = 4.0
"""Verdicts that the prior of a bin counts for."""
_PRIOR = tuple(
    (_PRIOR_STRENGTH * (i + 0.5) / _NUM_BINS, _PRIOR_STRENGTH * (1 - (i + 0.5) / _NUM_BINS))
    for i in range(_NUM_BINS)
)


def _bin(prob: float) -> int:
    _check_share("a confidence", prob)
    return bisect_right(_EDGES, prob)


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:  # written so that NaN fails too
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def _added(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _isotonic(counts: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Rate of each bin, non-decreasing: bins that disagree are pooled with their neighbours."""
    pools: list[tuple[float, float, int]] = []
    for accepted, rejected in counts:
        pool = (accepted, rejected, 1)
        while pools and _rate(pools[-1]) >= _rate(pool):
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return tuple(_rate(pool) for pool in pools for _ in range(pool[2]))


def _rate(pool: tuple[float, float, int]) -> float:
    return pool[0] / (pool[0] + pool[1])
