"""What the service asks of an engine: rows for the last positions of a text, and tokens of its own.

A sequence is one stream's place in the engine. Every call names the whole text so far, so that a
target that lost its cache, or never had one, still answers right; a cache only makes it cheap.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from shared.errors import CloudFailed
from shared.judge import Bool, JudgeHead
from shared.messages import Message, Timings
from shared.sampling import Float, Rows, Sampling, check_rows, draw
from shared.shaping import NO_SHAPING, Shaping
from shared.vocab import Vocabulary


@dataclass(frozen=True, slots=True)
class Scores:
    rows: Rows
    timings: Timings
    logprobs: Float
    """[len(proposed)], nats, of the proposed tokens; empty where none were named."""
    acceptable: Bool = field(default_factory=lambda: np.empty(0, np.bool_))
    """[num_judged], what the judge head says of the last tokens of the text."""

    def __post_init__(self) -> None:
        """Raises CloudFailed where the rows are no distribution."""
        try:
            check_rows(self.rows)
        except ValueError as error:
            raise CloudFailed(f"the target failed: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How the target continues a text alone. Tokens are drawn by `sampling.draw`."""

    sampling: Sampling
    seed: int
    start: int
    """Completion position of the first new token."""
    max_tokens: int
    """New tokens at most."""
    end_token_ids: frozenset[int]
    """The stream ends after any of these."""
    num_prompt_tokens: int = 0
    """Of the text; what follows is completion."""
    own_noise: bool = False
    """Tokens may be drawn by noise of the target's own; only where the target `draws` so."""
    shaping: Shaping = NO_SHAPING
    """No more than the target's `shapes`. Where it is something, engines may draw by their own sampler."""


class TargetSequence(Protocol):
    num_computed_tokens: int
    """Tokens that the target evaluated for this stream."""

    @property
    def drafts_pay(self) -> bool:
        """Whether this stream's drafts gain it more than they cost all streams of the target."""
        ...

    async def score(
        self,
        token_ids: Sequence[int],
        *,
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None = None,
        num_judged: int = 0,
    ) -> Scores:
        """Rows for the tokens that would follow each of the last `num_rows` tokens of the text.

        A target that verifies by itself may end them after the first whose token is not the text's own.

        Args:
            token_ids: prompt, committed tokens and draft.
            width: tokens per row.
            proposed: [<= num_rows], a token for each of the first rows, whose log-probability is wanted;
                all but the last row's are in the text. A target that cannot tell one answers -inf. A stream
                names them in all of its calls, if only an empty list, or in none (None).
            num_judged: < num_rows, so many of the text's last tokens are put to the target's `judge_head`; 0
                where it has none.
        """
        ...

    def generate(self, token_ids: Sequence[int], options: GenerateOptions) -> AsyncGenerator[list[int], None]:
        """Continue the text; yields tokens as they are made."""
        ...


class TextSide(Protocol):
    """What a model's tokenizer knows."""

    name: str
    """Name of the model."""
    end_token_ids: frozenset[int]

    @property
    def vocabulary(self) -> Vocabulary: ...

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Apply the model's chat template. Raises InvalidRequest where the template refuses."""
        ...

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token as people see it: none for special tokens."""
        ...


class Target(TextSide, Protocol):
    engine: str
    """Name of the engine, as in --target."""
    verification: str
    """How drafts are verified, in a word; see docs/gpu-server.md."""
    context_tokens: int
    """Prompt and completion of one stream."""
    max_streams: int
    """Sequences that may be held at once."""
    shapes: frozenset[str]
    """Fields of `Shaping` that `generate` honours."""

    @property
    def judge_head(self) -> JudgeHead | None:
        """What judges drafts under policy `judge`; None where there is none, or the engine cannot."""
        ...

    def draws(self, sampling: Sampling, *, drafts: bool) -> bool:
        """Whether noise of the target's own makes sampled tokens cheaper than the noise of a seed does.

        Args:
            drafts: of a stream that sends drafts, or else of one that the target writes alone.
        """
        ...

    def sequence(
        self,
        token_ids: Sequence[int],
        *,
        tenant: str | None = None,
        expected_tokens: int = 0,
        own_draw: Sampling | None = None,
    ) -> AbstractAsyncContextManager[TargetSequence]:
        """A place in the engine for a stream that begins with these tokens; freed on exit, on cancel too.

        Args:
            own_draw: where the target `draws` so, the distribution from which it draws the tokens of `score`
                by itself; each of its rows then may hold that token alone (`settled_rows`).
            tenant: whose stream it is. What is cached for one tenant is never read for another, so that
                neither timings nor counts tell what somebody else has asked. None is a tenant, too.
            expected_tokens: that the stream is expected to write, for an engine that has an order of its own.
        """
        ...

    async def warm_up(self) -> None:
        """Do what the first request should not wait for."""
        ...

    async def failed(self) -> None:
        """Return once the engine can do no more work; wait for ever where that cannot happen."""
        ...

    async def close(self) -> None: ...


async def generate_by_rounds(
    sequence: TargetSequence, token_ids: Sequence[int], options: GenerateOptions
) -> AsyncGenerator[list[int], None]:
    """A round for each token: `TargetSequence.generate` where the engine cannot apply our rule itself."""
    text = list(token_ids)
    for position in range(options.start, options.start + options.max_tokens):
        scores = await sequence.score(text, num_rows=1, width=options.sampling.row_width)
        token = int(draw(scores.rows, options.sampling, options.seed, position)[0])
        yield [token]
        if token in options.end_token_ids:
            return
        text.append(token)


async def stream_then_rounds(
    sequence: TargetSequence,
    made: AsyncGenerator[list[int], None],
    token_ids: Sequence[int],
    options: GenerateOptions,
    has_meaning: Callable[[int], bool],
) -> AsyncGenerator[list[int], None]:
    """An engine's own stream up to a token that stands for nothing, which the engine does not know; then a
    round for each token."""
    text = list(token_ids)
    async with aclosing(made):
        async for new in made:
            known = list(takewhile(has_meaning, new))
            text += known
            if known:
                yield known
            if len(known) < len(new):
                break
        else:
            return
    num_made = len(text) - len(token_ids)
    rest = replace(options, start=options.start + num_made, max_tokens=options.max_tokens - num_made)
    async with aclosing(generate_by_rounds(sequence, text, rest)) as by_rounds:
        async for new in by_rounds:
            yield new


_LEAST_TEMPERATURE = 0.01


def vllm_draws(sampling: Sampling) -> bool:
    """Whether vLLM's own sampler draws tokens from a distribution as `shared.sampling` defines it.

    An engine that speculates applies no min-p, and none takes less than a certain temperature as it is.
    """
    return sampling.temperature >= _LEAST_TEMPERATURE and sampling.min_p == 0.0


def drawn_by_vllm(sampling: Sampling) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams for tokens that it draws by noise of its own."""
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


def shaped_sampling(options: GenerateOptions) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams for a text that its own sampler draws: seeded, but not by our rule."""
    sampling, shaping = options.sampling, options.shaping
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": (options.seed + options.start) % 2**63,
        "presence_penalty": shaping.presence_penalty,
        "frequency_penalty": shaping.frequency_penalty,
        "repetition_penalty": shaping.repetition_penalty,
        "logit_bias": dict(shaping.logit_bias) or None,
    }
