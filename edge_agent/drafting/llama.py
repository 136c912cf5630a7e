"""Drafts from a llama.cpp model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import exp

import numpy as np
from numpy.typing import NDArray

from edge_agent.drafting.base import Proposal, Source
from edge_agent.edge_model import EdgeModel
from shared.errors import ModelUnsupported
from shared.llama.shaper import LogitsShaper
from shared.sampling import Rows, Sampling, draw, rows_from_logits
from shared.stopping import Never, StopRule

_NEVER = Never()


class LlamaDrafter:
    """Continues a text with the edge model, by the target's own rule and noise (`sampling.draw`).

    The same noise makes sampled drafts agree with the target more often than independent ones would,
    and makes mode `local` reproducible by its seed.
    """

    def __init__(
        self, edge: EdgeModel, masked_ids: Collection[int] = (), shaper: LogitsShaper | None = None
    ) -> None:
        """
        Args:
            masked_ids: never proposed, because the target has no such token.
            shaper: of a completion that nobody verifies.
        """
        self._shaper = shaper
        self._edge = edge
        self._masked = np.array(sorted(masked_ids), np.int64)

    async def propose(
        self,
        text_ids: Sequence[int],
        num_tokens: int,
        *,
        sampling: Sampling,
        seed: int,
        start: int,
        end_token_ids: Collection[int],
        stop: StopRule = _NEVER,
    ) -> list[Proposal]:
        """See `Drafter.propose`; fewer, too, where the context is full.

        What the KV cache shares with the text is not computed again.

        Raises:
            ModelUnsupported: the model gave a NaN.
        """
        sequence = self._edge.sequence
        num_tokens = min(num_tokens, self._edge.context.context_tokens - len(text_ids))
        if num_tokens > 0:
            await self._edge.read(text_ids[:-1])

        def work() -> list[Proposal]:
            context = self._edge.context
            drafted: list[Proposal] = []
            if num_tokens < 1:
                return drafted
            kept = context.align(sequence, text_ids[:-1])
            pending = list(text_ids[kept:])
            while True:
                logits = context.extend(sequence, pending, 1)
                if self._masked.size:
                    logits[0][self._masked[self._masked < len(logits[0])]] = -np.inf
                if self._shaper is not None:
                    self._shaper.shape(logits[0], [*text_ids, *(p.token_id for p in drafted)])
                rows = self._rows(logits, sampling.row_width)
                token = int(draw(rows, sampling, seed, start + len(drafted))[0])
                prob = _as_prob(rows.logprobs[rows.token_ids == token][0])
                probs = [*(proposal.prob for proposal in drafted), prob]
                if stop.ends_before(probs, _as_prob(rows.logprobs[0, 0])):
                    return drafted
                drafted.append(Proposal(token, prob, Source.MODEL))
                if len(drafted) == num_tokens or token in end_token_ids:
                    return drafted
                pending = [token]

        return await self._edge.run(work)

    def _rows(self, logits: list[NDArray[np.float32]], width: int) -> Rows:
        try:
            return rows_from_logits(logits, width)
        except ValueError as error:
            raise ModelUnsupported(
                f"{self._edge.model.name} does not work here: {error}; choose another --model or --mode cloud"
            ) from None


def _as_prob(logprob: float) -> float:
    """Of a log-probability that rounding may have put just above 0."""
    return min(1.0, exp(logprob))
