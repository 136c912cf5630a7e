"""The gRPC client: a channel, its two streams, and errors as `shared.errors`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.errors import CloudFailed, CloudUnavailable, DuetError, VerifyTimeout, from_status
from shared.messages import Draft, Finished, Open, Opened, Tokens, Verdict
from shared.vocab import Vocabulary


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
        call = stub.Speculate()
        try:
            yield await SpeculateStream.open(self, call, request, meter)
        finally:
            call.cancel()

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
            return await asyncio.wait_for(call.read(), self._silence_timeout_s)
        except asyncio.TimeoutError:
            raise VerifyTimeout(
                f"the cloud at {self.address} was silent for {self._silence_timeout_s:g} s"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None

    def _translate(self, error: grpc.aio.AioRpcError) -> DuetError:
        metadata = error.trailing_metadata()
        kind = dict(metadata).get(wire.ERROR_KIND) if metadata else None
        name = error.code().name
        if kind is None and name == "UNAVAILABLE":
            return self._unavailable("went away")
        return from_status(name, error.details() or name, str(kind) if kind else None)


class SpeculateStream:
    """An open `Speculate` call."""

    def __init__(self, cloud: Cloud, call: Any, opened: Opened, meter: Meter) -> None:
        self.opened = opened
        self._cloud = cloud
        self._call = call
        self._meter = meter

    @classmethod
    async def open(cls, cloud: Cloud, call: Any, request: Open, meter: Meter) -> SpeculateStream:
        await _write(cloud, call, pb2.SpeculateRequest(open=wire.encode_open(request)))
        response = await cloud._read(call)
        if response is grpc.aio.EOF or response.WhichOneof("message") != "opened":
            raise CloudFailed(f"the cloud at {cloud.address} did not open the stream")
        return cls(cloud, call, wire.decode_opened(response.opened), meter)

    async def send(self, draft: Draft) -> None:
        message = pb2.SpeculateRequest(draft=wire.encode_draft(draft))
        self._meter.num_bytes += message.ByteSize()
        await _write(self._cloud, self._call, message)

    async def receive(self) -> Verdict | Finished:
        response = await self._cloud._read(self._call)
        if response is grpc.aio.EOF:
            raise CloudUnavailable(f"the cloud at {self._cloud.address} ended the stream early")
        if response.WhichOneof("message") == "finished":
            return wire.decode_finished(response.finished)
        self._meter.num_bytes += response.ByteSize()
        return wire.decode_verdict(response.verdict)


async def _write(cloud: Cloud, call: Any, message: pb2.SpeculateRequest) -> None:
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        pass  # the call has ended; reading says why
    except grpc.aio.AioRpcError as error:
        raise cloud._translate(error) from None
