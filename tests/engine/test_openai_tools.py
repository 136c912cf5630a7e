"""Functions that a model may call, as OpenAI's own client asks for them: chosen, required, and free."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import litellm
import openai
import pytest

from tests.http_server import InProcessServer, in_process_server
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

CHAT: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
LATER: Any = {"type": "function", "function": {"name": "later"}}
CHOSEN: Any = {"type": "function", "function": {"name": "weather"}}
CALLS_AFTER_WORDS = """
root ::= "Wait. " call call
call ::= "<tool_call>{\\"name\\": \\"weather\\", \\"arguments\\": {\\"city\\": \\"" [A-Z] "\\"}}</tool_call>"
"""
"""The tiny models write whatever comes; a grammar makes them write calls."""


@pytest.fixture
async def server(tiny_pair: TinyPair) -> AsyncIterator[InProcessServer]:
    async with in_process_server(tiny_pair, context_tokens=2048, max_tokens=160) as server:
        yield server


@pytest.fixture
async def client(server: InProcessServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def asked(client: openai.AsyncOpenAI, model: str, **options: Any) -> Any:
    return await client.chat.completions.create(model=model, messages=CHAT, **options)


@pytest.mark.parametrize(
    ("model", "mode"),
    [("duet-local", "local"), ("duet-cloud", "cloud"), ("duet-speculate", "cloud"), ("duet", "cloud")],
)
async def test_a_chosen_function_is_called_as_its_schema_says(
    client: openai.AsyncOpenAI, model: str, mode: str
) -> None:
    answer = await asked(client, model, tools=[NOW, WEATHER], tool_choice=CHOSEN)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert answer.duet["mode"] == mode
    assert any("tool_choice" in notice for notice in answer.duet["notices"])


async def test_a_required_call_is_of_any_of_the_functions(client: openai.AsyncOpenAI) -> None:
    for seed in range(3):
        answer = await asked(
            client, "duet-cloud", tools=[NOW, LATER], tool_choice="required", temperature=1.0, seed=seed
        )
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name in ("now", "later")


async def test_a_stream_tells_a_call_as_the_whole_answer_does(client: openai.AsyncOpenAI) -> None:
    options = {"tools": [WEATHER], "tool_choice": CHOSEN}
    [call] = (await asked(client, "duet-local", **options)).choices[0].message.tool_calls
    async with client.chat.completions.stream(model="duet-local", messages=CHAT, **options) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    [streamed] = final.choices[0].message.tool_calls
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments


async def test_free_calls_are_told_apart_from_words(client: openai.AsyncOpenAI) -> None:
    options: Any = {"tools": [WEATHER], "extra_body": {"grammar": CALLS_AFTER_WORDS}}
    message = (await asked(client, "duet-local", **options)).choices[0].message
    assert message.content == "Wait."
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]
    assert len({call.id for call in message.tool_calls}) == 2
    chunks = [chunk async for chunk in await asked(client, "duet-local", stream=True, **options)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Wait."
    told = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in told] == [0, 1]
    assert [call.function.arguments for call in told] == [c.function.arguments for c in message.tool_calls]
    one = await asked(client, "duet-local", parallel_tool_calls=False, **options)
    assert len(one.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("model", ["duet-local", "duet-cloud", "duet-speculate", "duet"])
async def test_functions_that_are_not_called_leave_text(client: openai.AsyncOpenAI, model: str) -> None:
    answer = await asked(client, model, tools=[WEATHER], max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    if model == "duet-speculate":  # nothing hinders drafts
        assert answer.duet["mode"] == "speculate"


async def test_no_function_is_told_of_where_none_may_be_called(client: openai.AsyncOpenAI) -> None:
    plain = await asked(client, "duet-local", max_tokens=4)
    none = await asked(client, "duet-local", tools=[WEATHER], tool_choice="none", max_tokens=4)
    told = await asked(client, "duet-local", tools=[WEATHER], max_tokens=4)
    assert plain.usage.prompt_tokens == none.usage.prompt_tokens < told.usage.prompt_tokens


async def test_what_a_function_returned_goes_back_to_the_model(client: openai.AsyncOpenAI) -> None:
    called = (await asked(client, "duet-local", tools=[WEATHER], tool_choice=CHOSEN)).choices[0].message
    chat = [
        *CHAT,
        called.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"},
    ]
    answer = await client.chat.completions.create(
        model="duet-speculate", messages=chat, tools=[WEATHER], max_tokens=8
    )
    assert answer.choices[0].message.content
    unknown = [*chat[:2], {"role": "tool", "tool_call_id": "call_7", "content": "sunny"}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="duet-local", messages=unknown)
    assert refused.value.param == "messages.2.tool_call_id"


async def test_litellm_gets_the_call_too(server: InProcessServer) -> None:
    answer = await litellm.acompletion(
        model="openai/duet-local", api_base=f"{server.url}/v1", api_key="none", messages=CHAT,
        tools=[WEATHER], tool_choice=CHOSEN,
    )  # fmt: skip
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert answer.choices[0].finish_reason == "tool_calls"
