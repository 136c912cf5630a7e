"""How an answer is made, one function a mode: each yields what it commits and ends with the reason."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import takewhile
from math import log

from edge_agent.drafting.drafters import Drafters
from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from shared.errors import PromptTooLong, VocabularyMismatch
from shared.events import Notice, Token
from shared.messages import Finished, FinishReason, Message, Open, Opened, Policy
from shared.routing import Decision
from shared.session import EdgeSession, EdgeState, Origin
from shared.stopping import TopProbBelow


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt is in: comes once, before any token."""

    num_prompt_tokens: int
    cloud_model: str | None
    policy: Policy | None = None
    """In force, in mode `speculate`."""


@dataclass(frozen=True, slots=True)
class Round:
    """What speculation cost so far."""

    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Decided:
    """Mode `auto`: the router's decision, and again where late evidence changed it."""

    decision: Decision


Step = Prompted | Round | Token | FinishReason | Decided | Notice


async def local(edge: EdgeModel, request: Open) -> AsyncGenerator[Step, None]:
    """The edge answers alone."""
    messages = tuple(part for part in request.prompt if isinstance(part, Message))
    prompt = edge.model.render_chat(messages)
    room = edge.context.context_tokens - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, but the edge's context holds"
            f" {edge.context.context_tokens}; shorten it, or set a larger context_tokens in duet.yaml"
        )
    yield Prompted(len(prompt), None)
    drafter = LlamaDrafter(edge)
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
                yield Prompted(len(message.prompt_token_ids), message.model)
            elif isinstance(message, Finished):
                yield message.reason
            else:
                for token, piece in zip(message.token_ids, message.pieces, strict=True):
                    yield Token(token, piece, Origin.CLOUD)


async def speculate(
    drafters: Drafters,
    remote: Cloud,
    request: Open,
    max_draft_tokens: int,
    meter: Meter,
    drafted: Sequence[int] = (),
    *,
    stop_below: float = 0.0,
) -> AsyncGenerator[Step, None]:
    """The edge drafts, the target verifies; under policy `lossless` the text is the target's own.

    Args:
        stop_below: as in `TopProbBelow`; where a draft ends before its first token, the target is asked.
        drafted: tokens that the edge made already, after those committed: they are the first drafts.
    Raises:
        VocabularyMismatch: the edge made tokens that mean something else to the target.
    """
    session = EdgeSession(request.committed)
    session.send_open()
    async with remote.speculate(request, meter) as stream:
        opened = stream.opened
        session.receive_opened(opened)
        drafting = await drafters.for_stream(remote, request, opened)
        if drafted and drafting.translated:
            raise VocabularyMismatch(
                f"what the edge began cannot be handed to {opened.model}, whose vocabulary is another"
            )
        yield Prompted(len(opened.prompt_token_ids), opened.model, opened.policy)
        if opened.policy is not request.policy:
            yield Notice(
                f"the cloud does not verify by policy {request.policy.value}: it is {opened.policy.value} now"
            )
        ahead = list(takewhile(lambda token: token not in drafting.masked_ids, drafted))
        while session.state is not EdgeState.DONE:
            if session.state is EdgeState.DRAFTING:
                text = [*opened.prompt_token_ids, *session.committed]
                room = opened.max_tokens - len(session.committed) - 1  # the target's own token closes a round
                draft = ahead[: min(opened.max_draft_tokens, room)] or [
                    proposal.token_id
                    for proposal in await drafting.drafter.propose(
                        text,
                        min(max_draft_tokens, opened.max_draft_tokens, room),
                        sampling=request.sampling,
                        seed=request.seed,
                        start=len(session.committed),
                        end_token_ids=opened.end_token_ids,
                        stop=TopProbBelow(stop_below),
                    )
                ]
                await stream.send(session.send_draft(draft, more=False))
            message = await stream.receive()
            if isinstance(message, Finished):
                session.receive_finished(message)
                yield message.reason
                continue
            commit = session.receive_verdict(message)
            # What the target goes on from is still worth sending only as far as it agreed.
            agreed = ahead[: len(commit.token_ids)] == list(commit.token_ids)
            ahead = ahead[len(commit.token_ids) :] if agreed else []
            yield Round(message.num_scored, message.num_accepted)
            sources = drafting.drafter.verified(commit.start, commit.token_ids)
            for token, origin, source in zip(commit.token_ids, commit.origins, sources, strict=True):
                proposed_by = source if origin is Origin.ACCEPTED else None
                yield Token(token, drafting.piece(token), origin, source=proposed_by)
