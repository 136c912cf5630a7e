"""Drafts from a llama.cpp model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.edge_model import EdgeModel
from shared.errors import ModelUnsupported
from shared.sampling import Rows, Sampling, draw, rows_from_logits

_SEQUENCE = 0


class LlamaDrafter:
    """Continues a text with the edge model, by the target's own rule and noise (`sampling.draw`).

    The same noise makes sampled drafts agree with the target more often than independent ones would,
    and makes mode `local` reproducible by its seed.
    """

    def __init__(self, edge: EdgeModel, masked_ids: Collection[int] = ()) -> None:
        """
        Args:
            masked_ids: never proposed, because the target has no such token.
        """
        self._edge = edge
        self._masked = np.array(sorted(masked_ids), np.int64)

    async def draft(
        self,
        text_ids: Sequence[int],
        num_tokens: int,
        *,
        sampling: Sampling,
        seed: int,
        start: int,
        end_token_ids: Collection[int],
        stop_below: float = 0.0,
    ) -> list[int]:
        """`draft_with_logprobs` without the log-probabilities."""
        drafted = await self.draft_with_logprobs(
            text_ids,
            num_tokens,
            sampling=sampling,
            seed=seed,
            start=start,
            end_token_ids=end_token_ids,
            stop_below=stop_below,
        )
        return [token for token, _ in drafted]

    async def draft_with_logprobs(
        self,
        text_ids: Sequence[int],
        num_tokens: int,
        *,
        sampling: Sampling,
        seed: int,
        start: int,
        end_token_ids: Collection[int],
        stop_below: float = 0.0,
    ) -> list[tuple[int, float]]:
        """Propose up to `num_tokens`: fewer after an end of text, or where the context is full.

        Args:
            text_ids: prompt and completion so far; what the KV cache shares with it is not computed again.
            start: completion position of the first proposed token.
            stop_below: probability in [0, 1]; the draft ends where the model's likeliest token has less,
                before any sampling setting; 0 never. Fallback policy of BiLD (Kim et al. 2023,
                arXiv:2302.07863, alpha_FB).
        Returns:
            Each token with its log-probability before any sampling setting, nats.
        Raises:
            ModelUnsupported: the model gave a NaN.
        """
        num_tokens = min(num_tokens, self._edge.context.context_tokens - len(text_ids))

        def work() -> list[tuple[int, float]]:
            context = self._edge.context
            drafted: list[tuple[int, float]] = []
            if num_tokens < 1:
                return drafted
            kept = context.align(_SEQUENCE, text_ids[:-1])
            pending = list(text_ids[kept:])
            while True:
                logits = context.extend(_SEQUENCE, pending, 1)
                if self._masked.size:
                    logits[0][self._masked[self._masked < len(logits[0])]] = -np.inf
                rows = self._rows(logits, sampling.row_width)
                if np.exp(rows.logprobs[0, 0]) < stop_below:
                    return drafted
                token = int(draw(rows, sampling, seed, start + len(drafted))[0])
                drafted.append((token, float(rows.logprobs[rows.token_ids == token][0])))
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
