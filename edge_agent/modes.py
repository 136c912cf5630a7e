"""Modes in which one model makes the answer alone: each yields what it commits and ends with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from math import log

from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from edge_agent.steps import Prompted, Step
from shared.errors import CloudFailed, PromptTooLong
from shared.events import Token
from shared.llama.shaper import LogitsShaper
from shared.messages import Finished, FinishReason, Message, Open, Opened
from shared.session import Origin
from shared.shaping import NO_SHAPING


async def local(edge: EdgeModel, request: Open) -> AsyncGenerator[Step, None]:
    """The edge answers alone."""
    messages = tuple(part for part in request.prompt if isinstance(part, Message))
    ids = [part for part in request.prompt if isinstance(part, int)]
    prompt = await asyncio.to_thread(edge.model.render_chat, messages) if messages else ids
    room = edge.context.context_tokens - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, but the edge's context holds"
            f" {edge.context.context_tokens}; shorten it, or set a larger context_tokens in duet.yaml"
        )
    yield Prompted(len(prompt), None)
    shaping = request.shaping
    shaper = None if shaping == NO_SHAPING else LogitsShaper(edge.model, shaping, len(prompt))
    drafter = LlamaDrafter(edge, shaper=shaper)
    ends = edge.model.end_token_ids
    text = list(prompt)
    for position in range(min(request.max_tokens or room, room)):
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
