"""Mode `speculate`: the edge drafts, the target verifies. Moves messages; `shared.draft_ahead` decides.

Drafting and reading are tasks of their own, so that a verdict is noticed between any two drafted tokens, and
drafting goes on while a verdict travels. At most one proposal is under way at a time: the drafter's KV cache
follows the text that it is given, whatever happened to the one before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import takewhile
from typing import Any

from edge_agent.drafting.base import Proposal, draft_sampling
from edge_agent.drafting.drafters import Drafters, StreamDrafter
from edge_agent.pacing import Pacing
from edge_agent.remote import Cloud, Meter, SpeculateStream
from edge_agent.steps import Drafted, Prompted, Step
from shared.draft_ahead import DraftAhead, Pace, Wanted
from shared.errors import VocabularyMismatch
from shared.events import Notice, Round, Token
from shared.messages import Finished, Open, Opened, Verdict
from shared.session import EdgeSession, EdgeState, Origin


async def speculate(
    drafters: Drafters,
    remote: Cloud,
    request: Open,
    pacing: Pacing,
    meter: Meter,
    drafted: Sequence[Proposal] = (),
    *,
    show_drafts: bool = False,
) -> AsyncGenerator[Step, None]:
    """The edge drafts, the target verifies; under policy `lossless` the text is the target's own.

    Ends without a reason where the pacing leaves for the cloud's own stream.

    Args:
        drafted: what the edge made already, after the committed tokens: the first drafts.
        show_drafts: yield `Drafted` whenever it changes.
    Raises:
        VocabularyMismatch: the edge made tokens that mean something else to the target.
    """
    session = EdgeSession(request.committed)
    session.send_open()
    began = time.monotonic()
    async with drafters.reading(request), remote.speculate(request, meter) as stream:
        opened = stream.opened
        pacing.opened(opened, time.monotonic() - began)
        session.receive_opened(opened)
        drafting = await drafters.for_stream(remote, request, opened)
        if drafted and drafting.translated:
            raise VocabularyMismatch(
                f"what the edge began cannot be handed to {opened.model}, whose vocabulary is another"
            )
        yield Prompted(len(opened.prompt_token_ids), opened.model, opened.policy, opened)
        if opened.policy is not request.policy:
            yield Notice(
                f"the cloud does not verify by policy {request.policy.value}: it is {opened.policy.value} now"
            )
        if (pace := pacing.pace) is None:
            return
        ahead = DraftAhead(session, opened, pace)
        ahead.begin_with(list(takewhile(lambda p: p.token_id not in drafting.masked_ids, drafted)))
        if show_drafts and drafted:
            yield _unverified(ahead, drafting)
        exchange = _exchange(stream, session, ahead, drafting, request, pacing)
        async with aclosing(exchange) as messages:
            async for message in messages:
                if message is None:
                    if show_drafts:
                        yield _unverified(ahead, drafting)
                    continue
                if isinstance(message, Finished):
                    session.receive_finished(message)
                    yield message.reason
                    return
                commit = ahead.receive(message)
                yield Round(message.num_scored, message.num_accepted)
                sources = drafting.drafter.verified(commit.start, commit.token_ids)
                for token, origin, source in zip(commit.token_ids, commit.origins, sources, strict=True):
                    proposed_by = source if origin is Origin.ACCEPTED else None
                    yield Token(token, drafting.piece(token), origin, source=proposed_by)
                if show_drafts:
                    yield _unverified(ahead, drafting)


def _unverified(ahead: DraftAhead, drafting: StreamDrafter) -> Drafted:
    return Drafted(tuple(drafting.piece(proposal.token_id) for proposal in ahead.proposals))


async def _exchange(
    stream: SpeculateStream,
    session: EdgeSession,
    ahead: DraftAhead,
    drafting: StreamDrafter,
    request: Open,
    pacing: Pacing,
) -> AsyncGenerator[Verdict | Finished | None, None]:
    """Draft and send as `ahead` says while the pacing drafts at all, and give what the cloud answers.

    None says that the drafts grew.
    """
    receiving: asyncio.Task[Verdict | Finished] | None = None
    proposing: asyncio.Task[list[Proposal]] | None = None
    wanted: Wanted | None = None
    began = 0.0
    try:
        while (pace := pacing.pace) is not None or session.state is EdgeState.FINISHING:
            ahead.pace = pace or ahead.pace
            alone = not session.num_in_flight
            if (draft := ahead.next_draft()) is not None:
                await stream.send(draft)
                pacing.sent(alone=alone)
                continue
            if proposing is None and (wanted := ahead.wanted(_step(ahead.pace, drafting))) is not None:
                proposing = asyncio.create_task(_propose(drafting, wanted, request, stream.opened))
                began = time.monotonic()
            owed = session.num_in_flight or session.state in (EdgeState.WAITING, EdgeState.FINISHING)
            if receiving is None and owed:
                receiving = asyncio.create_task(stream.receive())
            under_way: list[asyncio.Task[Any]] = [task for task in (receiving, proposing) if task is not None]
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            if proposing is not None and proposing.done():
                assert wanted is not None
                proposals = proposing.result()
                pacing.drafted(len(proposals), time.monotonic() - began)
                ahead.add(wanted, proposals)
                proposing = None
                yield None
            if receiving is not None and receiving.done():
                message = receiving.result()
                receiving = None
                if isinstance(message, Verdict):
                    pacing.judged(message)
                yield message
    finally:
        await end_tasks(receiving, proposing)


def _step(pace: Pace, drafting: StreamDrafter) -> int:
    """Tokens to propose at once: one where a verdict should be noticed between any two."""
    # A translated draft is made as a whole: token by token, the edge would write each word's end twice.
    return 1 if pace.proactive and not drafting.translated else pace.max_draft_tokens


async def _propose(drafting: StreamDrafter, wanted: Wanted, request: Open, opened: Opened) -> list[Proposal]:
    return await drafting.drafter.propose(
        wanted.text_ids,
        wanted.num_tokens,
        sampling=draft_sampling(request, opened),
        seed=request.seed,
        start=wanted.start,
        end_token_ids=opened.end_token_ids,
        stop=wanted.stop,
    )


async def end_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Stop what is under way; its own errors no longer matter."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
