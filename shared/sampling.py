"""The target's token at a position: one rule for greedy and sampling, for every mode and target.

The token is drawn by Gumbel-max from the target's distribution: the argmax of log-probability plus
Gumbel noise, where the noise is a pure function of (seed, completion position, token id). Nobody
can redraw a token: retries, coalesced drafts, resumes, replicas and other draft lengths all meet the
same noise. This makes speculative sampling drafter-invariant (Daliri et al. 2024, arXiv:2408.07978)
and, for a fixed draft token, accepts with the target's own probability (Leviathan et al. 2023,
arXiv:2211.17192, with a one-hot draft).

The noise, for other languages: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) with
key = (seed mod 2^32, seed div 2^32) and counter = (token id, position, 0, 0) gives words x0..x3;
u = ((x0 >> 6) * 2^26 + (x1 >> 6) + 0.5) / 2^52, which lies strictly between 0 and 1; noise = -ln(-ln u)
in float64. `docs/protocol.md` lists values to test against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequest

MAX_TOP_K = 64
"""Rows hold at most this many tokens, so every distribution is a top-64 one at most."""

Float = NDArray[np.float64]
Int = NDArray[np.int64]

_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_LOW32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from. Applied in the order of the fields below."""

    temperature: float = 0.0
    """>= 0; 0 is greedy."""
    min_p: float = 0.0
    """In [0, 1]; drops tokens less likely than this share of the likeliest."""
    top_k: int = MAX_TOP_K
    """1 to 64."""
    top_p: float = 1.0
    """In (0, 1]; keeps the smallest set of likeliest tokens that reaches this mass."""

    def __post_init__(self) -> None:
        for name, value, ok, want in (
            ("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "finite and 0 or more"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("top_k", self.top_k, 1 <= self.top_k <= MAX_TOP_K, f"1 to {MAX_TOP_K}"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]"),
        ):
            if not ok:
                raise InvalidRequest(f"{name} must be {want}, got {value!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def row_width(self) -> int:
        """How many tokens a row needs for an exact draw."""
        return 1 if self.greedy else self.top_k


@dataclass(frozen=True, slots=True)
class Rows:
    """The likeliest tokens at consecutive positions, best first; equal ones by ascending id."""

    token_ids: Int
    """[num_positions, k]"""
    logprobs: Float
    """[num_positions, k], nats, normalised over the whole vocabulary."""

    def __len__(self) -> int:
        return len(self.token_ids)


def rows_from_logits(logits: Sequence[NDArray[np.float32]], k: int) -> Rows:
    """Reduce logits to their k likeliest tokens.

    Args:
        logits: num_positions rows of [vocabulary_size]. -inf masks a token.
        k: row width, >= 1.
    Raises:
        ValueError: a position without any finite logit, or a NaN.
    """
    ids = np.empty((len(logits), k), np.int64)
    logprobs = np.empty((len(logits), k), np.float64)
    for i, row in enumerate(logits):
        top = _top_ids(row, k)
        peak = row[top[0]]
        if not np.isfinite(peak):
            raise ValueError(f"the model gave no finite logit at position {i}")
        log_total = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
        if np.isnan(log_total):
            raise ValueError(f"the model gave a NaN at position {i}")
        ids[i] = top
        logprobs[i] = row[top].astype(np.float64) - log_total
    return Rows(ids, logprobs)


def logprobs_from_logits(logits: Sequence[NDArray[np.float32]], token_ids: Sequence[int]) -> Float:
    """Log-probability of one token at each of the first positions.

    Args:
        logits: as in `rows_from_logits`, which has checked them.
        token_ids: [<= num_positions]
    Returns:
        [len(token_ids)], nats.
    """
    logprobs = np.empty(len(token_ids), np.float64)
    for i, (row, token) in enumerate(zip(logits, token_ids, strict=False)):
        peak = float(row.max())
        log_total = peak + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
        logprobs[i] = min(float(row[token]) - log_total, 0.0)
    return logprobs


def logprobs_in_rows(rows: Rows, token_ids: Sequence[int]) -> Float:
    """Log-probability of one token at each of the first positions, as far as the rows tell.

    A token outside its row gets -inf. It has at most the probability of the row's last one, and so at most
    1 / (k + 1): with k = 64 it is 4.17 nats away at least.

    Args:
        token_ids: [<= num_positions]
    Returns:
        [len(token_ids)], nats.
    """
    count = len(token_ids)
    found = rows.token_ids[:count] == np.array(token_ids, np.int64)[:, None]
    best: Float = np.where(found, rows.logprobs[:count], -np.inf).max(axis=1, initial=-np.inf)
    return np.minimum(best, 0.0)


def settled_rows(token_ids: Sequence[int], width: int = 1) -> Rows:
    """Rows of a target that has decided by itself: at each position its token has all the probability.

    >>> draw(settled_rows([7, 3], width=2), Sampling(temperature=1.0), seed=0, start=0).tolist()
    [7, 3]
    """
    logprobs = np.full((len(token_ids), width), -np.inf)
    logprobs[:, :1] = 0.0
    return Rows(np.repeat(np.array(token_ids, np.int64)[:, None], width, axis=1), logprobs)


_MASS_TOLERANCE = 1e-3
"""What log-probabilities in float32 over a large vocabulary may be off by."""


def check_rows(rows: Rows) -> None:
    """Refuse what is no distribution.

    Raises:
        ValueError: a NaN, a row without any possible token, or one whose probabilities sum to more than one.
    """
    mass = np.exp(rows.logprobs).sum(axis=1)
    if np.isnan(mass).any():
        raise ValueError("the model gave a NaN")
    if not np.isfinite(rows.logprobs[:, 0]).all():
        raise ValueError("the model gave no finite probability")
    if (mass > 1.0 + _MASS_TOLERANCE).any():
        raise ValueError(f"the model gave probabilities that sum to {mass.max():.4g}, not to one")


def _top_ids(row: NDArray[np.float32], k: int) -> Int:
    """Ids of the k largest, best first. A partition alone would choose among equals at random."""
    if k == 1:
        return np.array([np.argmax(row)])  # the first, so the lowest id; a NaN wins and is seen
    threshold = np.partition(row, -k)[-k]
    candidates = np.flatnonzero(row >= threshold)
    order = np.lexsort((candidates, -row[candidates]))
    if len(order) < k:
        raise ValueError("the model gave a NaN")
    return candidates[order[:k]]


def draw(rows: Rows, sampling: Sampling, seed: int, start: int) -> Int:
    """Draw the target's token at each of consecutive completion positions.

    Args:
        rows: [num_positions, k] with k >= `sampling.row_width`.
        seed: 64 bits; unused when greedy.
        start: completion position of the first row.
    Returns:
        [num_positions] token ids.

    >>> rows = Rows(np.array([[7, 3]]), np.log([[0.6, 0.4]]))
    >>> draw(rows, Sampling(), seed=0, start=0).tolist()
    [7]
    """
    if sampling.greedy:
        return rows.token_ids[:, 0]
    ids, scores = rows.token_ids[:, : sampling.top_k], rows.logprobs[:, : sampling.top_k]
    with np.errstate(over="ignore"):  # next to no temperature leaves only the best, and those equal to it
        scores = (scores - scores[:, :1]) / sampling.temperature
    positions = np.arange(start, start + len(ids))[:, None]
    noisy = np.where(_kept(scores, sampling), scores + gumbel(seed, positions, ids), -np.inf)
    best = noisy.max(axis=1, keepdims=True)
    tied = np.where(noisy == best, ids, np.iinfo(np.int64).max)
    drawn: Int = tied.min(axis=1)
    return drawn


def _kept(scores: Float, sampling: Sampling) -> NDArray[np.bool_]:
    """Which tokens of each row stay: min-p, then top-p over the renormalised rest. The best always stays.

    Args:
        scores: relative to the best of each row, so that min-p reads directly.
    """
    probs = np.exp(scores)
    kept = probs >= sampling.min_p
    probs = np.where(kept, probs, 0.0)
    mass_before = (np.cumsum(probs, axis=1) - probs) / probs.sum(axis=1, keepdims=True)
    kept &= mass_before < sampling.top_p
    return kept


def gumbel(seed: int, positions: NDArray[np.integer], token_ids: NDArray[np.integer]) -> Float:
    """Gumbel noise as a pure function of (seed, position, token id); see the module's docstring.

    Args:
        seed: 0 to 2^64 - 1.
        positions, token_ids: non-negative, below 2^32; they broadcast against each other.
    """
    x0, x1 = philox4x32(
        counter=(token_ids.astype(np.uint64), positions.astype(np.uint64), np.uint64(0), np.uint64(0)),
        key=(seed & 0xFFFFFFFF, seed >> 32),
    )[:2]
    high, low = (x0 >> np.uint64(6)).astype(np.float64), (x1 >> np.uint64(6)).astype(np.float64)
    uniform = (high * 2.0**26 + low + 0.5) / 2.0**52
    result: Float = -np.log(-np.log(uniform))
    return result


_Words = NDArray[np.uint64] | np.uint64


def philox4x32(
    counter: tuple[_Words, _Words, _Words, _Words], key: tuple[int, int]
) -> tuple[_Words, _Words, _Words, _Words]:
    """Philox4x32-10 on 32-bit words held in uint64 arrays that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _PHILOX_M0 * c0, _PHILOX_M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW32,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & 0xFFFFFFFF, (k1 + _PHILOX_W1) & 0xFFFFFFFF
    return c0, c1, c2, c3
