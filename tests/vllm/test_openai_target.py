"""`--target openai` against a real `vllm serve` on the CPU: the upstream's own text by both endpoints."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud_service.targets.hf_text import HfText
from cloud_service.targets.openai_http import OpenAiTarget, Service, Upstream, inspect
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from shared.errors import CloudUnavailable
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from shared.shaping import Shaping
from tests.ports import free_port
from tests.service import (
    connection,
    generate,
    in_process_cloud,
    loaded_edge,
    run_duet,
    running_cloud,
    serving,
    speculate,
)
from tests.tiny_pair import PADDED_VOCAB_SIZE, TinyPair
from tests.vllm_streams import random_requests, rendered

pytestmark = pytest.mark.vllm

START_WITHIN_S = 240.0
STREAMING = Open(prompt=(Message("user", "Tell me a story."),), sampling=Sampling(), seed=0, max_tokens=400)


@dataclass
class VllmServe:
    """A running `vllm serve`."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it and its engine at once, as a machine that loses power does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def upstream(tiny_pair: TinyPair) -> Iterator[VllmServe]:
    port = free_port()
    settings = {
        "model": tiny_pair.target_hf,
        "served-model-name": "tiny",
        "dtype": "float32",
        "block-size": 32,
        "max-model-len": 512,
        "max-logprobs": 80,
        "host": "127.0.0.1",
        "port": port,
    }
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *(f"--{name}={value}" for name, value in settings.items()),
            *("--enforce-eager", "--enable-scale-out", "--enable-prompt-tokens-details"),
        ],
        start_new_session=True,
    )
    serve = VllmServe(f"http://127.0.0.1:{port}", process)
    try:
        wait_until_healthy(serve)
        yield serve
    finally:
        serve.kill()


def wait_until_healthy(serve: VllmServe) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        assert serve.process.poll() is None, "vllm serve did not start"
        try:
            if httpx.get(f"{serve.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("vllm serve did not answer in time")


WAYS: dict[str, dict[str, bool]] = {
    "token ids and the cache": {},
    "token ids without the cache": {"tells_cached": False},
    "completions": {"by_tokens": False, "tells_cached": False},
}
"""What an upstream started with fewer flags would say of itself."""


@dataclass(frozen=True)
class Served:
    edge: EdgeModel
    cloud: Cloud
    target: OpenAiTarget
    service: Service


@asynccontextmanager
async def served(upstream: VllmServe, pair: TinyPair, **less: bool) -> AsyncIterator[Served]:
    """An edge with the draft, connected to a service over the upstream."""
    client = Upstream(upstream.url)
    service = replace(await inspect(client), **less)
    text = HfText.load(service.source, service.model, vocab_size=PADDED_VOCAB_SIZE)
    target = OpenAiTarget(client, service, text)
    async with (
        serving(target) as (address, _),
        loaded_edge(pair.draft_gguf) as edge,
        connection(address) as cloud,
    ):
        yield Served(edge, cloud, target, service)
    await target.close()


@pytest.fixture(params=WAYS)
async def each_way(
    request: pytest.FixtureRequest, upstream: VllmServe, tiny_pair: TinyPair
) -> AsyncIterator[Served]:
    async with served(upstream, tiny_pair, **WAYS[request.param]) as one:
        yield one


async def vllm_alone(upstream: VllmServe, target: OpenAiTarget, request: Open) -> list[int]:
    """What the upstream makes of a greedy request, with nothing of ours between."""
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": rendered(target, request),
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stop_token_ids": sorted(target.end_token_ids),
        "return_token_ids": True,
    }
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{upstream.url}/v1/completions", json=body)
    made: list[int] = answer.json()["choices"][0]["token_ids"]
    return made


async def test_the_upstream_says_what_it_is(upstream: VllmServe, tiny_pair: TinyPair) -> None:
    client = Upstream(upstream.url)
    assert await inspect(client) == Service(
        model="tiny",
        source=str(tiny_pair.target_hf),
        context_tokens=512,
        by_tokens=True,
        tells_cached=True,
    )
    await client.close()


async def test_greedy_text_is_the_upstreams_own_in_both_modes(each_way: Served, upstream: VllmServe) -> None:
    num_drafted = num_accepted = 0
    for i, request in enumerate(random_requests(10, seed=0, samplings=[Sampling()])):
        expected = await vllm_alone(upstream, each_way.target, request)
        speculated = await speculate(each_way.edge, each_way.cloud, request, max_draft_tokens=1 + i % 8)
        assert (await generate(each_way.cloud, request)).token_ids == expected, request
        assert speculated.token_ids == expected, request
        num_drafted += speculated.num_drafted
        num_accepted += speculated.num_accepted
    print(f"rounds without the cache: {each_way.target.num_repeated_rounds}")
    assert 0 < num_accepted < num_drafted


async def test_cloud_and_speculate_draw_the_same_text_for_the_same_seed(each_way: Served) -> None:
    for i, request in enumerate(random_requests(6, seed=1)):
        direct = await generate(each_way.cloud, request)
        speculated = await speculate(each_way.edge, each_way.cloud, request, max_draft_tokens=1 + i % 8)
        assert direct.token_ids == speculated.token_ids, request
        assert direct.reason is speculated.reason


