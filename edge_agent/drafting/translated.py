"""Drafts from a model of another vocabulary, carried over as text.

Two models that tokenise differently still write the same bytes. The edge reads the answer so far, committed
and drafted, as text in its own tokens, goes on, and what it wrote is split into the target's tokens. Those
are what the target verifies, so the answer stays the target's own whatever is lost on the way: string-level
exact match (Timor et al. 2025, arXiv:2502.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from edge_agent.drafting.base import Drafter, Proposal
from shared.byte_tokens import ByteTokenizer, valid_runs
from shared.sampling import Sampling
from shared.stopping import StopRule
from shared.vocab import TokenKind, Vocabulary


def tokens_of(text: bytes, by_bytes: ByteTokenizer, tokenize: Callable[[str], list[int]]) -> list[int]:
    """Tokens of the same bytes, be they whole characters or not.

    Args:
        by_bytes: of the same vocabulary as `tokenize`, which takes whole characters only.
    """
    token_ids: list[int] = []
    for run in valid_runs(text):
        token_ids += tokenize(run) if isinstance(run, str) else by_bytes.encode(run)
    return token_ids


class Translation:
    """Between the tokens of two vocabularies, by their bytes; pure, but for the tokenizer it is given."""

    def __init__(self, edge: Vocabulary, target: Vocabulary, tokenize: Callable[[str], list[int]]) -> None:
        """
        Args:
            tokenize: the edge model's own, which takes nothing in a text for a special token.
        """
        self._edge, self._target = edge, target
        self._edge_bytes, self._target_bytes = ByteTokenizer(edge), ByteTokenizer(target)
        self._tokenize = tokenize

    def to_edge(self, target_ids: Sequence[int]) -> list[int]:
        """The edge's tokens for a text in the target's: the same bytes, half a character at its end too."""
        return tokens_of(self._target_bytes.decode(target_ids), self._edge_bytes, self._tokenize)

    def to_target(
        self, drafted: Sequence[Proposal], num_tokens: int, *, look_ahead: bool, ends: dict[int, int]
    ) -> list[Proposal]:
        """The target's tokens for what the edge wrote.

        Args:
            look_ahead: the last of `drafted` only tells where the word before it ends, which a tokenizer
                needs to know; no token reaches into it.
            ends: the edge's ends of text and what stands for them at the target.
        Returns:
            At most `num_tokens`. Each has the joint probability of the edge's tokens that begin within it.
        """
        text, begins, end = b"", [], None
        for proposal in drafted:
            if self._edge.kinds[proposal.token_id] is not TokenKind.TEXT:
                end = proposal
                break
            begins.append((len(text), proposal.prob))
            text += self._edge.pieces[proposal.token_id]
        limit = begins[-1][0] if look_ahead and end is None and begins else len(text)
        translated: list[Proposal] = []
        position = 0
        for token in self._target_bytes.encode(text):
            after = position + len(self._target.pieces[token])
            if after > limit or len(translated) == num_tokens:
                return translated
            probs = [prob for at, prob in begins if position <= at < after]
            translated.append(Proposal(token, _joint(probs), drafted[0].source))
            position = after
        # Only a text that was carried over whole may end.
        if (
            end is not None
            and end.token_id in ends
            and position == len(text)
            and len(translated) < num_tokens
        ):
            translated.append(replace(end, token_id=ends[end.token_id]))
        return translated

    def ends(self, edge_ends: Collection[int], target_ends: Collection[int]) -> dict[int, int]:
        """For each end of text at the edge the target's: of the same name, or the only one there is."""
        only = next(iter(target_ends)) if len(target_ends) == 1 else None
        by_name = {self._target.pieces[t]: t for t in target_ends}
        named = {e: by_name.get(self._edge.pieces[e], only) for e in edge_ends}
        return {e: t for e, t in named.items() if t is not None}


def _joint(probs: Sequence[float | None]) -> float | None:
    joint = 1.0
    for prob in probs:
        if prob is None:
            return None
        joint *= prob
    return joint


class TranslatedDrafter:
    """A drafter of the edge's vocabulary as one of the target's."""

    def __init__(
        self,
        inner: Drafter,
        translation: Translation,
        *,
        edge_prompt_ids: Sequence[int],
        edge_end_token_ids: Collection[int],
        num_prompt_tokens: int,
    ) -> None:
        """
        Args:
            edge_prompt_ids: the prompt in the edge's own chat template and tokens.
            num_prompt_tokens: the prompt's length in the target's tokens, which every text begins with.
        """
        self._inner = inner
        self._translation = translation
        self._edge_prompt_ids = list(edge_prompt_ids)
        self._edge_end_token_ids = edge_end_token_ids
        self._num_prompt_tokens = num_prompt_tokens

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
        """Draft up to `num_tokens` of the target's tokens.

        The edge drafts greedily whatever the sampling: its noise, a function of token ids, would not be the
        target's, and its likeliest token is accepted more often than an unrelated draw.
        """
        if num_tokens < 1:
            return []
        drafted = await self._inner.propose(
            [*self._edge_prompt_ids, *self._translation.to_edge(text_ids[self._num_prompt_tokens :])],
            num_tokens + 1,
            sampling=Sampling(),
            seed=seed,
            start=start,
            end_token_ids=self._edge_end_token_ids,
            stop=stop,
        )
        return self._translation.to_target(
            drafted,
            num_tokens,
            look_ahead=len(drafted) > num_tokens,
            ends=self._translation.ends(self._edge_end_token_ids, end_token_ids),
        )
