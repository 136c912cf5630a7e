"""The gRPC client: the replicas of a cloud, and the two kinds of stream to them."""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc

from edge_agent.access import Access
from edge_agent.replica import Replica, ReplicaStatus
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from shared.affinity import session_key
from shared.breaker import BreakerState
from shared.config import DEFAULT_DEAD_LINK_S, EdgeConfig
from shared.errors import CloudError, CloudFailed, CloudUnavailable, DuetError
from shared.messages import Draft, Finished, FinishReason, Open, Opened, Tokens, Verdict
from shared.resumption import carries_on, is_resumable
from shared.vocab import Vocabulary

Result = TypeVar("Result")
_OPEN = Access()
_MAX_UNREAD = 64
"""Messages of a stream that are kept for the reader; the link holds back the rest."""


@dataclass(frozen=True, slots=True)
class CloudInfo:
    model: str
    target: str
    context_tokens: int
    vocabulary: Vocabulary
    clock_ahead_s: float | None
    """Its clock minus this one, known to within half a round trip; None where it does not say."""


@dataclass(slots=True)
class Meter:
    """What drafting or streaming costs on the link."""

    num_bytes: int = 0
    """Serialised Drafts, Verdicts and Tokens, without framing and without the prompt."""


class Cloud:
    """One or several `duet-cloud` replicas, connected on first use: any of them can carry any stream on.

    A stream goes to the replica that served the one before; where that fails, to the next that is let
    through by its breaker. What was opened once and then breaks, `edge_agent.resume` opens again.
    """

    def __init__(
        self,
        addresses: str,
        *,
        connect_timeout_s: float,
        silence_timeout_s: float,
        dead_link_s: float = DEFAULT_DEAD_LINK_S,
        access: Access = _OPEN,
    ) -> None:
        """
        Args:
            addresses: HOST:PORT of each replica, separated by commas; the first is asked first.
            silence_timeout_s: without any message for so long, a stream is given up.
            dead_link_s: without any sign of life for so long, a connection is given up.
            access: how to encrypt, and what to prove.
        """
        self.address = addresses
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._replicas = [
            Replica(
                address,
                connect_timeout_s=connect_timeout_s,
                silence_timeout_s=silence_timeout_s,
                dead_link_s=dead_link_s,
                access=access,
                on_change=self._take_note,
            )
            for address in addresses.split(",")
        ]
        """The preferred one first."""
        self._one_answers = asyncio.Event()
        self._pinned: Opened | None = None
        self._metadata_of_answer: tuple[tuple[str, str], ...] = ()
        self._salt = secrets.token_bytes(16)

    async def __aenter__(self) -> Cloud:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in self._replicas:
            await replica.close()

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """How each stands, the preferred one first."""
        return [replica.status for replica in self._replicas]

    def for_answer(self, metadata: tuple[tuple[str, str], ...]) -> Cloud:
        """The same replicas for one answer: it may be pinned, and its calls carry its metadata."""
        view = copy.copy(self)
        view._metadata_of_answer = metadata
        return view

    def pin(self, opened: Opened) -> None:
        """From now on, take only streams that carry on one which was told this."""
        self._pinned = opened

    @classmethod
    def of(cls, settings: EdgeConfig, addresses: str | None = None) -> Cloud:
        """The cloud of some settings, or the one at other addresses. Raises InvalidSetting."""
        return cls(
            addresses or settings.cloud,
            connect_timeout_s=settings.connect_timeout_s,
            silence_timeout_s=settings.verify_timeout_s,
            dead_link_s=settings.dead_link_s,
            access=Access.of(settings),
        )

    async def check(self) -> None:
        """Raises CloudUnavailable where nothing answers."""
        await self._first_that_can(_connected)

    async def back(self) -> None:
        """Return once a replica answers, however long that takes."""
        while True:
            with suppress(CloudError):
                return await self.check()
            until_s = min(status.retry_in_s for status in self.replicas)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._one_answers.wait(), until_s)

    async def ping(self) -> float:
        """Seconds that a small request takes there and back. Raises CloudError where it gets no answer."""

        async def describe(replica: Replica) -> float:
            stub = await replica.connect()
            began = time.monotonic()
            await self._described(replica, stub, pb2.DescribeRequest(), self._connect_timeout_s)
            return time.monotonic() - began

        return await self._first_that_can(describe)

    async def describe(self) -> CloudInfo:
        """What is served, with the whole vocabulary."""

        async def describe(replica: Replica) -> tuple[pb2.DescribeResponse, float]:
            request = pb2.DescribeRequest(include_vocabulary=True)
            stub = await replica.connect()
            before = time.time()
            response = await self._described(replica, stub, request, self._silence_timeout_s)
            return response, (before + time.time()) / 2

        response, now = await self._first_that_can(describe)
        return CloudInfo(
            response.model,
            response.target,
            response.context_tokens,
            wire.decode_vocabulary(response.model, response),
            response.unix_time_ms / 1e3 - now if response.unix_time_ms else None,
        )

    async def generate(self, request: Open, meter: Meter) -> AsyncGenerator[Opened | Tokens | Finished, None]:
        """The target's own answer as it is made. Closing the generator ends the stream."""
        message = pb2.GenerateRequest(open=wire.encode_open(request))

        async def begin(replica: Replica) -> tuple[Replica, Any, int, Opened]:
            stub, connection = await replica.connect(), replica.connection
            call = stub.Generate(message, metadata=self._metadata(replica, request))
            try:
                response = await _read(replica, call, connection)
                if response is grpc.aio.EOF or response.WhichOneof("message") != "opened":
                    raise CloudFailed(f"the cloud at {replica.address} did not open the stream")
                opened = self._checked(replica, wire.decode_opened(response.opened))
                return replica, call, connection, opened
            except BaseException:
                call.cancel()
                raise

        replica, call, connection, opened = await self._first_that_can(begin)
        try:
            yield opened
            while (response := await _read(replica, call, connection)) is not grpc.aio.EOF:
                replica.worked()
                if response.WhichOneof("message") == "tokens":
                    meter.num_bytes += response.ByteSize()
                    yield wire.decode_tokens(response.tokens)
                else:
                    yield _finished(replica, response.finished)
                    return
            raise replica.failed(_ended_early(replica))
        finally:
            call.cancel()

    @asynccontextmanager
    async def speculate(self, request: Open, meter: Meter) -> AsyncIterator[SpeculateStream]:
        """Open a stream for drafts; leaving the context ends it."""

        async def begin(replica: Replica) -> SpeculateStream:
            call = (await replica.connect()).Speculate(metadata=self._metadata(replica, request))
            stream = SpeculateStream(replica, call, meter)
            try:
                await stream.open(request)
                self._checked(replica, stream.opened)
            except BaseException:
                await stream.close()
                raise
            return stream

        stream = await self._first_that_can(begin)
        try:
            yield stream
        finally:
            await stream.close()

    async def _first_that_can(self, work: Callable[[Replica], Awaitable[Result]]) -> Result:
        """Do it with the first replica that can; raises what the last one said."""
        error: DuetError = CloudUnavailable(
            self.replicas[0].last_error or f"the cloud at {self.address} is away"
        )
        for replica in list(self._replicas):
            if not replica.breaker.admits(time.monotonic()):
                continue
            try:
                return await work(replica)
            except DuetError as failure:
                if not is_resumable(failure):
                    raise
                error = failure
        raise error

    def _metadata(self, replica: Replica, request: Open) -> tuple[tuple[str, str], ...]:
        session = session_key(request.prompt, self._salt, replica.num_failures)
        return ((wire.SESSION, session), *self._metadata_of_answer, *replica.metadata)

    async def _described(
        self, replica: Replica, stub: Any, request: pb2.DescribeRequest, timeout_s: float
    ) -> pb2.DescribeResponse:
        try:
            response: pb2.DescribeResponse = await stub.Describe(
                request, timeout=timeout_s, metadata=replica.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise replica.translate(error) from None
        return response

    def _checked(self, replica: Replica, opened: Opened) -> Opened:
        if self._pinned is not None and not carries_on(self._pinned, opened):
            raise CloudFailed(
                f"the cloud at {replica.address} would not write the same text: it serves {opened.model} with"
                f" {opened.max_tokens} tokens at most, and the answer was begun by {self._pinned.model}"
                f" with {self._pinned.max_tokens}"
            )
        return opened

    def _take_note(self, changed: Replica) -> None:
        """Prefer a replica that answers, and wake who waits for one."""
        if changed.breaker.state is BreakerState.OPEN:
            self._replicas.remove(changed)
            self._replicas.append(changed)
        if any(replica.breaker.state is BreakerState.CLOSED for replica in self._replicas):
            self._one_answers.set()
        else:
            self._one_answers.clear()


async def _connected(replica: Replica) -> None:
    await replica.connect()


async def _read(replica: Replica, call: Any, connection: int) -> Any:
    try:
        return await replica.unless_silent(call.read())
    except grpc.aio.AioRpcError as error:
        raise replica.translate(error) from None
    except asyncio.CancelledError:
        if _only_the_call_is_cancelled(replica, connection):
            raise replica.failed(_ended_early(replica)) from None
        raise


def _only_the_call_is_cancelled(replica: Replica, connection: int) -> bool:
    """Another stream gave up the call's connection; gRPC says so as if whoever reads were cancelled."""
    task = asyncio.current_task()
    # Python 3.10 cannot tell.
    itself = task is not None and hasattr(task, "cancelling") and task.cancelling() > 0
    return replica.connection != connection and not itself


def _ended_early(replica: Replica) -> CloudUnavailable:
    return CloudUnavailable(f"the cloud at {replica.address} ended the stream early")


def _finished(replica: Replica, message: pb2.Finished) -> Finished:
    """A service that drains takes no other stream: the next one goes elsewhere."""
    finished = wire.decode_finished(message)
    if finished.reason is FinishReason.DRAIN:
        replica.failed(CloudUnavailable(f"the cloud at {replica.address} is leaving"))
    return finished


class SpeculateStream:
    """A `Speculate` call. A task of its own reads, so that no failed write loses what the service sent."""

    opened: Opened

    def __init__(self, replica: Replica, call: Any, meter: Meter) -> None:
        self._replica = replica
        self._connection = replica.connection
        self._call = call
        self._meter = meter
        self._ending = _Ending(call)
        self._arrived: asyncio.Queue[pb2.SpeculateResponse | DuetError] = asyncio.Queue(_MAX_UNREAD)
        self._reading = asyncio.create_task(self._read())

    async def open(self, request: Open) -> None:
        await self._write(pb2.SpeculateRequest(open=wire.encode_open(request)))
        response = await self._next()
        if response.WhichOneof("message") != "opened":
            raise CloudFailed(f"the cloud at {self._replica.address} did not open the stream")
        self.opened = wire.decode_opened(response.opened)

    async def send(self, draft: Draft) -> None:
        """Send a draft. A stream that has ended takes it without a word: `receive` says why it ended."""
        message = pb2.SpeculateRequest(draft=wire.encode_draft(draft))
        self._meter.num_bytes += message.ByteSize()
        await self._write(message)

    async def receive(self) -> Verdict | Finished:
        response = await self._next()
        self._replica.worked()
        if response.WhichOneof("message") == "finished":
            return _finished(self._replica, response.finished)
        self._meter.num_bytes += response.ByteSize()
        return wire.decode_verdict(response.verdict)

    async def close(self) -> None:
        # Not the task: a read that is cancelled leaks memory in gRPC; that of a cancelled call just ends.
        self._call.cancel()
        while not self._arrived.empty():
            self._arrived.get_nowait()  # the task may wait for room
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _next(self) -> pb2.SpeculateResponse:
        arrived = await self._replica.unless_silent(self._arrived.get())
        if isinstance(arrived, DuetError):
            raise arrived
        return arrived

    async def _read(self) -> None:
        # By `close`. Kept by the task, the traceback would hold the stream, and so its connection.
        with suppress(asyncio.CancelledError):
            await self._arrived.put(await self._read_to_the_end())

    async def _read_to_the_end(self) -> DuetError:
        """Queue what arrives; returns how it ended."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                await self._arrived.put(response)
            return self._replica.failed(_ended_early(self._replica))
        except grpc.aio.AioRpcError as error:
            return self._replica.translate(self._ending.error or error)
        except asyncio.CancelledError:
            if _only_the_call_is_cancelled(self._replica, self._connection):
                return self._replica.failed(_ended_early(self._replica))
            raise

    async def _write(self, message: pb2.SpeculateRequest) -> None:
        # The call may have ended: reading says why.
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            try:
                await self._replica.unless_silent(self._call.write(message))
            except asyncio.CancelledError:
                if not _only_the_call_is_cancelled(self._replica, self._connection):
                    raise


class _Ending:
    """How the service ended a call.

    Where a write meets a call that has just ended, grpc.aio puts an INTERNAL of its own in
    place of the status that the service sent. Callbacks run in the moment a status is set, so they see both.
    """

    def __init__(self, call: Any) -> None:
        self.error: grpc.aio.AioRpcError | None = None
        # Given itself, a call would hold itself, and its connection, until the garbage collector comes by.
        type(call).add_done_callback(weakref.proxy(call), self._note)

    def _note(self, call: Any) -> None:
        try:
            code, details = _at_once(call.code()), _at_once(call.details())
        except ReferenceError:  # nobody holds it any more, or asks
            return
        if code is not grpc.StatusCode.OK and details != "Internal error from Core":
            self.error = grpc.aio.AioRpcError(
                code, grpc.aio.Metadata(), _at_once(call.trailing_metadata()), details
            )


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for, as a call's questions do once it is done."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the call is not done")
