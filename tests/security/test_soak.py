"""Soak: 64 edges on one service for minutes. Nothing grows or slows down, every stream ends and is freed.

The target is scripted (not a model): what is measured is the service around it and the edge's client, each in
a process of its own. Edges speculate, stream, hang up in the middle, and connect anew.

Both run with one arena of glibc's malloc. By default every thread of gRPC fills one of its own, for an hour
and up to some percent, which would hide a leak as small as this test looks for.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import psutil
import pytest

from benchmarks.harness import quantile, summarise
from edge_agent.remote import Cloud, Meter
from shared.messages import Finished, Message, Open, Tokens
from shared.sampling import Sampling
from shared.session import EdgeSession
from tests.counters import scraped, total
from tests.mortal import ForgetfulTarget, MortalCloud, free_port, mortal_clouds
from tests.service import connection, eventually, together

LONG_MINUTES = float(os.environ.get("DUET_SOAK_MINUTES", "10"))
"""Of the long form."""
NUM_EDGES = 64
WARM_UP_STREAMS = 2000
"""Of edges that do not pause: allocators keep what the busiest moment took, so that one comes first."""
WINDOW_S = 2.5
STREAMS_A_CONNECTION = 8
MAX_TOKENS = 48
DRAFT_TOKENS = 4
THINK_S = 0.2
"""The mean time in which an edge drafts: 320 rounds a second of all, about a third of what 2 cores can do."""
MOST_GROWTH = 1.02
MOST_SLOWER = 1.25
"""Than a service that has just started, beside it on the same machine."""


@dataclass
class Tally:
    num_finished: int = 0
    num_hung_up: int = 0
    round_s: list[float] = field(default_factory=list)
    """Of the window that runs."""

    def take_p99_ms(self) -> float:
        """Of the window that ends: from a draft's sending to its verdict."""
        times, self.round_s = self.round_s, []
        return 1e3 * quantile(times, 0.99)


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    num_bytes: int
    num_files: int

    @classmethod
    def of(cls, process: psutil.Process) -> Usage:
        return cls(process.memory_info().rss, process.num_fds())


@dataclass(frozen=True)
class Window:
    """Figures at its end."""

    p99_ms: float
    service: Usage
    edges: Usage


async def speculate(
    cloud: Cloud, request: Open, tally: Tally, pause: Callable[[], float], leave_after: int
) -> None:
    """One stream; every fifth token is drafted wrong."""
    async with cloud.speculate(request, Meter()) as stream:
        session = EdgeSession()
        session.send_open()
        session.receive_opened(stream.opened)
        text = list(stream.opened.prompt_token_ids)
        while len(session.committed) < MAX_TOKENS:
            await asyncio.sleep(pause())
            if len(session.committed) >= leave_after:
                tally.num_hung_up += 1
                return
            at = len(text) + len(session.committed)
            draft = [1 + (at + i) % 250 + ((at + i) % 5 == 0) for i in range(DRAFT_TOKENS)]
            began = time.perf_counter()
            await stream.send(session.send_draft(draft, more=False))
            verdict = await stream.receive()
            tally.round_s.append(time.perf_counter() - began)
            assert not isinstance(verdict, Finished)
            session.receive_verdict(verdict)
        assert isinstance(await stream.receive(), Finished)
    tally.num_finished += 1
    check(text, session.committed)


async def generate(cloud: Cloud, request: Open, tally: Tally) -> None:
    made: list[int] = []
    text: list[int] = []
    async for message in cloud.generate(request, Meter()):
        if isinstance(message, Tokens):
            made += message.token_ids
        elif not isinstance(message, Finished):
            text += message.prompt_token_ids
    tally.num_finished += 1
    check(text, made)


def check(prompt: list[int], made: list[int]) -> None:
    """The answer is the target's own."""
    assert made == [1 + length % 250 for length in range(len(prompt), len(prompt) + MAX_TOKENS)]


async def edge(i: int, address: str, tally: Tally, think_s: float, over: Callable[[], bool]) -> None:
    """Streams of all kinds one after the other, a few on each connection."""
    rng = random.Random(i)

    def pause() -> float:
        return rng.expovariate(1 / think_s) if think_s else 0.0

    while not over():
        async with connection(address) as cloud:
            for _ in range(STREAMS_A_CONNECTION):
                prompt = Message("user", "x" * rng.randint(1, 400))
                request = Open(prompt=(prompt,), sampling=Sampling(), seed=1, max_tokens=MAX_TOKENS)
                kind = rng.random()
                if kind < 0.2:
                    await generate(cloud, request, tally)
                    await asyncio.sleep(pause())
                else:
                    leave_after = rng.randrange(MAX_TOKENS) if kind < 0.35 else MAX_TOKENS
                    await speculate(cloud, request, tally, pause, leave_after)
                if over():
                    break


