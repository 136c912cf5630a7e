"""What everything that proposes tokens offers; `edge_agent.speculation` sends what it proposes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from shared.drafts import Proposal, Source
from shared.messages import Open, Opened
from shared.sampling import Sampling
from shared.stopping import StopRule

__all__ = ["Drafter", "Proposal", "Source", "draft_sampling"]


def draft_sampling(request: Open, opened: Opened) -> Sampling:
    """How the edge draws its drafts: as the target draws, by the same noise, where they share it.

    A token drawn by other noise would agree less often than the likeliest does (benchmarks/coupling.py).
    """
    return Sampling() if opened.own_noise else request.sampling


class Drafter(Protocol):
    """Proposes how a text goes on."""

    async def propose(
        self,
        text_ids: Sequence[int],
        num_tokens: int,
        *,
        sampling: Sampling,
        seed: int,
        start: int,
        end_token_ids: Collection[int],
        stop: StopRule,
    ) -> list[Proposal]:
        """Propose up to `num_tokens`: fewer after an end of text, or where `stop` or ignorance says so.

        Args:
            text_ids: prompt and completion so far, unverified tokens included. It may differ from the text
                of the call before anywhere: a drafter keeps what the two have in common.
            start: completion position of the first proposed token.
        Returns:
            Consecutive tokens; an end-of-text token can only be the last. Empty asks for the target's own.
        """
        ...
