"""Drafting while verdicts travel: the target's own text still, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.drafting.drafters import Drafters
from edge_agent.pacing import Pacing
from edge_agent.remote import Meter, SpeculateStream
from edge_agent.speculation import speculate as steps_of
from shared.config import EdgeConfig
from shared.draft_ahead import Pace
from shared.drafts import Source
from shared.errors import InvalidDraft
from shared.events import Answer, Token
from shared.llama import DecodeAborted
from shared.messages import Draft, Message, Open
from shared.sampling import Sampling
from shared.session import Origin
from tests.engine.test_lossless import random_requests
from tests.scripted_target import ScriptedTarget
from tests.service import (
    TargetAlone,
    connection,
    eventually,
    in_process_cloud,
    loaded_edge,
    serving,
    speculate,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

WINDOWS = (1, 2, 3, 5, 8, 13, 21, 32)


# The same text


@pytest.mark.parametrize("step_s", [0.0, 0.005], ids=["a fast target", "a slow target"])
async def test_proactive_drafts_give_what_the_target_gives_alone(
    tiny_pair: TinyPair, alone: TargetAlone, step_s: float
) -> None:
    num_drafted = num_accepted = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf, step_s=step_s) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for i, request in enumerate(random_requests(96, seed=3)):
            made = await speculate(edge, cloud, request, 1 + i % 6, window=WINDOWS[i % len(WINDOWS)])
            assert made.token_ids == alone.complete(request), request
            num_drafted += made.num_drafted
            num_accepted += made.num_accepted
        await eventually(lambda: service.is_idle)
    assert 0 < num_accepted < num_drafted


async def test_four_streams_that_share_an_edge_model_get_what_each_gets_alone(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    requests = random_requests(16, seed=4)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for i in range(0, len(requests), 4):
            together = requests[i : i + 4]
            made = await asyncio.gather(
                *(speculate(edge, cloud, each, 2 + n, window=4 + 8 * n) for n, each in enumerate(together))
            )
            assert [each.token_ids for each in made] == [alone.complete(each) for each in together]
        await eventually(lambda: service.is_idle)


async def test_a_resume_drafts_on_from_what_is_committed(tiny_pair: TinyPair, alone: TargetAlone) -> None:
    rng = np.random.default_rng(5)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(16, seed=5):
            expected = alone.complete(request)
            cut = int(rng.integers(len(expected) + 1))
            resumed = replace(request, committed=tuple(expected[:cut]))
            assert (await speculate(edge, cloud, resumed, 3, window=12)).token_ids == expected[cut:]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 9])
async def test_the_limit_is_met_exactly(tiny_pair: TinyPair, alone: TargetAlone, max_tokens: int) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(8, seed=max_tokens):
            request = replace(request, max_tokens=max_tokens)
            made = await speculate(edge, cloud, request, 2, window=4)
            assert made.token_ids == alone.complete(request)


async def test_drafts_that_stop_when_unsure_give_the_same_text_in_more_rounds(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    rounds = {0.0: 0, 0.7: 0, 1.0: 0}
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(8, seed=6):
            expected = alone.complete(request)
            for threshold in rounds:
                made = await speculate(edge, cloud, request, 4, stop_below=threshold, window=16)
                assert made.token_ids == expected
                rounds[threshold] += made.num_rounds if threshold < 1.0 else made.num_drafted
    assert rounds[1.0] == 0, "a threshold of 1 drafts nothing"
    assert rounds[0.7] > rounds[0.0]


async def test_every_accepted_token_says_who_proposed_it(tiny_pair: TinyPair) -> None:
    [request] = random_requests(1, seed=7)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        made = await speculate(edge, cloud, request, 4, window=16)
    by_origin = dict.fromkeys(zip(made.origins, made.sources, strict=True))
    assert (Origin.ACCEPTED, Source.MODEL) in by_origin
    assert {source for origin, source in by_origin if origin is not Origin.ACCEPTED} <= {None}
    assert {source for origin, source in by_origin if origin is Origin.ACCEPTED} == {Source.MODEL}


async def test_drafts_do_not_wait_for_verdicts(tiny_pair: TinyPair) -> None:
    """Where passes are slow, several drafts share a verdict; stop-and-wait has one for each."""
    request = replace(random_requests(1, seed=8)[0], sampling=Sampling())
    rounds = {}
    async with (
        in_process_cloud(tiny_pair.target_gguf, step_s=0.03) as service,
        loaded_edge(tiny_pair.target_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for window in (None, 16):
            rounds[window] = (await speculate(edge, cloud, request, 2, window=window)).num_rounds
    assert rounds[16] < rounds[None]


# Ending early


async def test_a_stop_string_ends_the_answer_where_the_target_wrote_it(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf, mode="speculate") as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(200, seed=9):
            if not request.sampling.greedy:
                continue
            whole = alone.shown(alone.complete(request))
            stop = whole[len(whole) // 2 :][:2]
            if len(stop) < 2 or "\ufffd" in whole:
                continue
            config = EdgeConfig(
                mode="speculate", seed=0, max_tokens=request.max_tokens, stop=(stop,), max_in_flight_tokens=16
            )
            agent = Agent(config, edge=edge, cloud=cloud)
            async with aclosing(agent.chat(list(request.prompt))) as events:
                answers = [event async for event in events if isinstance(event, Answer)]
            assert answers[0].answer == whole[: whole.index(stop)]
        await eventually(lambda: service.is_idle)


@pytest.mark.parametrize("num_before", [0, 1, 5])
async def test_streams_that_are_cancelled_free_their_slots_and_the_next_answer_is_right(
    tiny_pair: TinyPair, alone: TargetAlone, num_before: int
) -> None:
    requests = random_requests(12, seed=10)
    pace = Pace(max_draft_tokens=3, max_in_flight_tokens=24)
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2, step_s=0.01) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):

        async def begin(request: Open) -> None:
            seen = 0
            async with aclosing(steps_of(Drafters(edge), cloud, request, Pacing(pace), Meter())) as steps:
                async for step in steps:
                    seen += isinstance(step, Token)
                    if seen >= num_before:
                        return

        for first, second in zip(requests[::2], requests[1::2], strict=True):
            await asyncio.gather(begin(first), begin(second))
        await eventually(lambda: service.is_idle)
        await eventually(edge._worker._thread._work_queue.empty)
        request = requests[0]
        assert (await speculate(edge, cloud, request, 4, window=8)).token_ids == alone.complete(request)


async def test_cancelling_one_stream_stops_no_other_streams_work_on_the_edge_model(
    tiny_pair: TinyPair,
) -> None:
    async with loaded_edge(tiny_pair.draft_gguf) as edge:
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def long_work() -> list[int]:
            loop.call_soon_threadsafe(begun.set)
            go_on.wait()
            edge.context.align(0, [])
            edge.context.extend(0, list(range(200)), 1)
            return edge.context.cached[0]

        working = asyncio.create_task(edge.run(long_work))
        await begun.wait()
        queued = asyncio.create_task(edge.run(lambda: pytest.fail("it was cancelled before it began")))
        await asyncio.sleep(0)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        go_on.set()
        assert await working == list(range(200))


async def test_a_cancelled_decode_ends_and_leaves_the_model_usable(tiny_pair: TinyPair) -> None:
    async with loaded_edge(tiny_pair.draft_gguf) as edge:
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()
        ends: list[str] = []

        def endless() -> None:
            loop.call_soon_threadsafe(begun.set)
            try:
                while True:
                    edge.context.align(0, [])
                    edge.context.extend(0, list(range(200)), 1)
            except DecodeAborted:
                ends.append("aborted")
                raise

        task = asyncio.create_task(edge.run(endless))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ends == ["aborted"]
        await edge.run(lambda: edge.context.extend(0, [1], 1))


# Refusals


async def test_an_edge_whose_draft_is_refused_while_it_writes_the_next_learns_why() -> None:
    """grpc.aio alone would say INTERNAL for most of these: the write fails before the reason is read."""
    request = Open(prompt=(65,), sampling=Sampling(), seed=0, max_tokens=1000)
    async with (
        serving(ScriptedTarget(lambda text: 65)) as (address, servicer),
        connection(address) as cloud,
    ):
        for _ in range(100):
            async with cloud.speculate(request, Meter()) as stream:
                await stream.send(Draft(0, 7, (65,), more=True))
                for start in range(8, 100):
                    await stream.send(Draft(0, start, (65,), more=True))
                    await asyncio.sleep(0)
                with pytest.raises(InvalidDraft, match="draft starts at 7, expected 0"):
                    await stream.receive()
        await eventually(lambda: servicer.num_streams == 0)


# A request that travels


async def test_the_edge_reads_the_prompt_while_the_request_travels(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first draft comes no later for a link that takes its time to answer."""
    question = Message("user", "Name the three primary colours of light, and say why they are three.")
    request = Open(prompt=(question,), sampling=Sampling(temperature=0.0), seed=0, max_tokens=4)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        prompt = edge.model.render_chat([question])
        opens = cloud.speculate

        @asynccontextmanager
        async def held(request: Open, meter: Meter) -> AsyncIterator[SpeculateStream]:
            await eventually(lambda: edge.context.cached[edge.sequence] == prompt[:-1])
            assert edge.context.num_decoded_tokens == len(prompt) - 1
            async with opens(request, meter) as stream:
                yield stream

        monkeypatch.setattr(cloud, "speculate", held)
        await speculate(edge, cloud, request, 4)
        assert edge.context.num_decoded_tokens < 2 * len(prompt) - 1, "the prompt was read once"
