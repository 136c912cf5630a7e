"""Carries messages between the wire and a `CloudSession`; decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from cloud_service.targets.base import GenerateOptions, Target
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.errors import (
    CloudFailed,
    CloudUnavailable,
    DuetError,
    InvalidRequest,
    PromptTooLong,
    UnexpectedMessage,
    outcome,
)
from shared.messages import Finished, FinishReason, Message, Open, Opened, Policy, Tokens, Usage
from shared.policies import DEFAULT_ROLLBACK_THRESHOLD
from shared.sampling import draw
from shared.session import CloudSession

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger("duet.cloud")

_HANG_UP_S = 2.0
"""How long an edge may take to close a stream that is finished."""


@dataclass(eq=False)
class _Stream:
    """One admitted generation."""

    request: Open
    opened: Opened
    session: CloudSession
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the session has a draft, or when the stream must look at its state."""
    began: float = field(default_factory=time.monotonic)
    num_computed_tokens: int = 0

    @property
    def text(self) -> list[int]:
        """Prompt and committed completion."""
        return [*self.opened.prompt_token_ids, *self.session.committed]

    def finished(self) -> Finished:
        reason = self.session.finish_reason
        assert reason is not None
        usage = Usage(
            prompt_tokens=len(self.opened.prompt_token_ids),
            completion_tokens=len(self.session.committed),
            rounds=self.session.num_rounds,
            target_tokens=self.num_computed_tokens,
        )
        return Finished(reason, usage)


