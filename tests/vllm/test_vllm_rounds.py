"""A verification round on vLLM: right rows, whatever the cache holds, for the price of the new tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.vllm import MEASURED_ROUND_STREAMS, VllmTarget
from shared.messages import FinishReason, Open
from shared.sampling import Rows, Sampling
from tests.service import eventually, generate, speculate
from tests.tiny_pair import NUM_TOKENS, PADDED_VOCAB_SIZE
from tests.vllm_streams import random_requests

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

WIDTH = 64


def random_text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


@pytest_asyncio.fixture(loop_scope="session")
async def empty_cache(target: VllmTarget) -> AsyncIterator[None]:
    assert await target.llm.reset_prefix_cache()
    yield


async def rows_of(target: VllmTarget, text: list[int], num_rows: int, width: int = WIDTH) -> Rows:
    """Rows of a stream that is new to the target."""
    async with target.sequence(text) as sequence:
        return (await sequence.score(text, num_rows=num_rows, width=width)).rows


async def rows_without_cache(target: VllmTarget, text: list[int], num_rows: int) -> Rows:
    assert await target.llm.reset_prefix_cache()
    return await rows_of(target, text, num_rows)


def assert_equal_rows(rows: Rows, expected: Rows) -> None:
    np.testing.assert_array_equal(rows.token_ids, expected.token_ids)
    np.testing.assert_allclose(rows.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("context", [1, 31, 32, 33, 64, 100, 400])
async def test_rows_with_the_cache_equal_rows_without(target: VllmTarget, context: int) -> None:
    text = random_text(context + 5, seed=context)
    expected = await rows_without_cache(target, text, num_rows=6)
    assert await target.llm.reset_prefix_cache()
    await rows_of(target, text[:context], num_rows=1)  # the context alone is cached
    assert_equal_rows(await rows_of(target, text, num_rows=6), expected)


async def test_rows_are_ordered_and_hold_no_padding(target: VllmTarget) -> None:
    rows = await rows_of(target, random_text(40, seed=1), num_rows=20)
    assert rows.token_ids.shape == rows.logprobs.shape == (20, WIDTH)
    assert np.all(np.diff(rows.logprobs, axis=1) <= 0)
    assert rows.token_ids.max() < NUM_TOKENS < PADDED_VOCAB_SIZE
    assert all(len(set(row)) == WIDTH for row in rows.token_ids.tolist())


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("draft_tokens", [1, 8, 40])
async def test_a_draft_that_is_cached_whole_is_verified_without_the_cache(
    target: VllmTarget, draft_tokens: int
) -> None:
    text = random_text(96 + draft_tokens, seed=2)
    await rows_of(target, text + random_text(40, seed=3), num_rows=1)  # as another stream would
    repeated = target.num_repeated_rounds
    rows = await rows_of(target, text, num_rows=draft_tokens + 1)
    assert target.num_repeated_rounds == repeated + 1
    assert_equal_rows(rows, await rows_without_cache(target, text, draft_tokens + 1))


@pytest.mark.usefixtures("empty_cache")
async def test_a_draft_at_a_block_boundary_takes_its_first_row_from_the_round_before(
    target: VllmTarget,
) -> None:
    boundary = 3 * target.block_tokens
    text = random_text(boundary + 4, seed=4)
    repeated = target.num_repeated_rounds
    async with target.sequence(text) as sequence:
        await sequence.score(text[:boundary], num_rows=5, width=WIDTH)
        rows = (await sequence.score(text, num_rows=5, width=WIDTH)).rows
    assert target.num_repeated_rounds == repeated
    assert_equal_rows(rows, await rows_without_cache(target, text, 5))


@pytest.mark.usefixtures("empty_cache")
async def test_a_round_computes_its_new_tokens_and_at_most_one_block(target: VllmTarget) -> None:
    text = random_text(480, seed=5)
    async with target.sequence(text) as sequence:
        await sequence.score(text[:8], num_rows=1, width=1)
        for end in range(16, len(text), 8):
            before = sequence.num_computed_tokens
            await sequence.score(text[:end], num_rows=8, width=1)
            assert sequence.num_computed_tokens - before <= 8 + target.block_tokens


@pytest.mark.usefixtures("empty_cache")
async def test_streams_of_different_salts_share_no_cache(target: VllmTarget) -> None:
    text = random_text(200, seed=6)
    computed = []
    for salt in ("a", "a", "b", None):
        async with target.sequence(text, tenant=salt) as sequence:
            await sequence.score(text, num_rows=1, width=1)
            computed.append(sequence.num_computed_tokens)
    assert computed == [200, 200 - 192, 200, 200]


# Streams that end early


def endless(target: VllmTarget, sampling: Sampling) -> GenerateOptions:
    return GenerateOptions(sampling=sampling, seed=0, start=0, max_tokens=400, end_token_ids=frozenset())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_cancelled_stream_leaves_the_engine_within_100_ms(
    target: VllmTarget, temperature: float
) -> None:
    text = random_text(20, seed=7)
    async with target.sequence(text) as sequence:
        stream = sequence.generate(text, endless(target, Sampling(temperature=temperature)))
        for _ in range(3):
            await anext(stream)
        assert target.num_requests == 1
        assert not await target.llm.reset_prefix_cache(), "the stream holds blocks"
        began = time.perf_counter()
        await stream.aclose()
    while not await target.llm.reset_prefix_cache():  # noqa: ASYNC110 - only asking tells
        await asyncio.sleep(0.005)
    assert target.num_requests == 0
    assert time.perf_counter() - began < 0.1


async def test_a_cancelled_round_leaves_the_engine(target: VllmTarget) -> None:
    text = random_text(500, seed=8)
    async with target.sequence(text) as sequence:
        round_ = asyncio.create_task(sequence.score(text, num_rows=400, width=WIDTH))
        await eventually(lambda: target.num_requests == 1)
        round_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await round_
    assert target.num_requests == 0


# Limits


@pytest.mark.parametrize("room", [1, 2, 7])
async def test_a_text_may_fill_the_context_to_its_last_token(pair: Any, room: int) -> None:
    prompt = tuple(random_text(pair.target.context_tokens - room, seed=9))
    request = Open(prompt=prompt, sampling=Sampling(), seed=0)
    streamed = await generate(pair.cloud, request)
    speculated = await speculate(pair.edge, pair.cloud, request, 4)
    assert streamed.token_ids == speculated.token_ids
    assert (len(streamed.token_ids), streamed.reason) == (room, FinishReason.LENGTH)


async def test_nothing_is_left_in_the_engine_after_any_of_this(pair: Any) -> None:
    for request in random_requests(4, seed=10):
        await speculate(pair.edge, pair.cloud, request, 4)
    await eventually(lambda: pair.target.num_requests == 0)


async def test_a_stream_in_much_company_is_told_that_its_drafts_do_not_pay(target: VllmTarget) -> None:
    async with AsyncExitStack() as stack:
        sequence = await stack.enter_async_context(target.sequence([1]))
        for _ in range(MEASURED_ROUND_STREAMS - 1):
            await stack.enter_async_context(target.sequence([2]))
        assert sequence.drafts_pay
        async with target.sequence([3]) as one_more:
            assert not sequence.drafts_pay
            assert not one_more.drafts_pay
        assert sequence.drafts_pay
    assert target.num_sequences == 0
