"""The gRPC client: a channel, its two streams, and errors as `shared.errors`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc

from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.errors import CloudFailed, CloudUnavailable, DuetError, VerifyTimeout, from_status
from shared.messages import Draft, Finished, Open, Opened, Tokens, Verdict
from shared.vocab import Vocabulary

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CloudInfo:
    model: str
    target: str
    context_tokens: int
    vocabulary: Vocabulary


@dataclass(slots=True)
class Meter:
    """What drafting or streaming costs on the link."""

    num_bytes: int = 0
    """Serialised Drafts, Verdicts and Tokens, without framing and without the prompt."""


class Cloud:
    """A connection to one `duet-cloud` service, made on first use."""

    def __init__(self, address: str, *, connect_timeout_s: float, silence_timeout_s: float) -> None:
        """
        Args:
            silence_timeout_s: without any message for so long, a stream is given up.
        """
        self.address = address
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Cloud:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def check(self) -> None:
        """Raises CloudUnavailable where nothing answers."""
        await self._connect()

    async def ping(self) -> float:
        """Seconds that a small request takes there and back. Raises CloudError where it gets no answer."""
        stub = await self._connect()
        began = time.monotonic()
        try:
            await stub.Describe(pb2.DescribeRequest(), timeout=self._connect_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None
        return time.monotonic() - began

    async def describe(self) -> CloudInfo:
        """What is served, with the whole vocabulary."""
        stub = await self._connect()
        try:
            response = await stub.Describe(
                pb2.DescribeRequest(include_vocabulary=True), timeout=self._silence_timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None
        return CloudInfo(
            response.model,
            response.target,
            response.context_tokens,
            wire.decode_vocabulary(response.model, response),
        )

    async def generate(self, request: Open, meter: Meter) -> AsyncGenerator[Opened | Tokens | Finished, None]:
        """The target's own answer as it is made. Closing the generator ends the stream."""
        stub = await self._connect()
        call = stub.Generate(pb2.GenerateRequest(open=wire.encode_open(request)))
        try:
            while (response := await self._read(call)) is not grpc.aio.EOF:
                kind = response.WhichOneof("message")
                if kind == "opened":
                    yield wire.decode_opened(response.opened)
                elif kind == "tokens":
                    meter.num_bytes += response.ByteSize()
                    yield wire.decode_tokens(response.tokens)
                elif kind == "finished":
                    yield wire.decode_finished(response.finished)
        finally:
            call.cancel()

    @asynccontextmanager
    async def speculate(self, request: Open, meter: Meter) -> AsyncIterator[SpeculateStream]:
        """Open a stream for drafts; leaving the context ends it."""
        stub = await self._connect()
        stream = SpeculateStream(self, stub.Speculate(), meter)
        try:
            await stream.open(request)
            yield stream
        finally:
            await stream.close()

    async def _connect(self) -> pb2_grpc.SpeculationServiceStub:
        """Connect once; a refused or silent address is an error at once, not a retry for minutes."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(
                self.address,
                options=[("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES)],
            )
        try:
            await asyncio.wait_for(self._ready(self._channel), self._connect_timeout_s)
        except asyncio.TimeoutError:
            raise self._unavailable(f"gave no answer within {self._connect_timeout_s:g} s") from None
        return pb2_grpc.SpeculationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def _ready(self, channel: grpc.aio.Channel) -> None:
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise self._unavailable("refuses connections")
            await channel.wait_for_state_change(state)

    def _unavailable(self, what: str) -> CloudUnavailable:
        return CloudUnavailable(
            f"the cloud at {self.address} {what}; start one with `duet-cloud serve`,"
            " name another with --cloud HOST:PORT, or answer here with --mode local"
        )

    async def _read(self, call: Any) -> Any:
        try:
            return await self._unless_silent(call.read())
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None

    async def _unless_silent(self, answer: Awaitable[Result]) -> Result:
        try:
            return await asyncio.wait_for(answer, self._silence_timeout_s)
        except asyncio.TimeoutError:
            raise VerifyTimeout(
                f"the cloud at {self.address} was silent for {self._silence_timeout_s:g} s"
            ) from None

    def _translate(self, error: grpc.aio.AioRpcError) -> DuetError:
        metadata = error.trailing_metadata()
        kind = dict(metadata).get(wire.ERROR_KIND) if metadata else None
        name = error.code().name
        if kind is None and name == "UNAVAILABLE":
            return self._unavailable("went away")
        return from_status(name, error.details() or name, str(kind) if kind else None)


class SpeculateStream:
    """A `Speculate` call. A task of its own reads, so that no failed write loses what the service sent."""

    opened: Opened

    def __init__(self, cloud: Cloud, call: Any, meter: Meter) -> None:
        self._cloud = cloud
        self._call = call
        self._meter = meter
        self._ending = _Ending(call)
        self._arrived: asyncio.Queue[pb2.SpeculateResponse | DuetError] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())

    async def open(self, request: Open) -> None:
        await self._write(pb2.SpeculateRequest(open=wire.encode_open(request)))
        response = await self._next()
        if response.WhichOneof("message") != "opened":
            raise CloudFailed(f"the cloud at {self._cloud.address} did not open the stream")
        self.opened = wire.decode_opened(response.opened)

    async def send(self, draft: Draft) -> None:
        """Send a draft. A stream that has ended takes it without a word: `receive` says why it ended."""
        message = pb2.SpeculateRequest(draft=wire.encode_draft(draft))
        self._meter.num_bytes += message.ByteSize()
        await self._write(message)

    async def receive(self) -> Verdict | Finished:
        response = await self._next()
        if response.WhichOneof("message") == "finished":
            return wire.decode_finished(response.finished)
        self._meter.num_bytes += response.ByteSize()
        return wire.decode_verdict(response.verdict)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._call.cancel()

    async def _next(self) -> pb2.SpeculateResponse:
        arrived = await self._cloud._unless_silent(self._arrived.get())
        if isinstance(arrived, DuetError):
            raise arrived
        return arrived

    async def _read(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._arrived.put_nowait(response)
            end: DuetError = CloudUnavailable(f"the cloud at {self._cloud.address} ended the stream early")
        except grpc.aio.AioRpcError as error:
            end = self._cloud._translate(self._ending.error or error)
        self._arrived.put_nowait(end)

    async def _write(self, message: pb2.SpeculateRequest) -> None:
        # The call may have ended: reading says why.
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._cloud._unless_silent(self._call.write(message))


class _Ending:
    """How the service ended a call.

    Where a write meets a call that has just ended, grpc.aio puts an INTERNAL of its own in
    place of the status that the service sent. Callbacks run in the moment a status is set, so they see both.
    """

    def __init__(self, call: Any) -> None:
        self.error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        code, details = _at_once(call.code()), _at_once(call.details())
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
