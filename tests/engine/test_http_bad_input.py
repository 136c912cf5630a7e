"""What `duet serve` refuses: in OpenAI's shape, by the parameter's name, and it goes on serving."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.http_server import InProcessServer, in_process_server
from tests.service import eventually
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = CALL | {"function": {"name": "f", "arguments": "("}}
GOOD = {"model": "duet-local", "messages": MESSAGES, "max_tokens": 4}


@pytest.fixture
async def server(tiny_pair: TinyPair) -> AsyncIterator[InProcessServer]:
    async with in_process_server(tiny_pair) as server:
        yield server


async def post(server: InProcessServer, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(timeout=60) as http:
        return await http.post(f"{server.url}{path}", content=content)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]


BAD = {
    "an unknown model": ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    "no model": ({"model": None}, 400, "model", "missing_required_parameter"),
    "no messages": ({"messages": None}, 400, "messages", "missing_required_parameter"),
    "an empty chat": ({"messages": []}, 400, "messages", "invalid_value"),
    "messages that are text": ({"messages": "hi"}, 400, "messages", "invalid_value"),
    "an unknown role": (
        {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages.0.role", "invalid_value",
    ),
    "a message without content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content", None),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400, "messages.0.content", None,
    ),
    "half a surrogate pair": (
        {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, None, "invalid_json",
    ),
    "a number as text": ({"temperature": "0.5"}, 400, "temperature", "invalid_value"),
    "a truth value as a number": ({"max_tokens": True}, 400, "max_tokens", "invalid_value"),
    "no tokens at all": ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    "a negative temperature": ({"temperature": -1}, 400, "temperature", "invalid_value"),
    "an impossible top_p": ({"top_p": 1.5}, 400, "top_p", "invalid_value"),
    "a seed of 65 bits": ({"seed": 2**64}, 400, "seed", "invalid_value"),
    "an empty stop text": ({"stop": ""}, 400, "stop.0", "invalid_value"),
    "two answers": ({"n": 2}, 400, "n", "invalid_value"),
    "a tool without a function": (
        {"tools": [{"type": "function"}]}, 400, "tools.0.function", "missing_required_parameter",
    ),
    "a tool of the server's own": ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type", "invalid_value"),
    "a function without a usable name": (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        400, "tools.0.function.name", "invalid_value",
    ),
    "a function whose parameters are no schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wish"}}}]},
        400, "tools.0.function.parameters", "invalid_value",
    ),
    "two functions of one name": ({"tools": [TOOL, TOOL]}, 400, "tools", "invalid_value"),
    "a choice among no tools": ({"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
    "a choice of a tool that is not there": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400, "tool_choice", "invalid_value",
    ),
    "tools and another form of the answer": (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        400, "response_format", "invalid_value",
    ),
    "a forced call and another grammar": (
        {"tools": [TOOL], "tool_choice": "required", "grammar": 'root ::= "a"'},
        400, "grammar", "invalid_value",
    ),
    "OpenAI's older form of tools": ({"functions": [{"name": "f"}]}, 400, "functions", "unknown_parameter"),
    "a user who makes a call": (
        {"messages": [{"role": "user", "content": "hi", "tool_calls": [CALL]}]},
        400, "messages.0.tool_calls", "invalid_value",
    ),
    "a call whose arguments are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
        400, "messages.0.tool_calls.0.function.arguments", "invalid_value",
    ),
    "what a tool returned, for no call": (
        {"messages": [{"role": "tool", "content": "7"}]}, 400, "messages.0.tool_call_id", "invalid_value",
    ),
    "a parameter nobody knows": ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
    "other tokens' log-probabilities": (
        {"logprobs": True, "top_logprobs": 3}, 400, "top_logprobs", "invalid_value",
    ),
    "log-probabilities of the cloud": (
        {"model": "duet-cloud", "logprobs": True}, 400, "logprobs", "invalid_value",
    ),
    "a bias for no token": ({"logit_bias": {"Q": 1}}, 400, "logit_bias", "invalid_value"),
    "a bias too strong": ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_request"),
    "a penalty too strong": ({"presence_penalty": 3}, 400, "presence_penalty", "invalid_request"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wish"}}}},
        400, "response_format", "invalid_request",
    ),
    "a grammar that is none": ({"grammar": "no rules"}, 400, "grammar", "invalid_request"),
    "a setting nobody knows": ({"duet": {"speed": 1}}, 400, "duet", "invalid_value"),
    "a setting out of range": ({"duet": {"max_draft_tokens": 0}}, 400, "max_draft_tokens", "invalid_request"),
    "a mode beside the model": ({"duet": {"mode": "cloud"}}, 400, "duet", "invalid_value"),
    "a secret for the cloud": (
        {"model": "duet-cloud", "duet": {"private": True}}, 400, None, "invalid_request",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "status", "param", "code"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_bad_request_is_refused_by_name(
    server: InProcessServer,
    change: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    response = await post(server, {**GOOD, **change, "stream": stream})
    error = error_of(response)
    assert response.status_code == status
    assert error["param"] == param or (param and str(error["param"]).startswith(f"{param}."))
    assert code is None or error["code"] == code
    assert (await post(server, GOOD)).status_code == 200
    assert server.is_idle


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(
            b'{"model": "duet", "messages": [{"role": "user", "content": "\xff"}]}',
            "UTF-8",
            id="bytes that are no text",
        ),
        pytest.param(b'{"model": ', "not valid JSON", id="half of an object"),
        pytest.param(b"[]", "must be a JSON object", id="a list"),
        pytest.param(b"", "not valid JSON", id="nothing"),
        pytest.param(
            b'{"model": "duet", "messages": [], "temperature": NaN}', "NaN is no number", id="no number"
        ),
        pytest.param(b'{"a":' * 100_000, "JSON", id="a well without a bottom"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(
    server: InProcessServer, body: bytes, message: str
) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/api/chat"):
        response = await post(server, body, path)
        assert response.status_code == 400
        assert message in error_of(response)["message"]


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: InProcessServer) -> None:
    response = await post(server, {**GOOD, "messages": [{"role": "user", "content": "x" * 9 * 2**20}]})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


@pytest.mark.parametrize("model", ["duet-local", "duet-cloud", "duet-speculate"])
async def test_a_message_that_fits_no_context_is_refused_and_keeps_nobody_waiting(
    server: InProcessServer, model: str
) -> None:
    huge = asyncio.create_task(
        post(server, {"model": model, "messages": [{"role": "user", "content": "word " * 400_000}]})
    )
    waits = []
    while not huge.done():
        began = time.monotonic()
        assert (await post(server, GOOD)).status_code == 200
        waits.append(time.monotonic() - began)
    assert huge.result().status_code == 400
    assert error_of(huge.result())["code"] == "context_length_exceeded"
    await eventually(lambda: server.is_idle)


async def test_unknown_paths_and_methods_have_the_same_shape(server: InProcessServer) -> None:
    async with httpx.AsyncClient() as http:
        for response, status in (
            (await http.get(f"{server.url}/v1/embeddings"), 404),
            (await http.get(f"{server.url}/v1/models/gpt-4"), 404),
            (await http.get(f"{server.url}/v1/chat/completions"), 405),
        ):
            assert response.status_code == status
            error_of(response)


async def test_a_plain_text_has_its_own_rules(server: InProcessServer) -> None:
    for prompt, message in (
        (["a", "b"], "prompt"),
        ([10**6], "token id 1000000"),
        ("", "empty"),
        (None, "missing"),
    ):
        response = await post(server, {"model": "duet-local", "prompt": prompt}, "/v1/completions")
        assert response.status_code == 400
        assert message in error_of(response)["message"]
    for name in ("echo", "suffix", "best_of"):
        body = {"model": "duet-local", "prompt": "a", name: 1}
        assert error_of(await post(server, body, "/v1/completions"))["param"] == name


async def test_a_full_line_is_429(tiny_pair: TinyPair) -> None:
    slow = {**GOOD, "model": "duet-speculate", "max_tokens": 64}
    async with in_process_server(tiny_pair, slots=1, max_waiting=1, step_s=0.05) as server:
        busy = [asyncio.create_task(post(server, slow)) for _ in range(2)]
        await eventually(lambda: server.edge.num_waiting == 1)
        refused = await post(server, GOOD)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "edge_overloaded"
        assert [task.status_code for task in await asyncio.gather(*busy)] == [200, 200]
