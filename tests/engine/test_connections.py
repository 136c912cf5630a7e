"""Far more connections and calls than the service has room for: it answers every one, and lives on."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace

import psutil
import pytest

from edge_agent.remote import Cloud, Meter
from shared.errors import CloudOverloaded, CloudUnavailable
from shared.messages import Draft, Finished, Message, Open
from shared.sampling import Sampling
from tests.mortal import ForgetfulTarget
from tests.service import CONTEXT_TOKENS, connection, eventually, generate, running_cloud, serving
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

NUM_IDLE = 1000
NUM_CHANNELS = 6
NUM_CALLS = 300
SLOTS = 4
MAX_WAITING = 16


@pytest.fixture(autouse=True)
def enough_open_files() -> Iterator[None]:
    """For both ends: the service inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_IDLE + 1000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def idle_connections(address: str) -> Iterator[list[socket.socket]]:
    """Connections that never say anything."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            for _ in range(NUM_IDLE)
        ]


def request(seed: int) -> Open:
    return Open(prompt=(Message("user", f"Question {seed}"),), sampling=Sampling(), seed=seed, max_tokens=24)


async def outcome(cloud: Cloud, seed: int) -> str:
    """How a call ended: "answered" or the line of its refusal."""
    try:
        completion = await generate(cloud, request(seed))
    except CloudOverloaded as error:
        return str(error)
    assert completion.token_ids
    return "answered"


async def test_a_thousand_idle_connections_and_three_hundred_calls_at_once(tiny_pair: TinyPair) -> None:
    flags = {"slots": SLOTS, "max_waiting_streams": MAX_WAITING, "context_tokens": CONTEXT_TOKENS}
    with running_cloud(tiny_pair.target_gguf, **flags) as service:
        async with AsyncExitStack() as stack:
            stack.enter_context(idle_connections(service.address))
            clouds = [
                await stack.enter_async_context(connection(service.address)) for _ in range(NUM_CHANNELS)
            ]
            calls = (outcome(clouds[i % NUM_CHANNELS], i) for i in range(NUM_CALLS))
            ends = Counter(await asyncio.gather(*calls))
            print(f"{ends['answered']} answered, {NUM_CALLS - ends['answered']} refused")
            assert ends.pop("answered") >= SLOTS + MAX_WAITING
            assert ends, "more calls than room"
            for line in ends:
                assert "slots are taken" in line
                assert "\n" not in line
            assert service.process.poll() is None
        async with connection(service.address) as cloud:
            assert await outcome(cloud, 0) == "answered"
        assert service.stop() == 0
    assert not any("Traceback" in line for line in service.log_lines)


async def leave_a_stream(address: str) -> None:
    async with connection(address) as cloud, cloud.speculate(request(0), Meter()) as stream:
        await stream.send(Draft(0, 0, (), more=False))
        assert not isinstance(await stream.receive(), Finished)


async def test_a_cloud_that_is_closed_leaves_no_connection_open() -> None:
    """Not even until the garbage collector comes by: in a quiet process that may take hours."""
    here = psutil.Process()
    async with serving(ForgetfulTarget()) as (address, _):
        await leave_a_stream(address)
        gc.collect()
        before = here.num_fds()
        gc.disable()
        try:
            for _ in range(10):
                await leave_a_stream(address)
            await eventually(lambda: here.num_fds() <= before)
        finally:
            gc.enable()


async def test_a_connection_that_another_stream_gives_up_ends_streams_as_unavailable() -> None:
    """gRPC says to those who read that they were cancelled, which nobody wanted."""
    async with serving(ForgetfulTarget()) as (address, _), connection(address) as cloud:
        [replica] = cloud._replicas
        long = replace(request(0), max_tokens=100_000)
        answer = cloud.generate(long, Meter())
        await anext(answer)
        async with cloud.speculate(request(1), Meter()) as stream:
            await replica.give_up()
            await stream.send(Draft(0, 0, (), more=False))
            with pytest.raises(CloudUnavailable):
                await stream.receive()
        with pytest.raises(CloudUnavailable):
            async for _ in answer:
                pass
