"""Penalties, a bias and forms of the text on a vLLM target: its own sampler honours them, or it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from edge_agent.remote import Cloud
from shared.errors import InvalidRequest
from shared.messages import Open
from shared.sampling import Sampling
from shared.shaping import Shaping
from tests.service import connection, generate, in_process_cloud
from tests.tiny_pair import TinyPair
from tests.vllm.conftest import Pair
from tests.vllm_streams import random_requests

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

SHAPINGS = {
    "presence": Shaping(presence_penalty=1.5),
    "frequency": Shaping(frequency_penalty=0.8),
    "repetition": Shaping(repetition_penalty=1.4),
    "bias": Shaping(logit_bias=((65, 3.0), (66, -100.0), (120, 2.0))),
    "all of them": Shaping(
        presence_penalty=0.5, frequency_penalty=-0.3, repetition_penalty=1.2, logit_bias=((70, 4.0),)
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def on_llama_cpp(tiny_pair: TinyPair) -> AsyncIterator[Cloud]:
    """The same weights, under our own shaping of the logits."""
    async with in_process_cloud(tiny_pair.target_gguf) as service, connection(service.address) as cloud:
        yield cloud


@pytest.mark.parametrize("shaping", SHAPINGS.values(), ids=SHAPINGS)
async def test_greedy_text_is_that_of_our_own_shaping(
    pair: Pair, on_llama_cpp: Cloud, shaping: Shaping
) -> None:
    changed = 0
    for request in random_requests(4, seed=5, samplings=[Sampling()]):
        shaped = replace(request, shaping=shaping)
        text = (await generate(pair.cloud, shaped)).token_ids
        assert text == (await generate(on_llama_cpp, shaped)).token_ids
        changed += text != (await generate(pair.cloud, request)).token_ids
    assert changed, "the shaping does something"


async def test_a_drawn_text_is_a_function_of_its_seed(pair: Pair) -> None:
    [request] = random_requests(1, seed=6, samplings=[Sampling(temperature=1.0)])
    shaped = replace(request, shaping=Shaping(presence_penalty=0.5))
    texts = [(await generate(pair.cloud, replace(shaped, seed=seed))).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("form", [{"json_schema": '{"type": "object"}'}, {"grammar": 'root ::= "a"'}])
async def test_a_form_of_the_text_is_refused_by_name(pair: Pair, form: dict[str, str]) -> None:
    request: Open = replace(random_requests(1, seed=7)[0], shaping=Shaping(**form))
    with pytest.raises(InvalidRequest, match=f"{next(iter(form))} is not known to the engine vllm"):
        await generate(pair.cloud, request)
