"""How far a draft agrees with its target, from what both say at each position of the target's texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Agreement:
    """At each position of some sequences, where both have read the same text before it."""

    agrees: NDArray[np.bool_]
    """[sequences, positions]: the draft's likeliest token is the target's."""
    top_prob: NDArray[np.float32]
    """[sequences, positions]: how likely the draft finds its likeliest token."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of greedy drafts along the texts, as Kangaroo reports it (arXiv:2404.18911, sections 3.2 and 4)."""

    by_position: tuple[float, ...]
    """Share of the drafts' j-th tokens, among those proposed, that are accepted with all before them."""
    compression_rate: float
    """Tokens committed for each pass of the target, its own one among them."""
    mean_draft_tokens: float
    """Tokens drafted for each pass."""

    def speed_up(self, cost: float) -> float:
        """Over decoding with the target alone, if a pass costs a token's time whatever it verifies.

        Args:
            cost: time of a draft token, as a share of the target's.
        """
        return self.compression_rate / (1 + cost * self.mean_draft_tokens)


def acceptance(agreement: Agreement, max_draft_tokens: int, threshold: float) -> Acceptance:
    """Draft along each sequence: up to the cap, or until a token is less likely than the threshold.

    The unlikely token ends the draft and is not sent, as in Kangaroo's second early exit. A round commits
    what is accepted and the target's own next token.

    Args:
        threshold: of the top probability, 0 to 1; 0 never stops a draft.
    """
    proposed, accepted = np.zeros(max_draft_tokens), np.zeros(max_draft_tokens)
    num_passes = num_committed = num_drafted = 0
    for agrees, top_prob in zip(agreement.agrees, agreement.top_prob, strict=True):
        start = 0
        # A draft that the text's end cuts short says nothing of its length.
        while start + max_draft_tokens <= len(agrees):
            sure = top_prob[start : start + max_draft_tokens] >= threshold
            length = max_draft_tokens if sure.all() else int(sure.argmin())
            right = agrees[start : start + length]
            num_right = length if right.all() else int(right.argmin())
            proposed[:length] += 1
            accepted[:num_right] += 1
            # The token that fell below the threshold was computed all the same.
            num_drafted += min(length + 1, max_draft_tokens)
            num_passes += 1
            num_committed += num_right + 1
            start += num_right + 1
    shares = accepted / np.maximum(proposed, 1)
    return Acceptance(
        tuple(float(share) for share in shares), num_committed / num_passes, num_drafted / num_passes
    )
