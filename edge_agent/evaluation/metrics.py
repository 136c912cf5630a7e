"""Every metric of the evaluation: arrays in, numbers out. No rows, no files, no model.

Routing metrics take one entry a question: `scores` (higher goes to the cloud first), `edge` and `cloud`
(was the answer right, 0 or 1), `labels` (bool) and `probabilities` in [0, 1]. Where a metric is not defined
(one class only, no gap between the models, nothing to average) it is NaN; an array of the wrong shape, an
empty one or a NaN in it raises ValueError.

Sources: RouteLLM (Ong et al. 2024, arXiv:2406.18665) for PGR, APGR and CPT; Guo et al. 2017, arXiv:1706.04599
for ECE; Brier 1950; Zheng et al. 2023, arXiv:2305.13144 for lengths; Leviathan et al. 2023, arXiv:2211.17192
for speculation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.speed import expected_acceptance_length

Floats = NDArray[np.float64]
NUM_BINS = 15
_ROUNDING = 1e-12


# --- routing ---------------------------------------------------------------------------------------------


def accuracy_curve(scores: ArrayLike, edge: ArrayLike, cloud: ArrayLike) -> tuple[Floats, Floats]:
    """Quality against cost: accuracy when the questions of the highest scores go to the cloud.

    Among equal scores every order counts alike, so the curve is straight across a tie: the mean over all
    orders, exactly.

    Args:
        scores: [n]. edge: [n]. cloud: [n].
    Returns:
        shares: [n + 1], k / n for k questions sent. accuracies: [n + 1], from the edge's to the cloud's.

    >>> accuracy_curve([0.9, 0.1], edge=[0, 1], cloud=[1, 1])[1].tolist()
    [0.5, 1.0, 1.0]
    """
    x, e, c = _columns(scores, edge, cloud)
    gains, counts = _gains_by_level(x, e, c)
    gained = np.concatenate([[0.0], np.cumsum(np.repeat(gains / counts, counts))])
    return np.arange(len(x) + 1) / len(x), (e.sum() + gained) / len(x)


def pgr_curve(scores: ArrayLike, edge: ArrayLike, cloud: ArrayLike) -> tuple[Floats, Floats]:
    """Performance gap recovered, PGR(c) = (r(c) - r_edge) / (r_cloud - r_edge), of RouteLLM.

    Returns:
        shares: [n + 1]. pgr: [n + 1], 0 first and 1 last; all NaN where r_cloud equals r_edge.
    """
    shares, accuracies = accuracy_curve(scores, edge, cloud)
    gap = accuracies[-1] - accuracies[0]
    if abs(gap) < _ROUNDING:
        return shares, np.full_like(shares, np.nan)
    return shares, (accuracies - accuracies[0]) / gap


def apgr(scores: ArrayLike, edge: ArrayLike, cloud: ArrayLike) -> float:
    """Average PGR: the integral of the exact PGR curve over c in [0, 1] by the trapezoid rule.

    Random routing has 0.5; the oracle may exceed 1. NaN where r_cloud equals r_edge.
    """
    return _apgr(pgr_curve(scores, edge, cloud)[1])


def _apgr(pgr: Floats) -> float:
    return float((pgr.sum() - (pgr[0] + pgr[-1]) / 2) / (len(pgr) - 1))


def cpt(scores: ArrayLike, edge: ArrayLike, cloud: ArrayLike, level: float) -> float:
    """Call-performance threshold CPT(level): the least share k / n of calls to the cloud with PGR >= level.

    Args:
        level: in [0, 1], such as 0.5 or 0.8.
    """
    return _cpt(*pgr_curve(scores, edge, cloud), level)


def _cpt(shares: Floats, pgr: Floats, level: float) -> float:
    if np.isnan(pgr[0]):
        return math.nan
    return float(shares[np.argmax(pgr >= level - _ROUNDING)])


def oracle_scores(edge: ArrayLike, cloud: ArrayLike) -> Floats:
    """[n] scores of the best router: first what only the cloud gets right, last what only the edge does."""
    e, c = _columns(edge, cloud)
    return c - e


def random_scores(num_questions: int) -> Floats:
    """[n] scores of the random router: one tie, so that its curve is the mean over every order."""
    return np.zeros(num_questions)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of (positive, negative) pairs with the positive scored higher, a tie counting half.

    From mid-ranks (Mann-Whitney), O(n log n). NaN without positives or without negatives.

    >>> auroc([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    x, y = _columns(scores, labels)
    _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
    return _auroc(_sums(level, y), counts)


def _auroc(positives: Floats, counts: NDArray[np.intp]) -> float:
    """From positives and questions by level of score, lowest level first."""
    negatives = counts - positives
    pairs = positives.sum() * negatives.sum()
    if pairs == 0:
        return math.nan
    below = np.cumsum(negatives) - negatives / 2
    return float(positives @ below / pairs)


@dataclass(frozen=True, slots=True)
class RouterFigures:
    """What one score is worth as a router."""

    auroc_hard: float
    """Against "the edge is wrong"."""
    auroc_need: float
    """Against "the edge is wrong and the cloud is right"."""
    apgr: float
    cpt50: float
    cpt80: float


def router_figures(scores: ArrayLike, edge: ArrayLike, cloud: ArrayLike) -> RouterFigures:
    """All routing metrics of one score with one sort, for the bootstrap."""
    x, e, c = _columns(scores, edge, cloud)
    _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
    hard, need = _sums(level, 1 - e), _sums(level, (1 - e) * c)
    gains = _sums(level, c - e)
    total = gains.sum()
    pgr = np.full(len(x) + 1, np.nan)
    if abs(total) >= _ROUNDING:
        steps = np.repeat((gains / counts)[::-1], counts[::-1])
        pgr = np.concatenate([[0.0], np.cumsum(steps)]) / total
    shares = np.arange(len(x) + 1) / len(x)
    return RouterFigures(
        _auroc(hard, counts), _auroc(need, counts), _apgr(pgr), _cpt(shares, pgr, 0.5), _cpt(shares, pgr, 0.8)
    )


def confusion(probabilities: ArrayLike, need: ArrayLike, threshold: float) -> NDArray[np.int64]:
    """Route against need: [2, 2] counts, rows by need (no, yes), columns by route (edge, cloud).

    A question goes to the cloud at the threshold and above, as `Calibration.threshold` says.
    """
    p, y = _columns(probabilities, need)
    cells = 2 * (y > 0.5).astype(np.int64) + (p >= threshold)
    return np.bincount(cells, minlength=4).reshape(2, 2).astype(np.int64)


# --- calibration -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bins:
    """A reliability diagram."""

    edges: Floats
    """[bins + 1]"""
    predicted: Floats
    """[bins] mean probability; NaN in an empty bin."""
    observed: Floats
    """[bins] share of positives; NaN in an empty bin."""
    counts: NDArray[np.int64]
    """[bins]"""


def reliability(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = NUM_BINS) -> Bins:
    """Mean probability and share of positives in equal-width bins, each open below and closed above."""
    p, y = _probabilities(probabilities, labels)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    where = np.searchsorted(edges[1:-1], p)
    counts = np.bincount(where, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(where, p, num_bins) / counts
        observed = np.bincount(where, y, num_bins) / counts
    return Bins(edges, predicted, observed, counts.astype(np.int64))


def ece(probabilities: ArrayLike, labels: ArrayLike, num_bins: int | None = NUM_BINS) -> float:
    """Expected calibration error: |share of positives - mean probability| by bin, weighted by its questions.

    Guo et al. 2017, Eq. 3, on probabilities of the positive class.

    Args:
        num_bins: equal-width bins on [0, 1]; None makes one bin of each distinct value (discrete ratings).
    """
    p, y = _probabilities(probabilities, labels)
    return float(np.abs(np.bincount(_bins(p, num_bins), y - p)).sum() / len(p))


def ece_ceiling(
    probabilities: ArrayLike,
    num_bins: int | None = NUM_BINS,
    *,
    percentile: float = 95.0,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """A percentile of the ECE for labels redrawn from the probabilities: what a perfect predictor shows.

    An ECE below it is no evidence of miscalibration.
    """
    p, _ = _probabilities(probabilities, probabilities)
    where = _bins(p, num_bins)
    expected = np.bincount(where, p)
    rng = np.random.default_rng(seed)
    redrawn = [np.bincount(where[rng.random(len(p)) < p], minlength=len(expected)) for _ in range(draws)]
    eces = np.abs(np.array(redrawn) - expected).sum(axis=1) / len(p)
    return float(np.percentile(eces, percentile))


def _bins(p: Floats, num_bins: int | None) -> NDArray[np.intp]:
    if num_bins is None:
        return np.unique(p, return_inverse=True)[1]
    return np.searchsorted(np.linspace(0.0, 1.0, num_bins + 1)[1:-1], p)


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Brier score: the mean squared difference of probability and outcome."""
    p, y = _probabilities(probabilities, labels)
    return float(np.mean((p - y) ** 2))