class SpeculationServicer(pb2_grpc.SpeculationServiceServicer):
    """The three calls of `duet.v1.SpeculationService` over one target."""

    def __init__(self, target: Target, *, max_draft_tokens: int, lossy_policies: bool = True) -> None:
        """
        Args:
            lossy_policies: whether a stream may ask for one; otherwise it gets `lossless`.
        """
        self._target = target
        self._policies = list(Policy) if lossy_policies else [Policy.LOSSLESS]
        self._max_draft_tokens = max_draft_tokens
        self._streams: set[_Stream] = set()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._draining = False

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def drain(self, seconds: float) -> None:
        """Refuse new streams, give running ones `seconds` to finish, then hand them back to their edges."""
        self._draining = True
        try:
            await asyncio.wait_for(self._all_ended.wait(), seconds)
        except asyncio.TimeoutError:
            log.info("handing back streams", streams=len(self._streams))
            for stream in self._streams:
                if not stream.session.done:
                    stream.session.finish(FinishReason.DRAIN)
                stream.wake.set()
            await self._all_ended.wait()

    async def Speculate(
        self, request_iterator: AsyncIterator[pb2.SpeculateRequest], context: Context
    ) -> AsyncGenerator[pb2.SpeculateResponse, None]:
        try:
            request = await self._first_message(request_iterator)
            with self._admit(request, "speculate", self._granted(request)) as stream:
                async with aclosing(self._speculate(stream, request_iterator)) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:
            await _abort(context, error)

    async def Generate(
        self, request: pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb2.GenerateResponse, None]:
        try:
            # The target's own text: there is nothing to be tolerant of.
            with self._admit(wire.decode_open(request.open), "generate", Policy.LOSSLESS) as stream:
                async with aclosing(self._generate(stream)) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:
            await _abort(context, error)

    async def Describe(self, request: pb2.DescribeRequest, context: Context) -> pb2.DescribeResponse:
        target = self._target
        return pb2.DescribeResponse(
            model=target.name,
            target=target.engine,
            version=version("duet-llm"),
            context_tokens=target.context_tokens,
            max_draft_tokens=self._max_draft_tokens,
            vocabulary_sha256=target.vocabulary.sha256,
            vocabulary=wire.encode_vocabulary(target.vocabulary) if request.include_vocabulary else [],
            end_token_ids=sorted(target.end_token_ids),
            policies=[wire.POLICY[policy] for policy in self._policies],
        )

    def _granted(self, request: Open) -> Policy:
        return request.policy if request.policy in self._policies else Policy.LOSSLESS

    async def _first_message(self, requests: AsyncIterator[pb2.SpeculateRequest]) -> Open:
        async for message in requests:
            if message.WhichOneof("message") != "open":
                raise UnexpectedMessage("the first message of a stream must be Open")
            return wire.decode_open(message.open)
        raise UnexpectedMessage("the stream ended before Open")

    @contextmanager
    def _admit(self, request: Open, kind: str, policy: Policy) -> Iterator[_Stream]:
        """Check a request against the target and keep count of it while it runs."""
        if self._draining:
            raise CloudUnavailable("the service is shutting down; use another replica, or try again later")
        stream = self._open(request, policy)
        self._streams.add(stream)
        self._all_ended.clear()
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            if not self._streams:
                self._all_ended.set()
            reason = stream.session.finish_reason
            log.info(
                "stream ended",
                kind=kind,
                policy=policy.value,
                reason=reason.value if reason else "cancelled",
                prompt_tokens=len(stream.opened.prompt_token_ids),
                completion_tokens=len(stream.session.committed),
                rounds=stream.session.num_rounds,
                seconds=round(time.monotonic() - stream.began, 3),
            )

    def _open(self, request: Open, policy: Policy) -> _Stream:
        target = self._target
        chat = [part for part in request.prompt if isinstance(part, Message)]
        ids = [part for part in request.prompt if isinstance(part, int)]
        prompt = target.render_chat(chat) if chat else ids
        for token in (*ids, *request.committed):
            if token not in target.vocabulary.legal_ids:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {target.name}")
        room = target.context_tokens - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, but {target.name} is served with a context of"
                f" {target.context_tokens}; shorten it, or serve with a larger --context-tokens"
            )
        max_tokens = min(request.max_tokens or room, room)
        rollback_threshold = None
        if policy is Policy.BILD:
            asked = request.rollback_threshold
            rollback_threshold = DEFAULT_ROLLBACK_THRESHOLD if asked is None else asked
        opened = Opened(
            model=target.name,
            prompt_token_ids=tuple(prompt),
            end_token_ids=target.end_token_ids,
            sampling=request.sampling,
            max_tokens=max_tokens,
            max_draft_tokens=self._max_draft_tokens,
            vocabulary_sha256=target.vocabulary.sha256,
            policy=policy,
            rollback_threshold=rollback_threshold,
        )
        session = CloudSession(
            committed=request.committed,
            max_tokens=max_tokens,
            max_draft_tokens=self._max_draft_tokens,
            end_token_ids=target.end_token_ids,
            legal_token_ids=target.vocabulary.legal_ids,
            rollback_threshold=rollback_threshold,
        )
        return _Stream(request, opened, session)

    async def _speculate(
        self, stream: _Stream, requests: AsyncIterator[pb2.SpeculateRequest]
    ) -> AsyncGenerator[pb2.SpeculateResponse, None]:
        session, request = stream.session, stream.request
        yield pb2.SpeculateResponse(opened=wire.encode_opened(stream.opened))
        reader = asyncio.create_task(_read_drafts(stream, requests))
        try:
            async with self._target.sequence(stream.text) as sequence:
                while not session.done:
                    if (round_ := session.next_round()) is None:
                        if reader.done():
                            reader.result()  # raises what the edge did wrong
                            return  # the edge has hung up
                        await stream.wake.wait()
                        stream.wake.clear()
                        continue
                    text = stream.text
                    text += round_.token_ids[: round_.num_positions - 1]  # the last one's row is not read
                    scores = await sequence.score(
                        text,
                        num_rows=round_.num_positions,
                        width=request.sampling.row_width,
                        proposed=round_.token_ids if session.needs_logprobs else None,
                    )
                    stream.num_computed_tokens = sequence.num_computed_tokens
                    targets = draw(scores.rows, request.sampling, request.seed, round_.start).tolist()
                    if session.done:
                        break  # handed back while the target worked
                    verdict = session.judge(round_, targets, scores.timings, logprobs=scores.logprobs)
                    yield pb2.SpeculateResponse(verdict=wire.encode_verdict(verdict))
            yield pb2.SpeculateResponse(finished=wire.encode_finished(stream.finished()))
            # A call that ends while its edge writes a draft loses what the edge has not read: let it hang up.
            await asyncio.wait({reader}, timeout=_HANG_UP_S)
        finally:
            reader.cancel()

    async def _generate(self, stream: _Stream) -> AsyncGenerator[pb2.GenerateResponse, None]:
        session, request = stream.session, stream.request
        yield pb2.GenerateResponse(opened=wire.encode_opened(stream.opened))
        start = len(session.committed)
        options = GenerateOptions(
            sampling=request.sampling,
            seed=request.seed,
            start=start,
            max_tokens=stream.opened.max_tokens - start,
            end_token_ids=self._target.end_token_ids,
        )
        if not session.done:
            async with (
                self._target.sequence(stream.text) as sequence,
                aclosing(sequence.generate(stream.text, options)) as made,
            ):
                async for token_ids in made:
                    if session.done:
                        break  # handed back
                    start = len(session.committed)
                    kept = session.append(token_ids)
                    pieces = tuple(self._target.piece(token) for token in kept)
                    stream.num_computed_tokens = sequence.num_computed_tokens
                    yield pb2.GenerateResponse(tokens=wire.encode_tokens(Tokens(start, kept, pieces)))
        yield pb2.GenerateResponse(finished=wire.encode_finished(stream.finished()))


async def _read_drafts(stream: _Stream, requests: AsyncIterator[pb2.SpeculateRequest]) -> None:
    """Read in a task of its own, so that drafts which arrive during a pass wait together for the next."""
    try:
        async for message in requests:
            if message.WhichOneof("message") != "draft":
                raise UnexpectedMessage("after Open, only drafts may follow")
            stream.session.receive(wire.decode_draft(message.draft))
            stream.wake.set()
    finally:
        stream.wake.set()


async def _abort(context: Context, error: Exception) -> None:
    if not isinstance(error, DuetError):
        log.exception("internal failure")
        error = CloudFailed("the service failed internally; its log says more")
    context.set_trailing_metadata(((wire.ERROR_KIND, type(error).__name__),))
    await context.abort(grpc.StatusCode[outcome(error).grpc_status], str(error))
