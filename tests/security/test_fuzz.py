"""Mutated messages and legal ones in illegal order: no crash, no hang, a status each, and flat memory.

The service runs in a process of its own over a scripted target, so that a crash is seen as one and its
memory is its own.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protos.duet.v1 import speculation_pb2 as pb2

STREAMS_AT_ONCE = 8
MESSAGES_A_BATCH = 30
"""About, and rather more."""
ANSWERED_WITHIN_S = 20.0
SETTINGS = '{"limits": {"context_tokens": 256, "idle_s": 5, "total_s": 10}, "max_waiting_streams": 256}'

WARM_UP_STREAMS = 3000
"""Legal ones, a hundred at once: allocators keep what the busiest moment took."""
MOST_GROWTH = 1.02

WANTED = {"OK", "INVALID_ARGUMENT", "ABORTED", "CUT_OFF"}


@dataclass
class Service:
    address: str
    process: psutil.Process
    log: Path


@contextmanager
def running() -> Iterator[Service]:
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "tests.scripted_service", SETTINGS]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), Path(log.name).read_text()
            yield Service(line.split()[-1], psutil.Process(process.pid), Path(log.name))
            assert process.poll() is None, "the service has ended"
        finally:
            process.terminate()
            process.wait()


# Messages

small = st.integers(0, 8)
any_uint = st.one_of(small, st.sampled_from([250, 255, 256, 2**31, 2**32 - 1]))
token_ids = st.lists(st.one_of(st.integers(1, 250), any_uint), max_size=12)
numbers = st.one_of(st.floats(0, 2), st.sampled_from([-1.0, float("nan"), float("inf"), 1e300]))


@st.composite
def opens(draw: Any) -> pb2.Open:
    message = pb2.Open(
        committed=draw(st.lists(st.integers(1, 250), max_size=4)),
        seed=draw(st.integers(0, 2**64 - 1)),
        policy=draw(st.sampled_from([0, 1, 2, 7])),
        limits=pb2.Limits(max_tokens=draw(st.one_of(st.integers(1, 40), any_uint))),
    )
    if draw(st.booleans()):
        roles = st.sampled_from(["user", "assistant", "system", "nobody", ""])
        for _ in range(draw(st.integers(0, 3))):
            message.messages.messages.add(role=draw(roles), content=draw(st.text(max_size=20)))
    else:
        message.prompt_token_ids.ids.extend(draw(token_ids))
    if draw(st.booleans()):
        message.sampling.temperature = draw(numbers)
        message.sampling.top_k = draw(any_uint)
        message.sampling.top_p = draw(numbers)
    if draw(st.booleans()):
        message.rollback_threshold = draw(numbers)
    return message


@st.composite
def drafts(draw: Any) -> pb2.Draft:
    return pb2.Draft(
        epoch=draw(st.one_of(st.just(0), any_uint)),
        start=draw(st.one_of(small, any_uint)),
        token_ids=draw(token_ids),
        more=draw(st.booleans()),
    )


requests = st.one_of(
    opens().map(lambda message: pb2.SpeculateRequest(open=message)),
    drafts().map(lambda message: pb2.SpeculateRequest(draft=message)),
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "repeat", "cut"]), st.floats(0, 1), st.integers(0, 255)
    ),
    max_size=3,
)


def mutated(message: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    content = bytearray(message)
    for kind, where, value in changes:
        at = int(where * len(content))
        if kind == "flip" and at < len(content):
            content[at] ^= value or 1
        elif kind == "insert":
            content.insert(at, value)
        elif kind == "delete":
            del content[at : at + 1 + value % 4]
        elif kind == "repeat":
            content[at:at] = content[at : at + 1 + value % 16]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


raw = st.builds(mutated, requests.map(lambda message: message.SerializeToString()), edits)
in_order = st.tuples(opens(), st.lists(drafts(), max_size=6)).map(
    lambda parts: [
        pb2.SpeculateRequest(open=parts[0]).SerializeToString(),
        *(pb2.SpeculateRequest(draft=draft).SerializeToString() for draft in parts[1]),
    ]
)
speculations = st.one_of(st.lists(raw, min_size=3, max_size=7), in_order)
generations = st.builds(
    lambda message, changes: [mutated(pb2.GenerateRequest(open=message).SerializeToString(), changes)],
    opens(),
    edits,
)
streams = st.one_of(
    speculations.map(lambda messages: ("Speculate", messages)),
    speculations.map(lambda messages: ("Speculate", messages)),
    speculations.map(lambda messages: ("Speculate", messages)),
    generations.map(lambda messages: ("Generate", messages)),
)


# Play


async def status_of(channel: grpc.aio.Channel, method: str, messages: list[bytes]) -> str:
    """How a call of these bytes ends; CUT_OFF is the client's own, where a write met a call that had ended.

    Raises TimeoutError where it does not end.
    """
    call = channel.stream_stream(f"/duet.v1.SpeculationService/{method}")()

    async def play() -> str:
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # it has its status already
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            pass
        code = await call.code()
        if code is grpc.StatusCode.INTERNAL and await call.details() == "Internal error from Core":
            return "CUT_OFF"
        return str(code.name)

    return await asyncio.wait_for(play(), ANSWERED_WITHIN_S)


async def warm_up(channel: grpc.aio.Channel) -> None:
    for _ in range(WARM_UP_STREAMS // 100):
        assert all(await asyncio.gather(*(still_serves(channel) for _ in range(100))))


async def still_serves(channel: grpc.aio.Channel) -> bool:
    opening = pb2.Open(limits=pb2.Limits(max_tokens=4))
    opening.prompt_token_ids.ids.extend([1, 2, 3])
    call = channel.unary_stream(
        "/duet.v1.SpeculationService/Generate",
        request_serializer=pb2.GenerateRequest.SerializeToString,
        response_deserializer=pb2.GenerateResponse.FromString,
    )(pb2.GenerateRequest(open=opening), timeout=5.0)
    made = [token async for message in call for token in message.tokens.token_ids]
    return made == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("num_messages", "num_before"),
    [
        pytest.param(10_000, 7_000, id="10,000 messages"),
        pytest.param(50_000, 16_000, id="50,000 messages", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(1200)
def test_no_messages_crash_or_hang_the_service_and_its_memory_stays_flat(
    num_messages: int, num_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Args:
        num_before: messages until pools are full and as many streams wait for their time limits as ever will.
    """
    # By default each thread of gRPC has one, and fills it for an hour.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    loop = asyncio.new_event_loop()
    statuses: Counter[str] = Counter()
    sent = 0
    early = late = 0

    with running() as service:

        async def connect() -> grpc.aio.Channel:
            return grpc.aio.insecure_channel(service.address)

        channel = loop.run_until_complete(connect())
        loop.run_until_complete(warm_up(channel))

        @settings(
            max_examples=num_messages // MESSAGES_A_BATCH + 100,
            deadline=None,
            database=None,
            derandomize=num_messages <= 10_000,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(streams, min_size=STREAMS_AT_ONCE, max_size=STREAMS_AT_ONCE))
        def play(batch: list[tuple[str, list[bytes]]]) -> None:
            nonlocal sent, early, late
            if sent >= num_messages:
                return

            async def together() -> list[str]:
                return await asyncio.gather(*(status_of(channel, *stream) for stream in batch))

            statuses.update(loop.run_until_complete(together()))
            sent += sum(len(messages) for _, messages in batch)
            late = service.process.memory_info().rss
            if sent <= num_before:
                early = late

        play()
        assert loop.run_until_complete(still_serves(channel))
        loop.run_until_complete(channel.close())
        loop.close()
        log = service.log.read_text()
    print(
        f"{sent} messages in {statuses.total()} streams: {dict(statuses.most_common())};"
        f" memory {early / 2**20:.1f} MB after {num_before}, {late / 2**20:.1f} MB at the end"
    )
    assert sent >= num_messages
    assert set(statuses) <= WANTED
    assert statuses["OK"] > 0
    assert "internal failure" not in log
    assert "Traceback" not in log, log[:2000]
    assert late <= MOST_GROWTH * early
