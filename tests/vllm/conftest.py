"""One vLLM engine for all tests here: it takes half a minute to start."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest_asyncio

from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud
from tests.service import connection, loaded_edge, serving
from tests.tiny_pair import TinyPair

if TYPE_CHECKING:
    from cloud_service.targets.vllm import VllmTarget

# `make test-vllm` makes the environment that has it, and fails where nothing is collected.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

CONTEXT_TOKENS = 512
NUM_BLOCKS = 40
"""Of 32 tokens: two and a half streams of full length, so that many streams at once preempt each other."""

# vLLM reads these when it is imported, and so do the processes that it starts.
os.environ |= {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the tests do
}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def target(tiny_pair: TinyPair) -> AsyncIterator[VllmTarget]:
    from cloud_service.targets.vllm import load_target

    options = {
        "dtype": "float32",
        "max_model_len": CONTEXT_TOKENS,
        "num_gpu_blocks_override": NUM_BLOCKS,
    }
    target = await asyncio.to_thread(load_target, str(tiny_pair.target_hf), "target", options, "rounds")
    await target.warm_up()
    yield target
    await target.close()


@dataclass(frozen=True)
class Pair:
    """An edge with the draft, connected to a service over the target."""

    edge: EdgeModel
    cloud: Cloud
    target: VllmTarget


@asynccontextmanager
async def paired(target: VllmTarget, tiny_pair: TinyPair, *, num_slots: int = 1) -> AsyncIterator[Pair]:
    """Serve a target, and connect an edge of so many streams."""
    async with (
        serving(target) as (address, _),
        loaded_edge(tiny_pair.draft_gguf, num_slots=num_slots) as edge,
        connection(address) as cloud,
    ):
        yield Pair(edge, cloud, target)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pair(target: VllmTarget, tiny_pair: TinyPair) -> AsyncIterator[Pair]:
    async with paired(target, tiny_pair) as pair:
        yield pair
