"""On vLLM, too, every mode gives the target's own text: greedy and sampled, alone and in company."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import prometheus_client
import pytest
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.vllm import VllmTarget
from edge_agent.remote import Meter
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling, draw
from tests.service import Completion, eventually, generate, speculate
from tests.vllm_streams import random_requests, rendered

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

_ids = itertools.count()


async def vllm_alone(target: VllmTarget, request: Open) -> list[int]:
    """What plain vLLM makes of a greedy request, with nothing of ours between."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(target.end_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = tokens_input(rendered(target, request))
    [answer] = [a async for a in target.llm.generate(prompt, params, request_id=f"alone-{next(_ids)}")]
    return list(answer.outputs[0].token_ids)


async def test_greedy_text_is_vllms_own_on_50_prompts(pair: Any) -> None:
    num_drafted = num_accepted = 0
    for i, request in enumerate(random_requests(50, seed=0, samplings=[Sampling()])):
        expected = await vllm_alone(pair.target, request)
        speculated = await speculate(pair.edge, pair.cloud, request, max_draft_tokens=1 + i % 8)
        assert (await generate(pair.cloud, request)).token_ids == expected, request
        assert speculated.token_ids == expected, request
        num_drafted += speculated.num_drafted
        num_accepted += speculated.num_accepted
    print(f"accepted {num_accepted} of {num_drafted} draft tokens ({num_accepted / num_drafted:.0%})")
    assert 0 < num_accepted < num_drafted


async def test_cloud_and_speculate_draw_the_same_text_for_the_same_seed(pair: Any) -> None:
    assert pair.target.streams_noise, "the engine itself applies the rule"
    for i, request in enumerate(random_requests(32, seed=1)):
        streamed = await generate(pair.cloud, request)
        speculated = await speculate(pair.edge, pair.cloud, request, max_draft_tokens=1 + i % 8)
        assert streamed.token_ids == speculated.token_ids, request
        assert streamed.reason is speculated.reason


async def test_a_stream_is_drawn_from_the_rows_of_its_text(target: VllmTarget) -> None:
    for request in random_requests(8, seed=2):
        prompt = rendered(target, request)
        async with target.sequence(prompt) as sequence:
            made = [new async for new in sequence.generate(prompt, options_of(target, request))]
            text = list(itertools.chain(*made))
            scores = await sequence.score(
                [*prompt, *text[:-1]], num_rows=len(text), width=request.sampling.row_width
            )
        assert draw(scores.rows, request.sampling, request.seed, 0).tolist() == text


def options_of(target: VllmTarget, request: Open) -> GenerateOptions:
    assert request.max_tokens is not None
    return GenerateOptions(
        sampling=request.sampling,
        seed=request.seed,
        start=0,
        max_tokens=request.max_tokens,
        end_token_ids=target.end_token_ids,
    )


async def test_a_round_for_each_token_gives_the_stream_where_the_engine_cannot_draw(
    target: VllmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    for request in random_requests(4, seed=3):
        prompt = rendered(target, request)
        made = []
        for streams_noise in (True, False):
            monkeypatch.setattr(target, "streams_noise", streams_noise)
            async with target.sequence(prompt) as sequence:
                tokens = [new async for new in sequence.generate(prompt, options_of(target, request))]
            made.append(list(itertools.chain(*tokens)))
        assert made[0] == made[1]


async def test_a_resume_after_a_disconnect_gives_the_rest_of_the_same_text(pair: Any) -> None:
    for request in random_requests(6, seed=4):
        whole = (await generate(pair.cloud, request)).token_ids
        tokens = pair.cloud.generate(request, Meter())
        shown: list[int] = []
        async for message in tokens:
            shown += message.token_ids if isinstance(message, Tokens) else ()
            if len(shown) >= 5:
                break
        await tokens.aclose()
        assert shown
        assert shown == whole[: len(shown)]
        resumed = replace(request, committed=tuple(shown))
        assert (await speculate(pair.edge, pair.cloud, resumed, 4)).token_ids == whole[len(shown) :]
        assert (await generate(pair.cloud, resumed)).token_ids == whole[len(shown) :]


async def test_16_streams_at_once_get_what_each_gets_alone_preempted_ones_too(pair: Any) -> None:
    requests = [
        Open(
            prompt=(Message("user", f"Count to {i}" + " and on" * i),),
            sampling=Sampling(temperature=i % 2),
            seed=i,
            max_tokens=150,
        )
        for i in range(16)
    ]

    async def run(i: int) -> Completion:
        if i % 3 == 0:
            return await speculate(pair.edge, pair.cloud, requests[i], 1 + i % 8)
        return await generate(pair.cloud, requests[i])

    alone = [(await run(i)).token_ids for i in range(16)]
    preemptions = num_preemptions()
    together = await asyncio.gather(*(run(i) for i in range(16)))
    assert [completion.token_ids for completion in together] == alone
    assert num_preemptions() > preemptions, "the streams do not fit the cache together"
    await eventually(lambda: pair.target.num_requests == 0)


def num_preemptions() -> float:
    return sum(
        sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:num_preemptions_total"
    )


async def test_500_draws_follow_the_targets_distribution(target: VllmTarget) -> None:
    request = Open(prompt=(Message("user", "Go on"),), sampling=Sampling(temperature=1.0, top_k=4), seed=0)
    prompt = rendered(target, request)

    async def first_token(seed: int) -> int:
        options = replace(options_of(target, replace(request, max_tokens=1)), seed=seed)
        async with target.sequence(prompt) as sequence:
            [[token]] = [new async for new in sequence.generate(prompt, options)]
        return token

    drawn = await asyncio.gather(*(first_token(seed) for seed in range(500)))
    async with target.sequence(prompt) as sequence:
        rows = (await sequence.score(prompt, num_rows=1, width=4)).rows
    weights = np.exp(rows.logprobs[0])
    expected = 500 * weights / weights.sum()
    counted = np.array([drawn.count(int(token)) for token in rows.token_ids[0]])
    assert counted.sum() == 500, "nothing outside the top-k"
    assert expected.min() > 5, "every cell is large enough for the test"
    assert np.sum((counted - expected) ** 2 / expected) < 16.27, "chi-square of 3 degrees, p > 0.001"