def brier_skill(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """1 - Brier / Brier of the base rate: 1 is perfect, 0 that of the base rate. NaN for one class only."""
    p, y = _probabilities(probabilities, labels)
    base = y.mean()
    reference = base * (1 - base)
    return float(1 - np.mean((p - y) ** 2) / reference) if reference > 0 else math.nan


# --- length ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthFigures:
    """Predicted against actual tokens; errors over the questions that have a prediction."""

    num_questions: int
    parse_failures: float
    """Share of the questions without a prediction."""
    error: float
    """Mean |predicted - actual|, tokens."""
    within_50: float
    """Acc-50: share within 50 tokens, the bound included."""
    within_100: float


def length_figures(predicted: ArrayLike, actual: ArrayLike) -> LengthFigures:
    """Zheng et al. 2023, arXiv:2305.13144: Error, Acc-50 and Acc-100.

    Args:
        predicted: [n] tokens; NaN where none was understood. actual: [n] tokens.
    """
    p, a = np.asarray(predicted, float), np.asarray(actual, float)
    _check(p.shape == a.shape and p.ndim == 1 and p.size > 0, "predicted and actual must be [n], n > 0")
    _check(not np.isnan(a).any(), "every actual length must be known")
    off = np.abs(p - a)[~np.isnan(p)]
    if not off.size:
        return LengthFigures(len(a), 1.0, math.nan, math.nan, math.nan)
    return LengthFigures(
        num_questions=len(a),
        parse_failures=1 - off.size / len(a),
        error=float(off.mean()),
        within_50=float(np.mean(off <= 50)),
        within_100=float(np.mean(off <= 100)),
    )


def best_constant(actual: ArrayLike) -> float:
    """The constant of least mean absolute error: the median."""
    (a,) = _columns(actual)
    return float(np.median(a))


def best_constant_within(actual: ArrayLike, tokens: float) -> tuple[float, float]:
    """The constant with the most lengths within `tokens` of it, and that share.

    Its window [constant - tokens, constant + tokens] may start at one of the lengths; the lowest such wins.
    """
    (a,) = _columns(actual)
    ordered = np.sort(a)
    inside = np.searchsorted(ordered, ordered + 2 * tokens, side="right") - np.arange(len(ordered))
    first = int(np.argmax(inside))
    return float(ordered[first] + tokens), float(inside[first] / len(ordered))


# --- speculation -----------------------------------------------------------------------------------------


def acceptance_length(committed: ArrayLike, rounds: ArrayLike) -> float:
    """tau: committed tokens per round (accepted and the target's own token), 1 .. gamma + 1.

    Also called block efficiency, vLLM's mean acceptance length, Spec-Bench's mean accepted tokens.
    """
    return _ratio(np.sum(committed), np.sum(rounds))


def draft_acceptance_rate(accepted: ArrayLike, drafted: ArrayLike) -> float:
    """accepted / drafted; falls as drafts grow, since what follows a rejection is lost with it."""
    return _ratio(np.sum(accepted), np.sum(drafted))


def alpha_hat(accepted: ArrayLike, rejections: ArrayLike) -> float:
    """The acceptance rate per judged token: accepted / (accepted + rounds ending in a rejection).

    The maximum-likelihood estimate of Leviathan et al.'s alpha, acceptances taken as independent.
    """
    total = float(np.sum(accepted))
    return _ratio(total, total + np.sum(rejections))


def walltime_factor(acceptance_rate: float, num_draft_tokens: int, cost_ratio: float) -> float:
    """Expected speed-up without a link: Leviathan et al. 2023, Thm 3.8, tau / (gamma c + 1).

    Args:
        cost_ratio: c, time of a draft token over time of a target step; a verification costs one step.

    >>> walltime_factor(0.5, 2, cost_ratio=0.25)
    1.1666666666666667
    """
    return expected_acceptance_length(acceptance_rate, num_draft_tokens) / (num_draft_tokens * cost_ratio + 1)


def stop_and_wait_speedup(
    tau: float, num_draft_tokens: float, t_draft: float, t_verify: float, rtt: float
) -> float:
    """Speed-up over the cloud's stream, the edge waiting for each verdict: tau t_v / (g t_d + t_v + RTT).

    From a measured tau; a step of the target's own stream is taken to cost t_verify. Seconds throughout.
    `shared.speed.stop_and_wait_tokens_per_s` has the same from an assumed acceptance rate.
    """
    return tau * t_verify / (num_draft_tokens * t_draft + t_verify + rtt)


def stop_and_wait_break_even_rtt(
    tau: float, num_draft_tokens: float, t_draft: float, t_verify: float
) -> float:
    """The round trip at which `stop_and_wait_speedup` is 1: (tau - 1) t_v - g t_d; < 0 if it never is."""
    return (tau - 1) * t_verify - num_draft_tokens * t_draft


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan


# --- input -----------------------------------------------------------------------------------------------


def _columns(*arrays: ArrayLike) -> tuple[Floats, ...]:
    columns = tuple(np.asarray(array, dtype=np.float64) for array in arrays)
    shape = columns[0].shape
    _check(len(shape) == 1 and shape[0] > 0, f"expected [n] with n > 0, got {shape}")
    _check(all(c.shape == shape for c in columns), f"expected one length, got {[c.shape for c in columns]}")
    _check(not any(np.isnan(c).any() for c in columns), "NaN among the entries")
    return columns


def _probabilities(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    p, y = _columns(probabilities, labels)
    _check(bool(np.all((p >= 0) & (p <= 1))), "probabilities must lie in [0, 1]")
    return p, y


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _gains_by_level(x: Floats, e: Floats, c: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Sum of cloud - edge and number of questions by distinct score, highest first."""
    _, level, counts = np.unique(-x, return_inverse=True, return_counts=True)
    return _sums(level, c - e), counts


def _sums(group: NDArray[np.intp], values: Floats) -> Floats:
    """[groups] sum of the values of each group."""
    return np.bincount(group, values).astype(np.float64)
