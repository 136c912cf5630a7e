"""Soak: 64 edges on one service for minutes. Nothing grows or slows down, every stream ends and is freed.

The target is scripted (not a model): what is measured is the service around it, in a process of its own, and
the edge's client, in this one. Edges speculate, stream, hang up in the middle, and connect anew.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import pytest

from benchmarks.harness import quantile
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
WARM_UP_S = 15.0
"""Edges that do not pause: allocators keep what the busiest moment took, so that one comes first."""
WINDOW_S = 2.5
STREAMS_A_CONNECTION = 8
MAX_TOKENS = 48
DRAFT_TOKENS = 4
THINK_S = 0.2
"""The mean time in which an edge drafts: 320 rounds a second of all, about a third of what 2 cores can do."""
MOST_GROWTH = 1.02
MOST_SLOWER = 1.5


@dataclass
class Tally:
    num_finished: int = 0
    num_hung_up: int = 0
    round_s: list[float] = field(default_factory=list)
    """Of the window that runs."""

    @property
    def num_opened(self) -> int:
        return self.num_finished + self.num_hung_up


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    num_bytes: int
    num_files: int


@dataclass(frozen=True)
class Window:
    """Figures at its end."""

    num_rounds: int
    p99_ms: float
    """Of rounds: draft sent to verdict taken."""
    service: Usage
    edges: Usage

    @classmethod
    def ended(cls, tally: Tally, service: MortalCloud) -> Window:
        times, tally.round_s = tally.round_s, []
        here = psutil.Process()
        return cls(
            len(times),
            1e3 * quantile(times, 0.99),
            Usage(*service.usage()),
            Usage(here.memory_info().rss, here.num_fds()),
        )


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


async def edge(i: int, address: str, tally: Tally, think_s: float, ends_s: float) -> None:
    """Streams of all kinds one after the other, a few on each connection."""
    rng = random.Random(i)

    def pause() -> float:
        return rng.expovariate(1 / think_s) if think_s else 0.0

    while time.monotonic() < ends_s:
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
                if time.monotonic() >= ends_s:
                    break


async def run_edges(service: MortalCloud, tally: Tally, *, think_s: float, seconds: float) -> list[Window]:
    windows: list[Window] = []
    began = time.monotonic()

    async def watch() -> None:
        for i in range(int(seconds / WINDOW_S)):
            await asyncio.sleep(began + (i + 1) * WINDOW_S - time.monotonic())
            windows.append(Window.ended(tally, service))

    edges = (edge(i, service.address, tally, think_s, began + seconds) for i in range(NUM_EDGES))
    await together(watch(), *edges)
    return windows


def most(windows: Sequence[Window], value: Callable[[Window], int]) -> int:
    return max(map(value, windows))


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
async def test_64_edges_leave_a_service_as_they_found_it(seconds: float) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    tally = Tally()
    with mortal_clouds(1, ForgetfulTarget, metrics_listen=metrics) as [service]:
        files_before = service.usage()[1]
        await run_edges(service, tally, think_s=0.0, seconds=WARM_UP_S)
        windows = await run_edges(service, tally, think_s=THINK_S, seconds=seconds - WARM_UP_S)
        await eventually(lambda: service.usage()[1] <= files_before)
        counted = await scraped(metrics)

    num = len(windows) // 4
    first, last = windows[:num], windows[-num:]
    print(
        f"{NUM_EDGES} edges, {seconds:g} s: {tally.num_finished} streams ended, {tally.num_hung_up} hung up,"
        f" {total(counted, 'duet_cloud_rounds_total'):.0f} rounds"
    )
    for name, value in (
        ("service, MB", lambda window: window.service.num_bytes),
        ("service, files", lambda window: window.service.num_files),
        ("edges, MB", lambda window: window.edges.num_bytes),
        ("edges, files", lambda window: window.edges.num_files),
    ):
        early, late = most(first, value), most(last, value)
        scale = 1e6 if "MB" in name else 1
        print(f"{name}: {early / scale:.1f} in the first quarter, {late / scale:.1f} in the last")
        assert late <= MOST_GROWTH * early, name
    # Other programs can only add to a round, so that quiet windows are compared.
    early_ms, late_ms = (
        quantile([window.p99_ms for window in part], 0.2)
        for part in (windows[: len(windows) // 2], windows[len(windows) // 2 :])
    )
    print(f"p99 of a round: {early_ms:.1f} ms in the first half, {late_ms:.1f} ms in the second")
    assert late_ms <= MOST_SLOWER * early_ms

    assert total(counted, "duet_cloud_streams_active") == 0
    assert total(counted, "duet_cloud_streams_total", "length") == tally.num_finished
    assert total(counted, "duet_cloud_streams_total", "cancelled") == tally.num_hung_up
    assert total(counted, "duet_cloud_streams_total") == tally.num_opened
    assert total(counted, "duet_cloud_errors_total") == 0