async def run_edges(
    loads: Sequence[tuple[MortalCloud, Tally]],
    seconds: float,
    think_s: float,
    each_window: Callable[[], None],
) -> None:
    """64 edges on each of the services."""
    began = time.monotonic()

    async def watch() -> None:
        for i in range(int(seconds / WINDOW_S)):
            await asyncio.sleep(began + (i + 1) * WINDOW_S - time.monotonic())
            each_window()

    edges = (
        edge(i, service.address, tally, think_s, lambda: time.monotonic() >= began + seconds)
        for service, tally in loads
        for i in range(NUM_EDGES)
    )
    await together(watch(), *edges)


async def warm_up(service: MortalCloud, tally: Tally) -> None:
    def over() -> bool:
        return tally.num_finished + tally.num_hung_up >= WARM_UP_STREAMS

    await together(*(edge(i, service.address, tally, 0.0, over) for i in range(NUM_EDGES)))
    tally.round_s.clear()


@dataclass(frozen=True)
class Soak:
    windows: list[Window]
    slower: list[float]
    """p99 of a round over that of a young service, window by window."""
    tally: Tally
    counted: dict[tuple[str, ...], float]
    """By the service, once all edges have gone."""


def soak(seconds: float) -> Soak:
    return asyncio.run(_soak(seconds))


async def _soak(seconds: float) -> Soak:
    metrics = f"127.0.0.1:{free_port()}"
    tally, young_tally = Tally(), Tally()
    windows: list[Window] = []
    pairs: list[tuple[float, float]] = []
    compare_s = seconds / 4

    def look() -> None:
        usage = Usage.of(psutil.Process(service.pid)), Usage.of(psutil.Process())
        windows.append(Window(tally.take_p99_ms(), *usage))

    with mortal_clouds(1, ForgetfulTarget, metrics_listen=metrics) as [service]:
        files_before = service.usage()[1]
        await warm_up(service, tally)
        await run_edges([(service, tally)], seconds - compare_s, THINK_S, look)
        with mortal_clouds(1, ForgetfulTarget) as [young]:
            both = [(service, tally), (young, young_tally)]
            await run_edges(
                both,
                compare_s,
                2 * THINK_S,  # as much work for the machine as before
                lambda: pairs.append((tally.take_p99_ms(), young_tally.take_p99_ms())),
            )
        await eventually(lambda: service.usage()[1] <= files_before)
        counted = await scraped(metrics)
    # In its first window, a service meets everything for the first time.
    return Soak(windows, [old / new for old, new in pairs[1:]], tally, counted)


def growth(windows: Sequence[Window], of: Callable[[Window], int]) -> tuple[int, int]:
    """The most in the first quarter, and in the last."""
    num = len(windows) // 4
    return max(map(of, windows[:num])), max(map(of, windows[-num:]))


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(60.0, id="a minute"),
        pytest.param(
            60.0 * LONG_MINUTES,
            id=f"{LONG_MINUTES:g} minutes",
            marks=[pytest.mark.long, pytest.mark.timeout(60.0 * LONG_MINUTES + 300.0)],
        ),
    ],
)
def test_64_edges_leave_a_service_as_they_found_it(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(soak, seconds).result()
    counted, tally, windows = done.counted, done.tally, done.windows
    print(
        f"{NUM_EDGES} edges, {seconds:g} s: {tally.num_finished} streams ended, {tally.num_hung_up} hung up,"
        f" {total(counted, 'duet_cloud_rounds_total'):.0f} rounds"
    )
    grown = {
        "service, bytes": growth(windows, lambda window: window.service.num_bytes),
        "service, files": growth(windows, lambda window: window.service.num_files),
        "edges, bytes": growth(windows, lambda window: window.edges.num_bytes),
        "edges, files": growth(windows, lambda window: window.edges.num_files),
    }
    for name, (early, late) in grown.items():
        print(f"{name}: {early:,} in the first quarter, {late:,} in the last ({late / early - 1:+.2%})")
    p99_ms = summarise([window.p99_ms for window in windows])
    slower = summarise(done.slower)
    print(f"p99 of a round: {p99_ms.show()} ms; {slower.show()} of a young service's")

    assert {name: late for name, (early, late) in grown.items() if late > MOST_GROWTH * early} == {}
    assert slower.median <= MOST_SLOWER
    assert total(counted, "duet_cloud_streams_active") == 0
    assert total(counted, "duet_cloud_streams_total", "length") == tally.num_finished
    assert total(counted, "duet_cloud_streams_total", "cancelled") == tally.num_hung_up
    assert total(counted, "duet_cloud_streams_total") == tally.num_finished + tally.num_hung_up
    assert total(counted, "duet_cloud_errors_total") == 0
