"""Mode `auto`: the router decides, and late evidence may move a running local answer to speculation.

What an append-only output has shown cannot be taken back. So a local answer that is being watched is
shown `WATCH_TOKENS` behind what is written: when doubt comes, the tokens that caused it are still held.
Those shown stand, as the committed beginning from which the stream opens; those held become its first
draft, of which the target keeps what it agrees with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import exp

from edge_agent import modes
from edge_agent.drafting.base import Proposal, Source
from edge_agent.edge_model import EdgeModel
from edge_agent.guidance import guide
from edge_agent.resume import TargetStreams
from edge_agent.routing.router import Router, moved_by_doubt
from edge_agent.steps import Decided, Drafted, Replaced, Step
from shared.config import EdgeConfig
from shared.errors import CloudError, InvalidRequest, VocabularyMismatch
from shared.events import Notice, Token
from shared.messages import FinishReason, Message, Open
from shared.routing import WATCH_TOKENS, Decision, DoubtWatch, Route


async def auto(
    edge: EdgeModel,
    streams: TargetStreams,
    router: Router,
    request: Open,
    config: EdgeConfig,
    private: str | None,
    question: Sequence[Message],
) -> AsyncGenerator[Step, None]:
    """Decide, then answer on the route. A cloud that cannot be reached makes it local, with a notice.

    Args:
        private: why the prompt must not leave the device, if it must not.
        question: the prompt, or a plain text put as one.
    """
    routing = await router.route(question, private, edge=edge)
    decision = routing.decision
    request = replace(request, predicted_length=decision.predicted_tokens)
    yield Decided(decision)
    if private is None and not routing.link.up:
        yield Notice(f"answered by the edge model alone: {routing.link.detail}")
    if decision.route is not Route.LOCAL:
        steps = with_fallbacks(edge, streams, request, decision)
    elif private is None and routing.link.up and config.doubt_threshold > 0 and edge.can_draft:
        steps = watched(edge, streams, request, config, decision)
    else:
        steps = modes.local(edge, request)
    async with aclosing(steps):
        async for step in steps:
            yield step


async def shaped(
    edge: EdgeModel | None, streams: TargetStreams, request: Open, mode: str, private: str | None
) -> AsyncGenerator[Step, None]:
    """One model writes alone what rows cannot verify: the target or, in mode `auto`, the edge instead."""
    what = ", ".join(request.shaping.asked)
    reason = f"{what}: a draft cannot be verified under it, so one model writes alone"
    if private is None:
        if mode != "cloud":
            yield Replaced("cloud", reason)
        async with aclosing(streams.cloud_alone(request)) as steps:
            try:
                first = await anext(steps)
            except (CloudError, InvalidRequest) as error:
                if mode != "auto":
                    raise
                yield Notice(f"mode local instead: {error}")
                reason = f"{what}: the cloud cannot do it ({error})"
            else:
                yield first
                async for step in steps:
                    yield step
                return
    assert edge is not None, "mode auto has one"
    yield Replaced("local", reason)
    async with aclosing(modes.local(edge, request)) as steps:
        async for step in steps:
            yield step


async def with_fallbacks(
    edge: EdgeModel, streams: TargetStreams, request: Open, decision: Decision
) -> AsyncGenerator[Step, None]:
    """The target's answer; what cannot even begin is replaced by the next best, with a notice."""
    attempts = {
        Route.SPECULATE: lambda: streams.speculate(request, may_stream=True),
        Route.CLOUD: lambda: streams.cloud(request),
        Route.GUIDE: lambda: guide(edge, streams, request),
        Route.LOCAL: lambda: modes.local(edge, request),
    }
    route = decision.route
    while True:
        async with aclosing(attempts[route]()) as steps:
            try:
                first = await anext(steps)
            except CloudError as error:
                other_vocabulary = isinstance(error, VocabularyMismatch)
                route = Route.CLOUD if other_vocabulary else Route.LOCAL
                yield Notice(f"mode {route.value} instead: {error}")
                yield Decided(replace(decision, route=route, reasons=(*decision.reasons, str(error))))
                continue
            yield first
            async for step in steps:
                yield step
        return


async def watched(
    edge: EdgeModel, streams: TargetStreams, request: Open, config: EdgeConfig, decision: Decision
) -> AsyncGenerator[Step, None]:
    """A local answer that moves to `speculate` when the edge becomes unsure of it."""
    watch: DoubtWatch | None = DoubtWatch(config.doubt_threshold)
    held: deque[Token] = deque()
    shown: list[int] = []

    def release(keep: int) -> list[Token]:
        released = [held.popleft() for _ in range(len(held) - keep)]
        shown.extend(token.id for token in released)
        return released

    async with aclosing(modes.local(edge, request)) as steps:
        async for step in steps:
            doubt = False
            if isinstance(step, Token):
                held.append(step)
                doubt = watch is not None and watch.doubts(_logprob(step))
            elif isinstance(step, FinishReason):
                doubt = watch is not None and watch.doubts_at_end()
            else:
                yield step
            if doubt:
                watch = None
                resumed = replace(request, committed=tuple(shown))
                drafted = [Proposal(token.id, _prob(token), Source.MODEL) for token in held]
                stream = streams.speculate(resumed, drafted, may_stream=True)
                async with aclosing(stream):
                    try:
                        opened = await anext(stream)
                    except CloudError as error:
                        yield Notice(f"the edge became unsure, but the cloud cannot help: {error}")
                    else:
                        yield Decided(moved_by_doubt(decision, len(shown)))
                        yield opened
                        async for verified in stream:
                            yield verified
                        return
            if isinstance(step, FinishReason):
                for token in release(keep=0):
                    yield token
                yield step
            else:
                for token in release(keep=WATCH_TOKENS if watch else 0):
                    yield token
                if streams.show_drafts:
                    yield Drafted(tuple(token.piece for token in held))


def _logprob(token: Token) -> float:
    assert token.logprob is not None, "mode local knows its own tokens' probabilities"
    return token.logprob


def _prob(token: Token) -> float:
    return min(1.0, exp(_logprob(token)))
