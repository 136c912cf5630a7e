"""Who goes next inside a full engine of vLLM: `--admission shortest` with `--verification rounds`.

Full are its blocks, not its places: those are given out by the service's own line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio

from cloud_service.targets import vllm as vllm_target
from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.loading import target_loader
from cloud_service.targets.vllm import VllmTarget
from edge_agent.remote import Cloud, Meter
from shared.config import CloudConfig
from shared.messages import Open, Tokens
from shared.sampling import Sampling
from tests.service import connection, eventually, serving
from tests.tiny_pair import TinyPair

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

CONTEXT_TOKENS = 4096
BLOCK_TOKENS = 32
NUM_BLOCKS = CONTEXT_TOKENS // BLOCK_TOKENS + 1
"""One stream of full length, and the block that vLLM keeps for itself."""
PROMPT_TOKENS = 2200
"""More than half of it, so that one stream runs and others wait."""
MAX_TOKENS = 1000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def target(tiny_pair: TinyPair) -> AsyncIterator[VllmTarget]:
    config = CloudConfig(
        target="vllm",
        model=str(tiny_pair.target_hf),
        admission="shortest",
        verification="rounds",
        slots=16,
        engine={
            "dtype": "float32",
            "max_model_len": CONTEXT_TOKENS,
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": NUM_BLOCKS,
            "max_num_batched_tokens": CONTEXT_TOKENS,
        },
    )
    target = await asyncio.to_thread(target_loader(config, lambda *_: None))
    assert isinstance(target, VllmTarget)
    await target.warm_up()
    yield target
    await target.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cloud(target: VllmTarget) -> AsyncIterator[Cloud]:
    async with (
        serving(target, CloudConfig(admission="shortest")) as (address, _),
        connection(address) as cloud,
    ):
        yield cloud


def prompt(number: int) -> list[int]:
    """Of which no cache holds a block."""
    return np.random.default_rng(number).integers(0, 256, PROMPT_TOKENS).tolist()


def request(number: int, predicted_length: int | None) -> Open:
    return Open(
        prompt=tuple(prompt(number)),
        sampling=Sampling(),
        seed=0,
        max_tokens=MAX_TOKENS,
        predicted_length=predicted_length,
    )


@asynccontextmanager
async def full(target: VllmTarget) -> AsyncIterator[None]:
    """A stream fills the engine meanwhile."""
    text = prompt(999)
    endless = GenerateOptions(
        sampling=Sampling(),
        seed=0,
        start=0,
        max_tokens=CONTEXT_TOKENS - PROMPT_TOKENS,
        end_token_ids=frozenset(),
    )
    async with target.sequence(text) as sequence, aclosing(sequence.generate(text, endless)) as made:
        await anext(made)
        yield
        assert await anext(made), "it has not ended by itself"


async def order_of(
    target: VllmTarget, cloud: Cloud, streams: Sequence[tuple[str, int | None]], clock: Sequence[float]
) -> list[str]:
    """In which order streams get their first token that came to a full engine one after the other.

    Args:
        streams: name and predicted length.
        clock: when each came, in seconds.
    """
    went: list[str] = []

    async def ask(number: int, name: str, predicted: int | None) -> None:
        async with aclosing(cloud.generate(request(number, predicted), Meter())) as messages:
            async for message in messages:
                if isinstance(message, Tokens):
                    went.append(name)
                    return

    with pytest.MonkeyPatch.context() as patch:
        tasks = []
        async with full(target):
            for number, ((name, predicted), now) in enumerate(zip(streams, clock, strict=True)):
                stopped = SimpleNamespace(monotonic=lambda now=now: now, perf_counter=time.perf_counter)
                patch.setattr(vllm_target, "time", stopped)
                tasks.append(asyncio.create_task(ask(number, name, predicted)))
                await eventually(lambda number=number: target.num_requests == 2 + number)
            assert went == []
        await asyncio.gather(*tasks)
    await eventually(lambda: target.num_requests == 0)
    return went


async def test_of_streams_that_came_together_the_shortest_predicted_goes_first(
    target: VllmTarget, cloud: Cloud
) -> None:
    streams = [("long", 300), ("unsaid", None), ("short", 4), ("middle", 40), ("as short", 4)]
    went = await order_of(target, cloud, streams, clock=[0.0] * len(streams))
    assert went == ["short", "as short", "middle", "long", "unsaid"]


async def test_a_long_one_that_came_early_enough_goes_before_shorter_ones(
    target: VllmTarget, cloud: Cloud
) -> None:
    # 290 tokens are made up for in 18.1 s.
    streams = [("long", 300), ("short", 10), ("short, late", 10), ("short, later", 10)]
    went = await order_of(target, cloud, streams, clock=[100.0, 117.0, 119.0, 120.0])
    assert went == ["short", "long", "short, late", "short, later"]
