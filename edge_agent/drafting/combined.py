"""Copies first, where they are likely to be right; the model otherwise.

A copy costs no pass of any model. It is worth sending where its match is long, or where copies found by
matches of that length were accepted lately.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from edge_agent.drafting.base import Drafter, Proposal, Source
from edge_agent.drafting.copying import NOTHING, Copier, Copy, cut
from shared.sampling import Sampling
from shared.stopping import StopRule

MIN_TRUST = 0.6
"""Probability of acceptance from which a copy is preferred to the model, whose drafts take passes."""
_LONGEST = 8
"""Matches of this length and longer are counted together."""
_PRIOR_WEIGHT = 4.0
"""The belief that a count starts from weighs as much as so many tokens."""
_DECAY = 0.96
"""What a token seen counts after the next one: the last 25 tokens or so decide."""


@dataclass
class Trust:
    """How likely copied tokens are accepted, by who copied and by the length of the match."""

    _counts: dict[tuple[Source, int], tuple[float, float]] = field(default_factory=dict)

    def expects(self, source: Source, match_length: int) -> float:
        """The estimate, in [0, 1]. Before anything is seen: 0.2 for each token of the match, at most 0.9.

        >>> Trust().expects(Source.LOOKUP, 3)
        0.6
        """
        accepted, seen = self._counts.get((source, min(match_length, _LONGEST)), (0.0, 0.0))
        prior = min(0.9, match_length / 5)
        return (accepted + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT)

    def learn(self, source: Source, match_length: int, accepted: bool) -> None:
        key = source, min(match_length, _LONGEST)
        before = self._counts.get(key, (0.0, 0.0))
        self._counts[key] = _DECAY * before[0] + accepted, _DECAY * before[1] + 1.0


@dataclass(frozen=True, slots=True)
class _Sent:
    token_id: int
    source: Source
    match_length: int
    """0 where the model made it."""


class CombinedDrafter:
    """Several copiers and, where there is one, a model. Without a model it copies or proposes nothing."""

    def __init__(
        self,
        copiers: Sequence[tuple[Source, Copier]],
        model: Drafter | None,
        *,
        masked_ids: Collection[int] = (),
        trust: Trust | None = None,
    ) -> None:
        """
        Args:
            copiers: of equally trusted copies the first one's is taken.
            masked_ids: never copied, because the target has no such token.
            trust: what earlier streams taught.
        """
        self._copiers = copiers
        self._model = model
        self._masked = masked_ids
        self._trust = trust or Trust()
        self._sent: dict[int, _Sent] = {}
        """By position in the completion; what is proposed again replaces what was."""

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
        """Up to `num_tokens` from one of the drafters."""
        if num_tokens < 1:
            return []
        source, copy = self._best_copy(text_ids, num_tokens, end_token_ids)
        if copy.token_ids:
            proposals = [Proposal(token, None, source) for token in copy.token_ids]
        elif self._model is not None:
            proposals = await self._model.propose(
                text_ids,
                num_tokens,
                sampling=sampling,
                seed=seed,
                start=start,
                end_token_ids=end_token_ids,
                stop=stop,
            )
        else:
            proposals = []
        for position, proposal in enumerate(proposals, start):
            self._sent[position] = _Sent(proposal.token_id, proposal.source, copy.match_length)
        return proposals

    def verified(self, start: int, token_ids: Sequence[int]) -> list[Source | None]:
        """Learn from what was committed.

        Args:
            start: position in the completion of the first of `token_ids`.
        Returns:
            For each, who proposed it; None where it is the target's own.
        """
        sources: list[Source | None] = []
        for position, token in enumerate(token_ids, start):
            sent = self._sent.pop(position, None)
            if sent is None:
                sources.append(None)
                continue
            right = sent.token_id == token
            sources.append(sent.source if right else None)
            if sent.match_length:
                self._trust.learn(sent.source, sent.match_length, right)
            if not right:
                self._sent.clear()  # all that was drafted on top of it is void
        return sources

    def _best_copy(
        self, text_ids: Sequence[int], num_tokens: int, end_token_ids: Collection[int]
    ) -> tuple[Source, Copy]:
        best, best_trust = (Source.MODEL, NOTHING), MIN_TRUST if self._model else 0.0
        for source, copier in self._copiers:
            found = copier.copy(text_ids, num_tokens)
            token_ids = cut(found.token_ids, end_token_ids=end_token_ids, masked_ids=self._masked)
            trust = self._trust.expects(source, found.match_length)
            # Estimates are sums of floats: what should be equal to the threshold counts as equal.
            if token_ids and trust >= best_trust - 1e-9 and (trust > best_trust or not best[1].token_ids):
                best, best_trust = (source, Copy(token_ids, found.match_length)), trust
        return best
