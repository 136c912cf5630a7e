"""The default pair calls a function that fits, and drafts of the call are verified as other text is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.service import RunningServer, running_serve

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHAT: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def client(real_cloud: RunningServer, draft_path: Path) -> Iterator[openai.OpenAI]:
    env = {"HOME": str(Path.home()), "DUET_CONTEXT_TOKENS": "1024"}
    with (
        running_serve(draft_path, env=env, cloud=real_cloud.address, max_tokens=48) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client,
    ):
        yield client


@pytest.mark.parametrize("model", ["duet-local", "duet-cloud", "duet-speculate"])
def test_a_function_that_fits_is_called(client: openai.OpenAI, model: str) -> None:
    answer: Any = client.chat.completions.create(model=model, messages=CHAT, tools=[WEATHER])
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] == "Oslo"
    if model == "duet-speculate":
        assert answer.duet["accepted_tokens"] > 0


def test_what_it_returned_is_told_to_the_user(client: openai.OpenAI) -> None:
    called = client.chat.completions.create(model="duet-cloud", messages=CHAT, tools=[WEATHER])
    message = called.choices[0].message
    assert message.tool_calls
    answered = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "-3 degrees, snow"}
    chat = [*CHAT, message.model_dump(exclude_none=True), answered]
    said = client.chat.completions.create(model="duet-cloud", messages=chat).choices[0].message.content
    assert "snow" in str(said).lower() or "-3" in str(said)
