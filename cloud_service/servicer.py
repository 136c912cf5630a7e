"""Carries messages between the wire and a `CloudSession`; decides nothing.

Every call is somebody's (`Guards`), and is watched: an edge that falls silent, does not read, or takes too
long is cut off, whatever the call waits for at that moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import structlog
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from cloud_service.guards import Guards
from cloud_service.metrics import CloudMetrics
from cloud_service.observing import caller_trace
from cloud_service.security import Caller
from cloud_service.targets.base import GenerateOptions, Target, TargetSequence
from cloud_service.waiting import expected_tokens
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared import tracing
from shared.errors import (
    CloudError,
    CloudFailed,
    CloudUnavailable,
    DuetError,
    InvalidRequest,
    PromptTooLong,
    StreamExpired,
    UnexpectedMessage,
    outcome,
)
from shared.limits import Overdue, Phase, overdue, smallest
from shared.messages import Finished, FinishReason, Open, Opened, Policy, Tokens, Usage, Verdict
from shared.policies import DEFAULT_ROLLBACK_THRESHOLD
from shared.sampling import draw
from shared.session import CloudSession
from shared.shaping import NO_SHAPING

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger("duet.cloud")

Request = TypeVar("Request", pb2.SpeculateRequest, pb2.GenerateRequest, pb2.DescribeRequest)

_HANG_UP_S = 2.0
"""How long an edge may take to close a stream that is finished, or to hear why it was cut off."""
_WATCH_S = 0.25


class _Call:
    """One call, from its first byte to its status."""

    def __init__(self, caller: Caller, context: Context) -> None:
        self.caller = caller
        self.cut_off: Overdue | None = None
        """Why, where it was."""
        self._context = context
        self._began = self._since = time.monotonic()
        self._phase = Phase.EDGE

    def waits_for(self, phase: Phase) -> None:
        self._phase, self._since = phase, time.monotonic()

    async def write(self, message: pb2.SpeculateResponse | pb2.GenerateResponse) -> None:
        self.waits_for(Phase.READER)
        await self._context.write(message)
        self.waits_for(Phase.TARGET)

    def checked(self, message: Request | None) -> Request:
        """A message as it came. Raises InvalidRequest where it was none (`malformed`) or is too large."""
        if message is None:
            raise InvalidRequest("a message that is not of duet.v1, or was damaged on its way")
        most = self.caller.limits.message_bytes
        if most is not None and (size := message.ByteSize()) > most:
            raise InvalidRequest(f"a message of {size} bytes, where {self.caller.name} may send {most}")
        return message

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Cancel the task that runs this call as soon as the call is overdue."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def look() -> None:
            now = time.monotonic()
            self.cut_off = overdue(
                self.caller.limits,
                self._phase,
                in_phase_s=now - self._since,
                in_all_s=now - self._began,
            )
            if self.cut_off is None:
                timers[0] = loop.call_later(_WATCH_S, look)
            else:
                task.cancel()

        timers = [loop.call_later(_WATCH_S, look)]
        try:
            yield
        finally:
            timers[0].cancel()


@dataclass(eq=False)
class _Stream:
    """One admitted generation."""

    call: _Call
    request: Open
    opened: Opened
    session: CloudSession
    expected_tokens: int
    """That it is expected to write in its place."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the session has a draft, or when the stream must look at its state."""
    began: float = field(default_factory=time.monotonic)
    num_computed_tokens: int = 0
    num_before_place: int = 0
    """Committed tokens, when it got its place."""
    gave_way: bool = False
    span: Span = INVALID_SPAN

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

    def __init__(
        self,
        target: Target,
        guards: Guards,
        *,
        max_draft_tokens: int,
        lossy_policies: bool = True,
        log_texts: bool = False,
    ) -> None:
        """
        Args:
            lossy_policies: whether a stream may ask for one; otherwise it gets `lossless`.
            log_texts: whether prompts and answers are logged.
        """
        self.metrics = CloudMetrics(guards)
        self._target = target
        self._guards = guards
        self._log_texts = log_texts
        self._policies = [
            policy
            for policy in Policy
            if policy is Policy.LOSSLESS
            or (lossy_policies and (policy is not Policy.JUDGE or target.judge_head is not None))
        ]
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
    ) -> None:
        async with self._call(context) as call:
            request = await _first_message(call, request_iterator)
            for name in request.shaping.asked:
                raise InvalidRequest(f"{name} cannot be verified from rows; only Generate takes it")
            with self._admit(call, request, "speculate", self._granted(request)) as stream:
                await self._speculate(stream, request_iterator)

    async def Generate(self, request: pb2.GenerateRequest, context: Context) -> None:
        async with self._call(context) as call:
            request = call.checked(request)
            # The target's own text: there is nothing to be tolerant of.
            with self._admit(call, wire.decode_open(request.open), "generate", Policy.LOSSLESS) as stream:
                await self._generate(stream)

    async def Describe(self, request: pb2.DescribeRequest, context: Context) -> pb2.DescribeResponse:
        target = self._target
        async with self._call(context) as call:
            request = call.checked(request)
            limits = call.caller.limits
            return pb2.DescribeResponse(
                model=target.name,
                target=target.engine,
                version=version("duet-llm"),
                context_tokens=smallest(limits.context_tokens, target.context_tokens),
                max_draft_tokens=smallest(limits.max_draft_tokens, self._max_draft_tokens),
                vocabulary_sha256=target.vocabulary.sha256,
                vocabulary=wire.encode_vocabulary(target.vocabulary) if request.include_vocabulary else [],
                end_token_ids=sorted(target.end_token_ids),
                policies=[wire.POLICY[policy] for policy in self._policies],
                verification=target.verification,
                unix_time_ms=int(1e3 * time.time()),
            )

    @asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[_Call]:
        """Find out whose call it is and watch it; what goes wrong becomes its status."""
        call: _Call | None = None
        try:
            call = _Call(
                self._guards.gatekeeper.identify(context.invocation_metadata() or (), context.auth_context()),
                context,
            )
            with call.watched():
                yield call
        except asyncio.CancelledError:
            if call is None or call.cut_off is None:
                raise  # the edge has hung up
            expired = StreamExpired(
                f"{call.cut_off.why}; open it again with what is committed", limit=call.cut_off.limit
            )
            await self._abort(context, expired, call)
        except Exception as error:
            await self._abort(context, error, call)

    def _spend(self, call: _Call, num_tokens: int) -> None:
        self._guards.quotas.spend(call.caller.accounts, num_tokens)
        self.metrics.spent(call.caller.name, num_tokens)

    def _granted(self, request: Open) -> Policy:
        return request.policy if request.policy in self._policies else Policy.LOSSLESS

    @contextmanager
    def _admit(self, call: _Call, request: Open, kind: str, policy: Policy) -> Iterator[_Stream]:
        """Check a request against the target and its tenant's limits, and keep count of it while it runs."""
        if self._draining:
            raise CloudUnavailable("the service is shutting down; use another replica, or try again later")
        with self._guards.stream(call.caller):
            stream = self._open(call, request, kind, policy)
            self._spend(call, len(stream.text))
            with self._counted(stream, kind):
                yield stream

    @contextmanager
    def _counted(self, stream: _Stream, kind: str) -> Iterator[None]:
        self._streams.add(stream)
        self._all_ended.clear()
        try:
            with self._observed(stream, kind):
                yield
        finally:
            self._streams.discard(stream)
            if not self._streams:
                self._all_ended.set()
            reason = stream.session.finish_reason
            log.info(
                "stream ended",
                kind=kind,
                tenant=stream.call.caller.name,
                policy=stream.opened.policy.value,
                reason=reason.value if reason else "cancelled",
                prompt_tokens=len(stream.opened.prompt_token_ids),
                completion_tokens=len(stream.session.committed),
                rounds=stream.session.num_rounds,
                seconds=round(time.monotonic() - stream.began, 3),
                **(self._texts(stream) if self._log_texts else {}),
            )

    @contextmanager
    def _observed(self, stream: _Stream, kind: str) -> Iterator[None]:
        num_began_with = len(stream.text)
        attributes = {"duet.prompt_tokens": len(stream.opened.prompt_token_ids)}
        with (
            self.metrics.stream(kind, stream.call.caller.name),
            tracing.span(
                f"duet.cloud.{kind}", caller_trace.get(), kind=SpanKind.SERVER, attributes=attributes
            ) as span,
        ):
            stream.span = span
            try:
                yield
            finally:
                num_committed = len(stream.text) - num_began_with
                span.set_attribute("duet.committed_tokens", num_committed)
                self.metrics.ended(
                    kind,
                    stream.session.finish_reason,
                    num_began_with=num_began_with,
                    num_committed=num_committed,
                    num_computed=stream.num_computed_tokens,
                )

    def _count(self, stream: _Stream, verdict: Verdict) -> None:
        self.metrics.round(verdict.num_scored, verdict.num_accepted, verdict.timings)
        stream.span.add_event(
            "verdict",
            {
                "duet.start": verdict.start,
                "duet.drafted_tokens": verdict.num_scored,
                "duet.accepted_tokens": verdict.num_accepted,
                "duet.queue_us": verdict.timings.queue_us,
                "duet.verify_us": verdict.timings.verify_us,
            },
        )

    async def _abort(self, context: Context, error: Exception, call: _Call | None) -> None:
        if not isinstance(error, DuetError):
            log.exception("internal failure")
            error = CloudFailed("the service failed internally; its log says more")
        self.metrics.failed(error, call.caller.name if call is not None else None)
        await _end_with(context, error)

    def _texts(self, stream: _Stream) -> dict[str, str]:
        return {
            name: b"".join(map(self._target.piece, ids)).decode("utf-8", "replace")
            for name, ids in (
                ("prompt", stream.opened.prompt_token_ids),
                ("answer", stream.session.committed),
            )
        }

    def _open(self, call: _Call, request: Open, kind: str, policy: Policy) -> _Stream:
        target = self._target
        context_tokens = smallest(call.caller.limits.context_tokens, target.context_tokens)
        max_draft_tokens = smallest(call.caller.limits.max_draft_tokens, self._max_draft_tokens)
        chat, ids = request.messages, request.token_ids
        prompt = target.render_chat(chat) if chat else ids
        for token in (*ids, *request.committed):
            if token not in target.vocabulary.legal_ids:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {target.name}")
        for name in request.shaping.asked:
            if name not in target.shapes:
                raise InvalidRequest(f"{name} is not known to the engine {target.engine} of {target.name}")
        room = context_tokens - len(prompt)
        if room < 1:
            remedy = "or serve with a larger --context-tokens"
            if context_tokens < target.context_tokens:
                remedy = f"or ask the operator for a larger one than {call.caller.name} has"
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, but {target.name} is served with a context of"
                f" {context_tokens}; shorten it, {remedy}"
            )
        max_tokens = min(request.max_tokens or room, room)
        rollback_threshold = None
        if policy is Policy.BILD:
            asked = request.rollback_threshold
            rollback_threshold = DEFAULT_ROLLBACK_THRESHOLD if asked is None else asked
        own_noise = (
            request.any_noise
            and policy is Policy.LOSSLESS  # others judge by rows
            and target.draws(request.sampling, drafts=kind == "speculate")
        )
        opened = Opened(
            model=target.name,
            prompt_token_ids=tuple(prompt),
            end_token_ids=target.end_token_ids,
            sampling=request.sampling,
            shaping=request.shaping,
            max_tokens=max_tokens,
            max_draft_tokens=max_draft_tokens,
            vocabulary_sha256=target.vocabulary.sha256,
            policy=policy,
            rollback_threshold=rollback_threshold,
            own_noise=own_noise,
        )
        session = CloudSession(
            committed=request.committed,
            max_tokens=max_tokens,
            max_draft_tokens=max_draft_tokens,
            end_token_ids=target.end_token_ids,
            legal_token_ids=target.vocabulary.legal_ids,
            policy=policy,
            rollback_threshold=rollback_threshold,
        )
        whole, clamped = expected_tokens(request.predicted_length, max_tokens)
        if clamped:
            self.metrics.clamped()
        return _Stream(call, request, opened, session, max(1, whole - len(request.committed)))

    @asynccontextmanager
    async def _sequence(self, stream: _Stream) -> AsyncIterator[TargetSequence]:
        """A place in the target, in fair turn."""
        caller, opened, expected = stream.call.caller, stream.opened, stream.expected_tokens
        own_draw = opened.sampling if opened.own_noise else None
        async with (
            self._guards.places.place(caller.name, expected, returns=stream.gave_way),
            self._target.sequence(
                stream.text, tenant=caller.tenant, expected_tokens=expected, own_draw=own_draw
            ) as sequence,
        ):
            stream.num_before_place = len(stream.session.committed)
            computed_before = stream.num_computed_tokens
            try:
                yield sequence
            finally:
                stream.num_computed_tokens = computed_before + sequence.num_computed_tokens

    def _gives_way(self, stream: _Stream) -> bool:
        """Take note if a stream that is far longer than predicted must wait for another place.

        It goes on with the same text there: what it had computed is read again, as far as no cache holds it.
        """
        written = len(stream.session.committed) - stream.num_before_place
        # An engine that draws by its own sampler begins anew with its seed.
        if stream.request.shaping != NO_SHAPING or stream.session.done:
            return False
        if not self._guards.places.wants_back(stream.expected_tokens, written):
            return False
        stream.expected_tokens = written  # failure collection: as long again as it was
        stream.gave_way = True
        self.metrics.requeued()
        return True

    async def _speculate(self, stream: _Stream, requests: AsyncIterator[pb2.SpeculateRequest]) -> None:
        session, call = stream.session, stream.call
        await call.write(pb2.SpeculateResponse(opened=wire.encode_opened(stream.opened)))
        reader = asyncio.create_task(_read_drafts(stream, requests))
        try:
            while not session.done:
                async with self._sequence(stream) as sequence:
                    if not await self._rounds(stream, sequence, reader):
                        return
            await call.write(pb2.SpeculateResponse(finished=wire.encode_finished(stream.finished())))
            # A call that ends while its edge writes a draft loses what the edge has not read: let it hang up.
            await asyncio.wait({reader}, timeout=_HANG_UP_S)
        finally:
            reader.cancel()

    async def _rounds(self, stream: _Stream, sequence: TargetSequence, reader: asyncio.Task[None]) -> bool:
        """Verify what comes, until the stream is done or gives way; false where the edge has hung up."""
        session, request, call = stream.session, stream.request, stream.call
        while not session.done:
            if (round_ := session.next_round()) is None:
                if reader.done():
                    reader.result()  # raises what the edge did wrong
                    return False
                call.waits_for(Phase.EDGE)
                await stream.wake.wait()
                stream.wake.clear()
                call.waits_for(Phase.TARGET)
                continue
            self._guards.quotas.check(call.caller.accounts)
            num_judged = len(round_.token_ids) if session.needs_judgements else 0
            # The target reads a token to judge it; otherwise the row behind a last one may be unread.
            num_rows = max(round_.num_positions, num_judged + 1)
            text = stream.text
            text += round_.token_ids[: num_rows - 1]
            scores = await sequence.score(
                text,
                num_rows=num_rows,
                width=request.sampling.row_width,
                proposed=round_.token_ids if session.needs_logprobs else None,
                num_judged=num_judged,
            )
            self._spend(call, num_rows)
            targets = draw(scores.rows, request.sampling, request.seed, round_.start).tolist()
            if session.done:
                break  # handed back while the target worked
            verdict = session.judge(
                round_,
                targets,
                scores.timings,
                logprobs=scores.logprobs,
                acceptable=scores.acceptable,
            )
            verdict = replace(verdict, stream_instead=not sequence.drafts_pay)
            self._count(stream, verdict)
            await call.write(pb2.SpeculateResponse(verdict=wire.encode_verdict(verdict)))
            if self._gives_way(stream):
                break
        return True

    async def _generate(self, stream: _Stream) -> None:
        session, call = stream.session, stream.call
        await call.write(pb2.GenerateResponse(opened=wire.encode_opened(stream.opened)))
        while not session.done:
            async with self._sequence(stream) as sequence:
                await self._write_tokens(stream, sequence)
        await call.write(pb2.GenerateResponse(finished=wire.encode_finished(stream.finished())))

    async def _write_tokens(self, stream: _Stream, sequence: TargetSequence) -> None:
        """Send what the target writes, until the stream is done or gives way."""
        session, request, call = stream.session, stream.request, stream.call
        start = len(session.committed)
        options = GenerateOptions(
            sampling=request.sampling,
            seed=request.seed,
            start=start,
            max_tokens=stream.opened.max_tokens - start,
            end_token_ids=self._target.end_token_ids,
            num_prompt_tokens=len(stream.opened.prompt_token_ids),
            own_noise=stream.opened.own_noise,
            shaping=request.shaping,
        )
        async with aclosing(sequence.generate(stream.text, options)) as made:
            async for token_ids in made:
                if session.done:
                    break  # handed back
                start = len(session.committed)
                kept = session.append(token_ids)
                pieces = tuple(self._target.piece(token) for token in kept)
                await call.write(pb2.GenerateResponse(tokens=wire.encode_tokens(Tokens(start, kept, pieces))))
                self._spend(call, len(kept))
                if not session.done:
                    self._guards.quotas.check(call.caller.accounts)
                if self._gives_way(stream):
                    break


