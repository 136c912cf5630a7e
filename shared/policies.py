"""Decisions about drafts: numbers in, decision out. No model, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

DEFAULT_ROLLBACK_THRESHOLD = 2.0
"""Nats, alpha_RB of BiLD: a draft token stands where the target gives it 14% or more. At 3 the default pair
loses right answers (docs/policies.md)."""


def num_accepted(draft_ids: Sequence[int], target_ids: Sequence[int]) -> int:
    """Count the draft tokens that stand: up to the first that is not the target's token.

    With target tokens drawn as in `sampling.draw` this is exact speculative sampling for a
    one-hot draft (Leviathan et al. 2023, arXiv:2211.17192): a fixed draft token equals the drawn
    one with the target's probability of it, and otherwise the drawn token is the correction.

    Args:
        draft_ids: [num_draft_tokens]
        target_ids: entry i is the target's token given the draft before i, as far as the first that
            differs from the draft at least.
    Raises:
        ValueError: the target's tokens end while they agree with the draft.

    >>> num_accepted([5, 6, 7], [5, 9, 7, 8])
    1
    """
    for i, (drafted, wanted) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if drafted != wanted:
            return i
    if len(target_ids) < len(draft_ids):
        raise ValueError(f"{len(draft_ids)} draft tokens but {len(target_ids)} target tokens")
    return len(draft_ids)


def num_judged(draft_ids: Sequence[int], target_ids: Sequence[int], acceptable: Sequence[bool] | Bool) -> int:
    """Count the draft tokens that stand under `judge`: those of the target's own or judged right, up to the
    first that is neither (Bachmann et al. 2025, Judge Decoding, arXiv:2501.19309). Lossy.

    Args:
        draft_ids: [num_draft_tokens]
        target_ids: [>= num_draft_tokens], as in `num_accepted`.
        acceptable: [num_draft_tokens], whether the judge finds each draft token right.
    Raises:
        ValueError: the lengths differ.

    >>> num_judged([5, 6, 7], [5, 9, 8], [False, True, False])
    2
    """
    if len(target_ids) < len(draft_ids) or len(acceptable) != len(draft_ids):
        raise ValueError(
            f"{len(draft_ids)} draft tokens but {len(target_ids)} target tokens"
            f" and {len(acceptable)} judgements"
        )
    own = np.array(draft_ids, np.int64) == np.array(target_ids[: len(draft_ids)], np.int64)
    refused = np.flatnonzero(~(own | np.array(acceptable, np.bool_)))
    return int(refused[0]) if refused.size else len(draft_ids)


def first_rollback(target_logprobs: Float, threshold: float) -> int | None:
    """Find where the target overrules the draft, or None to keep the whole draft.

    Rollback policy of BiLD (Kim et al. 2023, arXiv:2302.07863), its distance taken as the
    cross-entropy of a hard draft token: d_m = -log p_target(y_m). The earliest d_m above the
    threshold wins: every later draft token was conditioned on one that is now gone. Lossy.

    Args:
        target_logprobs: [num_draft_tokens], nats. Entry m is the target's log-probability of
            draft token m given the prompt and the draft before m. -inf always rolls back.
        threshold: nats, > 0. Larger trusts the draft more.
    Raises:
        ValueError: not 1-D, NaN or positive entries, or threshold <= 0.

    >>> first_rollback(np.array([-0.1, -7.0, -0.2]), threshold=5.0)
    1
    """
    if target_logprobs.ndim != 1:
        raise ValueError(f"expected [num_draft_tokens], got {target_logprobs.shape}")
    if not np.all(target_logprobs <= 0.0):  # written so that NaN fails too
        raise ValueError("log-probabilities must be <= 0")
    if not threshold > 0.0:
        raise ValueError(f"threshold must be > 0 nats, got {threshold}")
    over = np.flatnonzero((-target_logprobs > threshold) | np.isneginf(target_logprobs))
    return int(over[0]) if over.size else None


def num_tolerated(
    draft_ids: Sequence[int], target_ids: Sequence[int], target_logprobs: Float, threshold: float
) -> int:
    """Count the draft tokens that stand under `bild`: up to the first rollback.

    A draft token that is the target's own has distance 0, however unlikely it is: a rollback would put the
    same token in its place. So a threshold near 0 accepts as `num_accepted`, and a larger one never less.

    Args:
        draft_ids: [num_draft_tokens]
        target_ids: [>= num_draft_tokens], as in `num_accepted`.
        target_logprobs, threshold: as in `first_rollback`.
    Raises:
        ValueError: the lengths differ, or as in `first_rollback`.

    >>> num_tolerated([5, 6, 7], [5, 9, 8], np.array([-9.0, -1.0, -9.0]), threshold=3.0)
    2
    """
    if len(target_ids) < len(draft_ids) or len(target_logprobs) != len(draft_ids):
        raise ValueError(
            f"{len(draft_ids)} draft tokens but {len(target_ids)} target tokens"
            f" and {len(target_logprobs)} log-probabilities"
        )
    agrees = np.array(draft_ids, np.int64) == np.array(target_ids[: len(draft_ids)], np.int64)
    rolled_back_at = first_rollback(np.where(agrees, 0.0, target_logprobs), threshold)
    return len(draft_ids) if rolled_back_at is None else rolled_back_at
