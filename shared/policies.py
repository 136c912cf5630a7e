"""Decisions about drafts: numbers in, decision out. No model, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence


def num_accepted(draft_ids: Sequence[int], target_ids: Sequence[int]) -> int:
    """Count the draft tokens that stand: up to the first that is not the target's token.

    With target tokens drawn as in `sampling.draw` this is exact speculative sampling for a
    one-hot draft (Leviathan et al. 2023, arXiv:2211.17192): a fixed draft token equals the drawn
    one with the target's probability of it, and otherwise the drawn token is the correction.

    Args:
        draft_ids: [num_draft_tokens]
        target_ids: [>= num_draft_tokens]; entry i is the target's token given the draft before i.
    Raises:
        ValueError: fewer target tokens than draft tokens.

    >>> num_accepted([5, 6, 7], [5, 9, 7, 8])
    1
    """
    if len(target_ids) < len(draft_ids):
        raise ValueError(f"{len(draft_ids)} draft tokens but {len(target_ids)} target tokens")
    for i, (drafted, wanted) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if drafted != wanted:
            return i
    return len(draft_ids)
