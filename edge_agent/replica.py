"""One `duet-cloud` service as the edge sees it: a channel, a breaker, and errors as `shared.errors`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from edge_agent.access import Access
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.breaker import Backoff, Breaker, BreakerState
from shared.errors import (
    CloudError,
    CloudUnavailable,
    CloudUntrusted,
    DuetError,
    VerifyTimeout,
    from_status,
)
from shared.resumption import shows_absence

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's breaker, for people and for metrics."""

    address: str
    state: BreakerState
    retry_in_s: float
    """Until the next attempt; 0 where one may be made now."""
    last_error: str | None
    """Why it last failed; None since it last worked."""


class Replica:
    """A channel to one address, made on first use and again after each failed attempt."""

    def __init__(
        self,
        address: str,
        *,
        connect_timeout_s: float,
        silence_timeout_s: float,
        dead_link_s: float,
        access: Access,
        on_change: Callable[[Replica], None],
    ) -> None:
        """
        Args:
            silence_timeout_s: without any message for so long, a stream is given up.
            dead_link_s: without any sign of life for so long, the connection is given up.
            on_change: called whenever the replica has been found to answer, or not to.
        """
        self.address = address
        self.breaker = Breaker(Backoff(), trial_s=connect_timeout_s)
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._dead_link_s = dead_link_s
        self._access = access
        self._on_change = on_change
        self._connecting = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self.connection = 0
        """Which of its connections this is: each that is given up makes way for another."""
        self._last_error: str | None = None
        self.num_failures = 0
        """How often it was found to be away. Behind a balancer, streams are led elsewhere each time."""
        self._has_worked = False

    @property
    def status(self) -> ReplicaStatus:
        closed = self.breaker.state is BreakerState.CLOSED
        retry_in_s = 0.0 if closed else max(0.0, self.breaker.retry_at_s - time.monotonic())
        return ReplicaStatus(self.address, self.breaker.state, retry_in_s, self._last_error)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call brings along."""
        return self._access.metadata

    async def connect(self) -> pb2_grpc.SpeculationServiceStub:
        """Connect once; a refused or silent address is an error at once, not a retry for minutes.

        Raises:
            CloudUnavailable: nothing answers.
            CloudUntrusted: what answers cannot prove who it is.
        """
        async with self._connecting:  # one attempt for all who wait for it
            if self.breaker.state is BreakerState.OPEN:
                raise CloudUnavailable(self._last_error or f"the cloud at {self.address} is away")
            if self._channel is None:
                self._channel = self._new_channel()
            try:
                await asyncio.wait_for(self._ready(self._channel), self._connect_timeout_s)
            except (CloudUnavailable, CloudUntrusted, asyncio.TimeoutError) as error:
                await self.give_up()
                if not isinstance(error, asyncio.TimeoutError):
                    raise
                raise self.failed(
                    self._unavailable(f"gave no answer within {self._connect_timeout_s:g} s")
                ) from None
            except asyncio.CancelledError:
                self.breaker.gave_up(time.monotonic())
                raise
            self.breaker.connected()
            self._on_change(self)
            return pb2_grpc.SpeculationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def give_up(self) -> None:
        """Leave a connection that does not work. Calls on it end; alone, gRPC would try when it likes."""
        channel, self._channel = self._channel, None
        self.connection += 1
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def worked(self) -> None:
        """The replica did what a stream asked of it."""
        self.breaker.worked()
        self._has_worked = True
        self._last_error = None

    def failed(self, error: DuetError) -> DuetError:
        """Take note of an error that may speak against the replica; returns it."""
        if isinstance(error, CloudError) and shows_absence(error):
            self.breaker.failed(time.monotonic(), random.random())
            self._last_error = str(error)
            self.num_failures += 1
            self._on_change(self)
        return error

    def translate(self, error: grpc.aio.AioRpcError) -> DuetError:
        metadata = dict(error.trailing_metadata() or ())
        kind = metadata.get(wire.ERROR_KIND)
        name, details = error.code().name, error.details() or ""
        if kind is None and name == "UNAVAILABLE":
            return self.failed(self._unreachable("went away", details))
        wait_ms = str(metadata.get(wire.RETRY_AFTER_MS, ""))
        return self.failed(
            from_status(
                name,
                details or name,
                str(kind) if kind else None,
                int(wait_ms) / 1e3 if wait_ms.isdecimal() else None,
            )
        )

    async def unless_silent(self, answer: Awaitable[Result]) -> Result:
        try:
            return await asyncio.wait_for(answer, self._silence_timeout_s)
        except asyncio.TimeoutError:
            raise self.failed(
                VerifyTimeout(f"the cloud at {self.address} was silent for {self._silence_timeout_s:g} s")
            ) from None

    def _new_channel(self) -> grpc.aio.Channel:
        return self._access.channel(
            self.address,
            [
                ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
                # Half of the time until the question, half for the answer. Without the third line gRPC waits
                # a minute for the answer to a ping that something else asked for.
                ("grpc.keepalive_time_ms", int(500 * self._dead_link_s)),
                ("grpc.keepalive_timeout_ms", int(500 * self._dead_link_s)),
                ("grpc.http2.ping_timeout_ms", int(500 * self._dead_link_s)),
                ("grpc.http2.max_pings_without_data", 0),
                # A new channel must not inherit the pause after an old one's failure.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    async def _ready(self, channel: grpc.aio.Channel) -> None:
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise self.failed(self._unreachable("refuses connections", await _why(channel)))
            await channel.wait_for_state_change(state)

    def _unreachable(self, what: str, details: str) -> CloudError:
        untrusted = self._access.distrust(self.address, details)
        guess = "" if self._has_worked else self._access.guess(details)
        return untrusted or self._unavailable(what + guess)

    def _unavailable(self, what: str) -> CloudUnavailable:
        return CloudUnavailable(
            f"the cloud at {self.address} {what}; start one with `duet-cloud serve`,"
            " name another with --cloud HOST:PORT, or answer here with --mode local"
        )


async def _why(channel: grpc.aio.Channel) -> str:
    """gRPC's account of why a channel does not connect, which it gives to calls alone."""
    stub = pb2_grpc.SpeculationServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        await stub.Describe(pb2.DescribeRequest())
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    return ""