async def _first_message(call: _Call, requests: AsyncIterator[pb2.SpeculateRequest]) -> Open:
    async for message in requests:
        call.waits_for(Phase.TARGET)
        message = call.checked(message)
        if message.WhichOneof("message") != "open":
            raise UnexpectedMessage("the first message of a stream must be Open")
        return wire.decode_open(message.open)
    raise UnexpectedMessage("the stream ended before Open")


async def _read_drafts(stream: _Stream, requests: AsyncIterator[pb2.SpeculateRequest]) -> None:
    """Read in a task of its own, so that drafts which arrive during a pass wait together for the next."""
    try:
        async for message in requests:
            message = stream.call.checked(message)
            if message.WhichOneof("message") != "draft":
                raise UnexpectedMessage("after Open, only drafts may follow")
            stream.session.receive(wire.decode_draft(message.draft))
            stream.wake.set()
    finally:
        stream.wake.set()


async def _end_with(context: Context, error: DuetError) -> None:
    metadata = [(wire.ERROR_KIND, type(error).__name__)]
    if isinstance(error, CloudError) and error.retry_after_s is not None:
        metadata.append((wire.RETRY_AFTER_MS, str(ceil(1e3 * error.retry_after_s))))
    context.set_trailing_metadata(tuple(metadata))
    status = context.abort(grpc.StatusCode[outcome(error).grpc_status], str(error))
    # The status comes after all that the edge has not read yet, and need not be waited for.
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(status, _HANG_UP_S)