async def test_a_cloud_stream_without_a_seed_is_the_upstreams_own(each_way: Served) -> None:
    drawn = Sampling(temperature=1.0, top_k=2)
    [request] = random_requests(1, seed=2, samplings=[drawn])
    free = replace(request, any_noise=True)
    texts = [(await generate(each_way.cloud, free)).token_ids for _ in range(4)]
    assert len(set(map(tuple, texts))) > 1, "no seed repeats it"
    for text in texts:
        prompt = rendered(each_way.target, free)
        async with each_way.target.sequence(prompt) as sequence:
            rows = (await sequence.score(prompt + text[:-1], num_rows=len(text), width=2)).rows
        assert all(token in row for token, row in zip(text, rows.token_ids, strict=True)), "of the top 2"
    async with each_way.cloud.speculate(free, Meter()) as stream:
        assert not stream.opened.own_noise, "its rows are drawn from here"
    assert (await generate(each_way.cloud, request)).token_ids == (
        await generate(each_way.cloud, request)
    ).token_ids


async def test_penalties_and_a_bias_are_honoured_by_the_upstream(
    each_way: Served, tiny_pair: TinyPair
) -> None:
    shaping = Shaping(presence_penalty=0.5, repetition_penalty=1.3, logit_bias=((70, 3.0),))
    async with in_process_cloud(tiny_pair.target_gguf) as ours, connection(ours.address) as on_llama_cpp:
        for request in random_requests(3, seed=5, samplings=[Sampling()]):
            shaped = replace(request, shaping=shaping)
            text = (await generate(each_way.cloud, shaped)).token_ids
            assert text == (await generate(on_llama_cpp, shaped)).token_ids
            assert text != (await generate(each_way.cloud, request)).token_ids


async def test_a_round_computes_its_new_tokens_and_one_block_at_most(
    upstream: VllmServe, tiny_pair: TinyPair
) -> None:
    """But for rounds that ran again: cached rows may hold a NaN, which the upstream cannot answer."""
    num_kept = 0
    async with served(upstream, tiny_pair) as one:
        for first in range(1, 9):
            text = [first, *(1 + i % 200 for i in range(200))]
            async with one.target.sequence(text) as sequence:
                await sequence.score(text, num_rows=1, width=1)
                before, repeated = sequence.num_computed_tokens, one.target.num_repeated_rounds
                await sequence.score([*text, 100, 101, 102, 103], num_rows=5, width=1)
                if one.target.num_repeated_rounds == repeated:
                    num_kept += 1
                    assert sequence.num_computed_tokens - before <= 4 + 1 + 32
    assert num_kept


async def test_rows_of_a_cached_draft_are_those_without_the_cache(
    upstream: VllmServe, tiny_pair: TinyPair
) -> None:
    text = [1 + i * 7 % 200 for i in range(97)]
    async with served(upstream, tiny_pair) as one:
        found = []
        for _ in range(2):  # the second time all of its blocks are cached
            async with one.target.sequence(text) as sequence:
                found.append((await sequence.score(text, num_rows=33, width=4)).rows)
        assert one.target.num_repeated_rounds == 1
        assert found[0].token_ids.tolist() == found[1].token_ids.tolist()
        assert abs(found[0].logprobs - found[1].logprobs).max() < 1e-4


async def test_many_streams_are_in_flight_together(upstream: VllmServe, tiny_pair: TinyPair) -> None:
    async with served(upstream, tiny_pair) as one:
        requests = random_requests(8, seed=3)
        alone = [(await generate(one.cloud, request)).token_ids for request in requests]
        together = await asyncio.gather(*(generate(one.cloud, request) for request in requests))
    assert [completion.token_ids for completion in together] == alone


# When something is wrong


def test_a_wrong_url_is_reported_in_one_line(tmp_path: Path) -> None:
    flags = ("--target=openai", "--upstream=http://127.0.0.1:1", "--listen=127.0.0.1:0")
    ended = run_duet("serve", *flags, folder=tmp_path, program="duet-cloud")
    assert ended.returncode == 5
    [line] = ended.stderr.decode().splitlines()
    assert "http://127.0.0.1:1" in line
    assert "is `vllm serve` running there?" in line


def test_without_a_url_the_setting_is_named(tmp_path: Path) -> None:
    ended = run_duet("serve", "--target=openai", folder=tmp_path, program="duet-cloud")
    assert ended.returncode == 2
    assert b"--upstream" in ended.stderr


async def test_an_upstream_that_goes_ends_streams_as_unavailable(
    upstream: VllmServe, tiny_pair: TinyPair
) -> None:
    """The last test: it ends the upstream."""
    flags = {"target": "openai", "upstream": upstream.url, "listen": "127.0.0.1:0"}
    with running_cloud(tiny_pair.target_hf, **flags) as service:
        async with connection(service.address) as cloud:
            with pytest.raises(CloudUnavailable) as caught:
                await stream_from_a_dying_upstream(cloud, upstream)
            assert upstream.process.poll() is not None, "it went in the middle of the stream"
            assert "\n" not in str(caught.value)
            with pytest.raises(CloudUnavailable, match=upstream.url):
                await generate(cloud, STREAMING)
        assert service.process.poll() is None, "it may come back"


async def stream_from_a_dying_upstream(cloud: Cloud, upstream: VllmServe) -> None:
    async for message in cloud.generate(STREAMING, Meter()):
        if isinstance(message, Tokens):
            upstream.kill()
