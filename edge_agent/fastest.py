"""The target's own answer by the way that is fastest here and now: its own stream, or drafts.

The controller may change the way in the middle of an answer: one stream is closed, and the next goes on from
what is committed. Under policy `lossless` that changes no token, since each is a function of the target's
distribution, the seed and the position.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from edge_agent.drafting.base import Proposal, draft_sampling
from edge_agent.drafting.drafters import Drafters, StreamDrafter
from edge_agent.pacing import MeasuredPacing
from edge_agent.remote import Cloud, Meter
from edge_agent.speculation import speculate
from edge_agent.speeds import Speeds
from edge_agent.steps import Prompted, Step
from shared.config import EdgeConfig
from shared.controller import Chosen, Way
from shared.events import Token
from shared.messages import Finished, FinishReason, Open, Opened
from shared.session import Origin
from shared.stopping import Never


async def fastest(
    drafters: Drafters,
    remote: Cloud,
    request: Open,
    config: EdgeConfig,
    speeds: Speeds,
    meter: Meter,
    drafted: Sequence[Proposal] = (),
    *,
    may_stream: bool,
    show_drafts: bool = False,
) -> AsyncGenerator[Step, None]:
    """Answer as the controller says, one way after the other.

    Args:
        drafted: what the edge made already, after the committed tokens; of use where drafting comes first.
        may_stream: whether the cloud's own stream is among the ways.
        show_drafts: yield `Drafted` whenever it changes.
    Raises:
        VocabularyMismatch: as `speculate`.
    """
    choices = config.choices(stream=may_stream, fixed=drafters.must_keep_pace)
    with speeds.answer(choices, request.predicted_length) as controller:
        if drafted and not controller.is_warm:
            controller.begin_stream(request.predicted_length, choices.without_stream())
        pacing = MeasuredPacing(controller, config.pace, request, speeds.meet)
        speculating = partial(
            speculate, drafters, remote, pacing=pacing, meter=meter, show_drafts=show_drafts
        )
        committed = list(request.committed)
        prompted: Prompted | None = None
        while True:
            rest = replace(request, committed=tuple(committed))
            chosen: Chosen | None = Chosen(pacing.plan, len(committed))
            if pacing.pace is None:
                steps = _streamed(drafters, remote, rest, pacing, meter)
            else:
                steps = speculating(rest, drafted=drafted)
            drafted = ()
            async with aclosing(steps):
                async for step in steps:
                    if isinstance(step, Prompted):
                        # It is told once, and again only where a stream says more than those before it.
                        step = replace(step, policy=step.policy or (prompted.policy if prompted else None))
                        is_news = prompted is None or step.policy != prompted.policy or step.own_noise
                        prompted = step
                        if is_news:
                            yield step
                    else:
                        yield step
                    if isinstance(step, FinishReason):
                        return
                    if isinstance(step, Token):
                        committed.append(step.id)
                    if chosen is not None:  # only what could begin was chosen
                        yield chosen
                        chosen = None


async def _streamed(
    drafters: Drafters, remote: Cloud, request: Open, pacing: MeasuredPacing, meter: Meter
) -> AsyncGenerator[Step, None]:
    """The cloud's own stream, until it ends or the pacing would rather draft: then without a reason."""
    began = time.monotonic()
    guesses: _Guesses | None = None
    max_tokens, ends = 0, frozenset[int]()
    async with aclosing(remote.generate(request, meter)) as messages:
        try:
            async for message in messages:
                if isinstance(message, Opened):
                    max_tokens, ends = message.max_tokens, message.end_token_ids
                    pacing.opened(message, time.monotonic() - began)
                    yield Prompted(len(message.prompt_token_ids), message.model, opened=message)
                    if drafters.share_vocabulary(message):
                        drafting = await drafters.for_stream(remote, request, message)
                        guesses = _Guesses(drafting, request, message)
                elif isinstance(message, Finished):
                    pacing.streamed(0, last=True)
                    yield message.reason
                else:
                    position = message.start + len(message.token_ids)
                    for token, piece in zip(message.token_ids, message.pieces, strict=True):
                        yield Token(token, piece, Origin.CLOUD)
                    if guesses is not None:
                        guesses.compare(message.token_ids, pacing)
                    pacing.streamed(len(message.token_ids), last=False)
                    whole = position >= max_tokens or bool(ends.intersection(message.token_ids))
                    if pacing.plan.way is not Way.CLOUD and not whole:
                        return
        finally:
            if guesses is not None:
                await guesses.close()


class _Guesses:
    """The edge drafts along with the cloud's stream, one token at a time, where it keeps up.

    So it is known how often drafts are the target's tokens before any is sent.
    """

    def __init__(self, drafting: StreamDrafter, request: Open, opened: Opened) -> None:
        self._drafting = drafting
        self._request = request
        self._opened = opened
        self._committed = list(request.committed)
        self._position = 0
        """Of the guess under way."""
        self._task: asyncio.Task[tuple[list[Proposal], float]] | None = None

    def compare(self, token_ids: Sequence[int], pacing: MeasuredPacing) -> None:
        """Tokens came: look at the guess that is made, and begin another."""
        self._committed += token_ids
        if self._task is not None and self._task.done() and self._position < len(self._committed):
            proposals, seconds = self._task.result()
            self._task = None
            pacing.drafted(len(proposals), seconds)
            if proposals:
                pacing.agreed(proposals[0].token_id == self._committed[self._position])
        if self._task is None and pacing.controller.wants_agreement:
            self._position = len(self._committed)
            self._task = asyncio.create_task(self._guess())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _guess(self) -> tuple[list[Proposal], float]:
        """A proposal of one token, and the seconds that it took."""
        began = time.monotonic()
        proposals = await self._drafting.drafter.propose(
            [*self._opened.prompt_token_ids, *self._committed],
            1,
            sampling=draft_sampling(self._request, self._opened),
            seed=self._request.seed,
            start=self._position,
            end_token_ids=self._opened.end_token_ids,
            stop=Never(),
        )
        return proposals, time.monotonic() - began
