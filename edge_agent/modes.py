"""Modes in which one model makes the answer alone: each yields what it commits and ends with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from math import log

from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from edge_agent.steps import Prompted, Step
from shared.errors import CloudFailed, PromptTooLong
from shared.events import Token
from shared.llama.shaper import LogitsShaper
from shared.messages import Finished, FinishReason, Open, Opened
from shared.session import Origin
from shared.shaping import NO_SHAPING


async def local(edge: EdgeModel, request: Open) -> AsyncGenerator[Step, None]:
    """The edge answers alone."""
    prompt = await edge_prompt(edge, request)
    yield Prompted(len(prompt), None)
    async with aclosing(written_on(edge, request, prompt)) as steps:
        async for step in steps:
            yield step


async def edge_prompt(edge: EdgeModel, request: Open) -> list[int]:
    """The prompt in the edge model's own chat template and tokens.

    Raises:
        PromptTooLong: it leaves no room for an answer.
    """
    prompt = await asyncio.to_thread(edge.prompt_ids, request.prompt)
    if len(prompt) >= edge.context.context_tokens:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, but the edge's context holds"
            f" {edge.context.context_tokens}; shorten it, or set a larger context_tokens in duet.yaml"
        )
    return prompt


async def written_on(
    edge: EdgeModel, request: Open, prompt: Sequence[int], begun: Sequence[int] = (), *, start: int = 0
) -> AsyncGenerator[Step, None]:
    """The edge writes an answer, or goes on with one, until it ends or its limit or context is reached.

    Args:
        begun: the answer so far, in the edge's tokens.
        start: tokens of the limit that it has cost.
    """
    shaping = request.shaping
    shaper = None if shaping == NO_SHAPING else LogitsShaper(edge.model, shaping, len(prompt))
    drafter = LlamaDrafter(edge, shaper=shaper)
    ends = edge.model.end_token_ids
    text = [*prompt, *begun]
    room = start + max(0, edge.context.context_tokens - len(text))
    for position in range(start, min(request.max_tokens or room, room)):
        [proposal] = await drafter.propose(
            text, 1, sampling=request.sampling, seed=request.seed, start=position, end_token_ids=ends
        )
        assert proposal.prob is not None, "a model knows its own tokens' probabilities"
        token = proposal.token_id
        text.append(token)
        yield Token(token, edge.model.piece(token), Origin.LOCAL, log(proposal.prob))
        if token in ends:
            yield FinishReason.STOP
            return
    yield FinishReason.LENGTH


async def cloud(remote: Cloud, request: Open, meter: Meter) -> AsyncGenerator[Step, None]:
    """The target answers alone; the edge only shows."""
    async with aclosing(remote.generate(request, meter)) as messages:
        async for message in messages:
            if isinstance(message, Opened):
                if message.shaping != request.shaping:
                    raise CloudFailed(
                        f"{message.model} is served by a version that cannot honour"
                        f" {', '.join(request.shaping.asked)}; update the service"
                    )
                yield Prompted(len(message.prompt_token_ids), message.model, opened=message)
            elif isinstance(message, Finished):
                yield message.reason
            else:
                for token, piece in zip(message.token_ids, message.pieces, strict=True):
                    yield Token(token, piece, Origin.CLOUD)
