"""Far more connections and calls than the service has room for: it answers every one, and lives on."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager

import pytest

from edge_agent.remote import Cloud
from shared.errors import CloudOverloaded
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.service import CONTEXT_TOKENS, connection, generate, running_cloud
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
