"""`duet serve` as OpenAI's own client, and litellm, see it: every mode, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import litellm
import openai
import pytest

from edge_agent.http.completions import MODES
from protos import wire
from shared.errors import CloudFailed, InvalidRequest
from shared.messages import Message, Open
from shared.sampling import Sampling
from shared.shaping import NO_SHAPING, Shaping
from tests.http_server import InProcessServer, in_process_server
from tests.service import connection, generate, speculate
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name the three primary colours of light."},
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture
async def server(tiny_pair: TinyPair) -> AsyncIterator[InProcessServer]:
    async with in_process_server(tiny_pair) as server:
        yield server


@pytest.fixture
async def client(server: InProcessServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def whole(client: openai.AsyncOpenAI, model: str, **options: Any) -> Any:
    return await client.chat.completions.create(model=model, messages=CHAT, **options)


async def streamed(client: openai.AsyncOpenAI, model: str, **options: Any) -> list[Any]:
    stream = await client.chat.completions.create(model=model, messages=CHAT, stream=True, **options)
    return [chunk async for chunk in stream]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Every mode


async def test_the_models_are_listed_and_described(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == list(MODES)
    for name in listed:
        assert (await client.models.retrieve(name)).duet["mode"] == MODES[name]


@pytest.mark.parametrize("model", MODES)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}], ids=["greedy", "drawn"]
)
async def test_a_stream_says_what_the_whole_answer_says(
    client: openai.AsyncOpenAI, model: str, sampling: dict[str, Any]
) -> None:
    answer = await whole(client, model, **sampling)
    chunks = await streamed(client, model, stream_options={"include_usage": True}, **sampling)
    assert text_of(chunks) == answer.choices[0].message.content != ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    told = [chunk.duet for chunk in chunks if "duet" in chunk.model_extra]
    assert [about["mode"] for about in told] == [answer.duet["mode"]]
    if model != "duet":
        assert answer.duet["mode"] == MODES[model]
    else:
        assert answer.duet["reasons"]


async def test_cloud_and_speculate_give_the_same_text_and_speculate_tells_its_rounds(
    client: openai.AsyncOpenAI,
) -> None:
    cloud, speculate = [await whole(client, model, seed=3) for model in ("duet-cloud", "duet-speculate")]
    assert cloud.choices[0].message.content == speculate.choices[0].message.content
    about = speculate.duet
    assert 0 < about["rounds"] < speculate.usage.completion_tokens
    assert about["target_passes"] == about["rounds"]
    assert about["acceptance_rate"] == about["accepted_tokens"] / about["drafted_tokens"]
    assert about["policy"] == "lossless"


async def test_a_stream_without_the_option_has_no_usage(client: openai.AsyncOpenAI) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in await streamed(client, "duet-local"))


async def test_max_tokens_by_both_names(client: openai.AsyncOpenAI) -> None:
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        answer = await whole(client, "duet-speculate", **limit)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")


@pytest.mark.parametrize("model", ["duet-local", "duet-cloud", "duet-speculate"])
async def test_a_stop_text_ends_the_answer_before_it(client: openai.AsyncOpenAI, model: str) -> None:
    text = (await whole(client, model)).choices[0].message.content
    stop = text[4:6]
    for answer in (await whole(client, model, stop=stop), await whole(client, model, stop=[stop, "zzz"])):
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


async def test_duets_own_settings_ride_along(client: openai.AsyncOpenAI) -> None:
    answer = await whole(client, "duet", extra_body={"duet": {"private": True}})
    assert answer.duet["mode"] == "local"
    assert "private" in " ".join(answer.duet["reasons"])


async def test_a_second_turn_finds_the_first_in_both_caches(
    server: InProcessServer, client: openai.AsyncOpenAI
) -> None:
    first = await whole(client, "duet-speculate", max_tokens=8)
    chat = [
        *CHAT,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And?"},
    ]
    before = server.edge.context.num_decoded_tokens, server.cloud.context.num_decoded_tokens
    second = await client.chat.completions.create(model="duet-speculate", messages=chat, max_tokens=1)
    read = (
        server.edge.context.num_decoded_tokens - before[0],
        server.cloud.context.num_decoded_tokens - before[1],
    )
    new = second.usage.prompt_tokens - first.usage.prompt_tokens
    # What is new, a draft and a token at each border; not the first turn again.
    assert all(num_read <= new + 16 < second.usage.prompt_tokens for num_read in read), (read, new)


async def test_thoughts_are_told_apart_from_the_answer(client: openai.AsyncOpenAI) -> None:
    grammar = 'root ::= "<think>ab" [a-z] "c</think>\\n\\n" [A-Z] "d"'
    for model in ("duet-local", "duet-cloud"):
        options = {"extra_body": {"grammar": grammar}}
        message = (await whole(client, model, **options)).choices[0].message
        assert (message.reasoning_content[:2], len(message.reasoning_content)) == ("ab", 4)
        assert (message.content[1:], len(message.content)) == ("d", 2)
        deltas = [chunk.choices[0].delta for chunk in await streamed(client, model, **options)]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert thoughts == message.reasoning_content
        assert "".join(delta.content or "" for delta in deltas) == message.content


async def test_log_probabilities_of_the_edge_models_own_text(client: openai.AsyncOpenAI) -> None:
    answer = await whole(client, "duet-local", logprobs=True)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in content)
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode("utf-8", "replace") == answer.choices[0].message.content
    chunks = await streamed(client, "duet-local", logprobs=True)
    told = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.logprob for entry in told] == [entry.logprob for entry in content]


# A plain text


@pytest.mark.parametrize("model", MODES)
async def test_a_plain_text_goes_on_as_it_stands(client: openai.AsyncOpenAI, model: str) -> None:
    answer = await client.completions.create(model=model, prompt="Once upon a time", max_tokens=8)
    assert answer.usage.prompt_tokens < 16  # no chat template
    stream = await client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=8, stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text != ""


async def test_a_plain_text_may_be_token_ids(client: openai.AsyncOpenAI, server: InProcessServer) -> None:
    ids = server.edge.model.tokenize("Once upon a time")
    by_text = await client.completions.create(model="duet-cloud", prompt="Once upon a time", max_tokens=8)
    for prompt in (ids, [ids]):
        by_ids = await client.completions.create(model="duet-cloud", prompt=prompt, max_tokens=8)
        assert by_ids.choices[0].text == by_text.choices[0].text


# What rows cannot verify


async def test_a_bias_decides_the_text_of_the_model_that_writes_alone(
    client: openai.AsyncOpenAI, server: InProcessServer
) -> None:
    [token] = server.edge.model.tokenize("Q")
    for model, mode in {
        "duet-local": "local",
        "duet-cloud": "cloud",
        "duet-speculate": "cloud",
        "duet": "cloud",
    }.items():
        answer = await whole(client, model, logit_bias={str(token): 100}, max_tokens=4)
        assert answer.choices[0].message.content == "QQQQ"
        assert answer.duet["mode"] == mode
        assert ("logit_bias" in " ".join(answer.duet["reasons"])) == (model in ("duet", "duet-speculate"))


@pytest.mark.parametrize("model", ["duet-local", "duet-cloud"])
async def test_penalties_keep_a_text_from_repeating_itself(
    client: openai.AsyncOpenAI, server: InProcessServer, model: str
) -> None:
    [token] = server.edge.model.tokenize("Q")
    bias = {str(token): 6}
    free = (await whole(client, model, logit_bias=bias)).choices[0].message.content
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        held = (await whole(client, model, logit_bias=bias, **penalty)).choices[0].message.content
        assert held.count("Q") < free.count("Q")


async def test_json_is_what_the_schema_says(client: openai.AsyncOpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    for model in ("duet-local", "duet-cloud", "duet-speculate"):
        for sampling in ({}, {"temperature": 1.0, "seed": 5}):
            answer = await whole(client, model, response_format=form, max_tokens=64, **sampling)
            assert answer.choices[0].finish_reason == "stop"
            made = json.loads(answer.choices[0].message.content)
            assert made["colour"] in ("red", "green")
            assert isinstance(made["sure"], bool)


async def test_a_private_prompt_is_shaped_at_the_edge(client: openai.AsyncOpenAI) -> None:
    answer = await whole(client, "duet", presence_penalty=1.0, extra_body={"duet": {"private": True}})
    assert answer.duet["mode"] == "local"


async def test_without_a_cloud_auto_shapes_at_the_edge_and_says_so(
    server: InProcessServer, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server.cloud.target), "shapes", frozenset())
    answer = await whole(client, "duet", presence_penalty=1.0)
    assert answer.duet["mode"] == "local"
    assert "presence_penalty" in answer.duet["notices"][0]
    with pytest.raises(openai.BadRequestError) as refused:
        await whole(client, "duet-cloud", presence_penalty=1.0)
    assert refused.value.param == "presence_penalty"


# Another client, and none


async def test_litellm_gets_the_same(server: InProcessServer, client: openai.AsyncOpenAI) -> None:
    expected = (await whole(client, "duet-speculate")).choices[0].message.content
    options: dict[str, Any] = {
        "model": "openai/duet-speculate", "api_base": f"{server.url}/v1", "api_key": "none", "messages": CHAT,
    }  # fmt: skip
    answer = await litellm.acompletion(**options)
    assert answer.choices[0].message.content == expected
    stream = await litellm.acompletion(stream=True, **options)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected


async def test_health_answers_anybody_and_the_rest_those_with_the_key(tiny_pair: TinyPair) -> None:
    async with (
        in_process_server(tiny_pair, api_key="a key of some length") as server,
        httpx.AsyncClient() as http,
    ):
        assert (await http.get(f"{server.url}/health")).json()["status"] == "ok"
        for key in ("wrong", "a key of some lengtn", ""):
            async with openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key=key or "x", max_retries=0
            ) as client:
                with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                    await client.models.list()
        refused = await http.post(f"{server.url}/v1/chat/completions", json={"model": "duet"})
        assert refused.status_code == 401
        good = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a key of some length")
        assert len((await good.models.list()).data) == len(MODES)


async def test_metrics_are_prometheus_text(server: InProcessServer) -> None:
    async with httpx.AsyncClient() as http:
        response = await http.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "# TYPE " in response.text


async def test_drafts_under_a_shaping_are_refused_and_a_service_that_ignores_it_is_noticed(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Open(
        prompt=(Message("user", "hi"),), sampling=Sampling(), seed=1, max_tokens=4,
        shaping=Shaping(presence_penalty=1.0),
    )  # fmt: skip
    async with connection(server.cloud.address) as cloud:
        with pytest.raises(InvalidRequest, match="presence_penalty cannot be verified"):
            await speculate(server.edge, cloud, request, 4)
        # An older service does not know the field.
        monkeypatch.setattr(wire, "decode_open", lambda _: replace(request, shaping=NO_SHAPING))
        with pytest.raises(CloudFailed, match="cannot honour presence_penalty"):
            await generate(cloud, request)
