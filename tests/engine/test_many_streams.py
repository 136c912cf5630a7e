"""Many streams on one target: each gets what it gets alone, none waits for the others' prompts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any

import pytest
from numpy.typing import NDArray

from cloud_service.targets.base import GenerateOptions
from edge_agent.remote import Cloud, Meter
from shared.llama import Extension, LlamaContext
from shared.messages import Finished, Message, Open
from shared.sampling import Sampling
from tests.service import (
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    generate,
    in_process_cloud,
    loaded_edge,
    speculate,
)
from tests.tiny_pair import NUM_PLAIN_TOKENS, TinyPair

pytestmark = pytest.mark.engine


def request(question: str = "Tell me a story.", **fields: Any) -> Open:
    defaults: dict[str, Any] = {"sampling": Sampling(), "seed": 0, "max_tokens": 24}
    return Open(prompt=(Message("user", question),), **(defaults | fields))


def prompt(num_tokens: int, *, seed: int = 0) -> list[int]:
    """Plain token ids that look random; prompts of different seeds share no prefix."""
    return [(seed * 101 + 37 * i + i * i // 7) % NUM_PLAIN_TOKENS for i in range(num_tokens)]


def options(max_tokens: int) -> GenerateOptions:
    """Greedy, to the last of `max_tokens`."""
    return GenerateOptions(
        sampling=Sampling(), seed=0, start=0, max_tokens=max_tokens, end_token_ids=frozenset()
    )


class Passes:
    """Every pass of a context: what it held, how long it is held up, how long it shall take."""

    def __init__(self, context: LlamaContext) -> None:
        self.begun: list[list[Extension]] = []
        self._open, self._held = threading.Event(), threading.Event()
        self._open.set()
        self.base_s = self.per_token_s = 0.0
        self._decode = context.decode

    def decode(self, work: Sequence[Extension]) -> list[list[NDArray]]:
        self.begun.append(list(work))
        if not self._open.is_set():
            self._held.set()
            self._open.wait()
        time.sleep(self.base_s + self.per_token_s * sum(len(item.token_ids) for item in work))
        return self._decode(work)

    async def hold(self) -> None:
        """Come back when a pass has begun that does not go on before `release`."""
        self._held.clear()
        self._open.clear()
        await eventually(self._held.is_set)

    def release(self) -> None:
        self._open.set()


@contextmanager
def watched(service: InProcessCloud) -> Iterator[Passes]:
    passes = Passes(service.context)
    service.context.decode = passes.decode
    try:
        yield passes
    finally:
        passes.release()


# The same text


@pytest.mark.parametrize("slots", [16, 5])
async def test_sixteen_streams_of_mixed_length_get_what_each_gets_alone(
    tiny_pair: TinyPair, alone: TargetAlone, slots: int
) -> None:
    requests = [
        request(
            f"{i} " + "more and more " * (i * i % 23),
            sampling=Sampling(temperature=i // 2 % 2),
            seed=i,
            max_tokens=1 + i * 29 % 64,
        )
        for i in range(16)
    ]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=slots) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        with watched(service) as passes:
            made = await asyncio.gather(
                *(
                    speculate(edge, cloud, each, 1 + i % 7) if i % 2 else generate(cloud, each)
                    for i, each in enumerate(requests)
                )
            )
        assert [completion.token_ids for completion in made] == [alone.complete(each) for each in requests]
        assert max(len(batch) for batch in passes.begun) > slots // 2, "streams share their passes"
        await eventually(lambda: service.is_idle)


# Slots


async def test_a_cancelled_stream_frees_its_slot_before_the_pass_that_it_is_in_has_ended(
    tiny_pair: TinyPair,
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1) as service,
        connection(service.address) as cloud,
    ):
        with watched(service) as passes:
            tokens = cloud.generate(request(max_tokens=400), Meter())
            for _ in range(3):
                await anext(tokens)
            await passes.hold()
            begun = len(passes.begun)
            await tokens.aclose()
            await eventually(lambda: service.is_idle)
            passes.release()
            assert (await generate(cloud, request("Another.", max_tokens=1))).token_ids
            later = [item for batch in passes.begun[begun:] for item in batch]
            assert len(passes.begun) - begun == len(later), "nobody shares the newcomer's passes"
            assert sum(item.num_rows for item in later) == 1, "nothing is read for the one that left"


async def test_a_cancelled_stream_is_in_no_pass_that_begins_later(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        service.target.sequence([]) as staying,
    ):
        with watched(service) as passes:
            passes.base_s = 0.002
            stays = staying.generate(prompt(8), options(200))
            await anext(stays)
            async with (
                service.target.sequence([]) as leaving,
                aclosing(leaving.generate(prompt(8, seed=1), options(400))) as leaves,
            ):
                for _ in range(3):
                    await anext(leaves)
                await passes.hold()
            begun = len(passes.begun)
            assert any(len(batch) == 2 for batch in passes.begun)
            assert service.target.num_free_slots == 1
            passes.release()
            for _ in range(20):
                await anext(stays)
            assert len(passes.begun) > begun
            assert all(len(batch) == 1 for batch in passes.begun[begun:])
            await stays.aclose()


async def num_computed(cloud: Cloud, text: Sequence[int]) -> int:
    """How many tokens the target evaluates to read a text and say one token."""
    opening = Open(prompt=tuple(text), sampling=Sampling(), seed=0, max_tokens=1)
    finished = [message async for message in cloud.generate(opening, Meter())][-1]
    assert isinstance(finished, Finished)
    assert finished.usage.prompt_tokens == len(text)
    return finished.usage.target_tokens


async def test_a_prefix_in_a_free_slot_is_not_computed_again(tiny_pair: TinyPair) -> None:
    first, other = prompt(300), prompt(200, seed=1)
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        connection(service.address) as cloud,
    ):
        assert await num_computed(cloud, first) == 300
        assert await num_computed(cloud, other) == 200
        assert await num_computed(cloud, [*first, *prompt(10, seed=2)]) == 10
        assert await num_computed(cloud, other) == 1


async def test_the_prefix_that_was_not_used_for_longest_makes_room(tiny_pair: TinyPair) -> None:
    texts = [prompt(100, seed=seed) for seed in range(3)]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        connection(service.address) as cloud,
    ):
        for i in (0, 1, 0, 2):
            await num_computed(cloud, texts[i])
        assert await num_computed(cloud, texts[0]) == 1
        assert await num_computed(cloud, texts[1]) == 100


async def test_a_chat_that_shares_only_the_template_with_another_leaves_its_slot_alone(
    tiny_pair: TinyPair,
) -> None:
    header = prompt(20, seed=9)
    first, second = [*header, *prompt(100, seed=0)], [*header, *prompt(100, seed=1)]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        connection(service.address) as cloud,
    ):
        await num_computed(cloud, first)
        assert await num_computed(cloud, second) == 120
        assert await num_computed(cloud, first) == 1


async def test_a_running_stream_is_never_evicted(tiny_pair: TinyPair) -> None:
    text = prompt(100)
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        connection(service.address) as cloud,
        service.target.sequence(text) as running,
    ):
        for _ in range(3):
            await running.score(text, num_rows=1, width=1)
            for seed in (1, 2, 0):  # the last has the running stream's very prompt
                assert await num_computed(cloud, prompt(100, seed=seed)) == 100
            text.append(65)
        assert running.num_computed_tokens == 100 + 2


# Fairness


async def test_streams_that_are_written_get_a_token_in_every_pass_while_a_prompt_is_read(
    tiny_pair: TinyPair,
) -> None:
    num_writing = 3
    async with in_process_cloud(tiny_pair.target_gguf, slots=num_writing + 1) as service:
        with watched(service) as passes:
            passes.base_s, passes.per_token_s = 0.002, 0.0005
            writing = [asyncio.create_task(write(service, prompt(8, seed=i))) for i in range(num_writing)]
            await eventually(lambda: any(len(batch) == num_writing for batch in passes.begun))
            slots = {item.sequence for batch in passes.begun for item in batch}
            async with service.target.sequence([]) as reading:
                begun = len(passes.begun)
                await reading.score(prompt(400, seed=9), num_rows=1, width=1)
                assert reading.num_computed_tokens == 400
                seen = passes.begun[begun:]
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
    taken = [{item.sequence: len(item.token_ids) for item in batch} for batch in seen]
    assert sum(len(counts) > num_writing for counts in taken) >= 5, "the prompt is read in chunks"
    assert all(counts.get(slot) == 1 for counts in taken for slot in slots)


async def write(service: InProcessCloud, text: list[int]) -> None:
    async with service.target.sequence(text) as sequence:
        async for _ in sequence.generate(text, options(400)):
            pass


async def test_two_prompts_are_read_side_by_side_and_the_short_one_is_not_held_up(
    tiny_pair: TinyPair,
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2) as service,
        service.target.sequence([]) as long,
        service.target.sequence([]) as short,
    ):
        with watched(service) as passes:
            passes.base_s = 0.002
            reading = asyncio.create_task(long.score(prompt(500), num_rows=1, width=1))
            await eventually(lambda: len(passes.begun) >= 1)
            await short.score(prompt(30, seed=1), num_rows=1, width=1)
            assert not reading.done()
            await reading


# Tenants


async def test_a_prefix_of_one_tenant_is_computed_again_for_another(tiny_pair: TinyPair) -> None:
    text = prompt(200)
    async with in_process_cloud(tiny_pair.target_gguf, slots=2) as service:

        async def num_computed(tenant: str | None) -> int:
            async with service.target.sequence(text, tenant=tenant) as sequence:
                await sequence.score(text, num_rows=1, width=1)
                return sequence.num_computed_tokens

        assert await num_computed("alice") == 200
        assert await num_computed("alice") == 1, "her own text is there"
        assert await num_computed("bob") == 200
        assert await num_computed(None) == 200, "nobody in particular is a tenant like any other"
        assert await num_computed("alice") == 200, "her slot went to somebody else meanwhile"


async def test_a_slot_that_was_taken_and_never_used_is_not_read_by_the_next_tenant(
    tiny_pair: TinyPair,
) -> None:
    text = prompt(100)
    async with in_process_cloud(tiny_pair.target_gguf, slots=1) as service:
        async with service.target.sequence(text, tenant="alice") as sequence:
            await sequence.score(text, num_rows=1, width=1)
        async with service.target.sequence(text, tenant="bob"):
            pass  # it left before it asked for anything
        async with service.target.sequence(text, tenant="bob") as sequence:
            await sequence.score(text, num_rows=1, width=1)
            assert sequence.num_computed_tokens == 100


async def test_a_tenant_with_many_streams_does_not_hold_up_one_with_a_single_stream(
    tiny_pair: TinyPair,
) -> None:
    num_greedy = 6
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=num_greedy + 1) as service,
        AsyncExitStack() as stack,
    ):
        greedy = [
            await stack.enter_async_context(service.target.sequence([], tenant="greedy"))
            for _ in range(num_greedy)
        ]
        single = await stack.enter_async_context(service.target.sequence([], tenant="single"))
        with watched(service) as passes:
            passes.base_s = 0.002
            reading = [
                asyncio.create_task(sequence.score(prompt(450, seed=i), num_rows=1, width=1))
                for i, sequence in enumerate(greedy)
            ]
            await eventually(lambda: len(passes.begun) >= 2)
            await single.score(prompt(300, seed=9), num_rows=1, width=1)
            done = sum(sequence.num_computed_tokens for sequence in greedy)
            assert done <= 300 + 4 * 64, "the single stream got as much as the six together"
            assert not any(task.done() for task in reading)
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
