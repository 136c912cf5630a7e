"""A stream survives its service: killed, drained or frozen at random points, on one replica or two.

At every moment the committed tokens are a prefix of what the target writes alone; at the end they are all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from edge_agent.drafting.drafters import Drafters
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from edge_agent.resume import TargetStreams
from edge_agent.speeds import Speeds
from edge_agent.steps import Prompted, Resumed, Step
from shared.config import EdgeConfig
from shared.errors import CloudError
from shared.events import Token
from shared.messages import FinishReason, Open
from shared.resumption import OnOutage
from tests.engine.test_lossless import random_requests
from tests.mortal import MortalCloud, mortal_clouds, tiny_target
from tests.service import TargetAlone, connection, loaded_edge, together, unobserved
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

NUM_WORKERS = 4
MAX_TOKENS = 64
STEP_S = 0.01
"""Of the target, so that a stream is long enough to be hit in the middle."""


@dataclass
class Tally:
    """What came of the streams."""

    num_streams: int = 0
    num_tokens: int = 0
    num_resumed: int = 0
    num_lost: int = 0
    num_twice: int = 0
    killed_at_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_streams} streams, {self.num_tokens} tokens, resumed {self.num_resumed} times:"
            f" {self.num_lost} tokens lost, {self.num_twice} twice or wrong"
        )


@dataclass
class Expected:
    """A request and what the target makes of it alone."""

    request: Open
    token_ids: list[int]


def expected_answers(alone: TargetAlone, num: int, seed: int) -> list[Expected]:
    requests = [replace(request, max_tokens=MAX_TOKENS) for request in random_requests(num, seed)]
    return [Expected(request, alone.complete(request)) for request in requests]


def target_streams(edge: EdgeModel, cloud: Cloud, i: int = 0, patience_s: float = 60.0) -> TargetStreams:
    """Of all kinds in turn."""
    return TargetStreams(
        edge=edge,
        drafters=Drafters(edge),
        remote=cloud,
        config=EdgeConfig(
            proactive=bool(i % 2),
            on_outage=(OnOutage.WAIT, OnOutage.CONTINUE)[i // 2 % 2],
            outage_patience_s=patience_s,
        ),
        speeds=Speeds(),
        meter=Meter(),
        observed=unobserved(),
    )


async def follow(steps: AsyncIterator[Step], expected: Expected, tally: Tally) -> AsyncIterator[None]:
    """Check each token as it is committed; yields after each."""
    position = 0
    reason: FinishReason | None = None
    async for step in steps:
        if isinstance(step, Token):
            right = position < len(expected.token_ids) and step.id == expected.token_ids[position]
            tally.num_twice += not right
            tally.num_tokens += 1
            position += 1
            yield
        elif isinstance(step, Resumed):
            tally.num_resumed += 1
        elif isinstance(step, FinishReason):
            reason = step
    assert reason in (FinishReason.STOP, FinishReason.LENGTH)
    tally.num_streams += 1
    tally.num_lost += len(expected.token_ids) - position


async def begun(cloud: Cloud, make: Callable[[], AsyncGenerator[Step, None]]) -> AsyncGenerator[Step, None]:
    """A stream that has been opened. One that cannot begin is an error at once, and asked for again here."""
    while True:
        steps = make()
        try:
            assert isinstance(await anext(steps), Prompted)
            return steps
        except CloudError:
            await steps.aclose()
            await cloud.back()


class Killer:
    """Kills a service, always another, when a random number of tokens was committed since the last time."""

    def __init__(self, clouds: list[MortalCloud], num_kills: int, seed: int) -> None:
        self._clouds = clouds
        self._rng = np.random.default_rng(seed)
        self._due = asyncio.Event()
        self._countdown = self._next()
        self.num_kills = num_kills
        self.done = False

    def token(self) -> None:
        self._countdown -= 1
        if self._countdown <= 0:
            self._due.set()

    async def run(self) -> None:
        for i in range(self.num_kills):
            await self._due.wait()
            # Any moment of a round, not only the one after a token.
            await asyncio.sleep(self._rng.uniform(0.0, 2 * STEP_S))
            cloud = self._clouds[i % len(self._clouds)]
            await asyncio.to_thread(cloud.kill if i % 5 else cloud.terminate)
            await asyncio.to_thread(cloud.start)
            self._countdown = self._next()
            self._due.clear()
        self.done = True

    def _next(self) -> int:
        return int(self._rng.integers(1, 20))


async def run_under(
    clouds: list[MortalCloud],
    connect: Callable[[], AbstractAsyncContextManager[Cloud]],
    pair: TinyPair,
    expected: list[Expected],
    num_kills: int,
    seed: int,
) -> Tally:
    """Streams until the services have been killed so many times, then the rest of those that run."""
    tally = Tally()
    killer = Killer(clouds, num_kills, seed)
    async with loaded_edge(pair.draft_gguf) as edge, connect() as cloud:

        async def work(worker: int) -> None:
            i = worker
            while not killer.done:
                streams = target_streams(edge, cloud, i)
                each = expected[i % len(expected)]
                make = streams.cloud if i % 3 == 2 else partial(streams.speculate, may_stream=bool(i % 3))
                async with aclosing(await begun(cloud, partial(make, each.request))) as steps:
                    async for _ in follow(steps, each, tally):
                        killer.token()
                i += NUM_WORKERS

        await together(killer.run(), *(work(worker) for worker in range(NUM_WORKERS)))
    return tally


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize(
    "num_kills", [20, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
async def test_kills_at_random_points_lose_no_token_and_repeat_none(
    tiny_pair: TinyPair, alone: TargetAlone, num_replicas: int, num_kills: int
) -> None:
    expected = expected_answers(alone, 24, seed=num_replicas)
    with mortal_clouds(num_replicas, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as clouds:
        connect = partial(connection, ",".join(cloud.address for cloud in clouds))
        began = time.monotonic()
        tally = await run_under(clouds, connect, tiny_pair, expected, num_kills, seed=num_kills)
    print(f"{num_kills} kills, {num_replicas} replicas, {time.monotonic() - began:.0f} s: {tally}")
    assert (tally.num_lost, tally.num_twice) == (0, 0)
    assert tally.num_resumed >= num_kills / 2, "most kills hit a running stream"
