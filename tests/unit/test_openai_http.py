"""Requests to an upstream: retries, timeouts and errors. The upstream is a fake (`httpx.MockTransport`);
tests/vllm/test_openai_target.py runs a real one."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from cloud_service.targets import loading
from cloud_service.targets.openai_http import NotServed, Upstream, inspect
from shared.config import CloudConfig, resolve
from shared.errors import (
    CloudFailed,
    CloudOverloaded,
    CloudUnavailable,
    InvalidSetting,
    VerifyTimeout,
)

MODELS = {"data": [{"id": "tiny", "root": "/models/tiny", "max_model_len": 512}]}
ROUND = {"choices": [{}], "usage": {"prompt_tokens_details": None}}


class FakeUpstream:
    """Answers one request after another from a list, then its last one for ever."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def client(answer: Callable[[httpx.Request], httpx.Response], key: str | None = None) -> Upstream:
    return Upstream("http://gpu:8000", key, transport=httpx.MockTransport(answer), backoff_s=0.0)


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.RemoteProtocolError("gone"),
        httpx.Response(500),
        httpx.Response(503),
        httpx.Response(429),
    ],
    ids=repr,
)
async def test_a_passing_failure_is_asked_again(failure):
    fake = FakeUpstream(failure, failure, httpx.Response(200, json={"ok": 1}))
    assert await client(fake).ask("/x", {}) == {"ok": 1}
    assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("failure", "error", "num_requests"),
    [
        pytest.param(httpx.ConnectError("refused"), CloudUnavailable, 3, id="no connection"),
        pytest.param(httpx.ReadTimeout(""), VerifyTimeout, 1, id="no answer in time"),
        pytest.param(httpx.Response(429), CloudOverloaded, 3, id="429"),
        pytest.param(httpx.Response(503), CloudUnavailable, 3, id="503"),
        pytest.param(httpx.Response(500), CloudFailed, 3, id="500"),
        pytest.param(httpx.Response(400), CloudFailed, 1, id="400"),
        pytest.param(httpx.Response(404), NotServed, 1, id="404"),
        pytest.param(httpx.Response(200, text="<html>"), CloudFailed, 1, id="no JSON"),
    ],
)
async def test_a_lasting_failure_is_told_in_one_line(failure, error, num_requests):
    fake = FakeUpstream(failure)
    with pytest.raises(error, match="http://gpu:8000") as caught:
        await client(fake).ask("/x", {})
    assert "\n" not in str(caught.value)
    assert len(fake.requests) == num_requests


async def test_a_refused_key_names_the_variable():
    fake = FakeUpstream(httpx.Response(401, json={"error": "Unauthorized"}))
    with pytest.raises(CloudFailed, match="Unauthorized; set DUET_CLOUD_UPSTREAM_KEY"):
        await client(fake).ask("/v1/models")


async def test_the_key_is_sent_as_a_bearer_token():
    fake = FakeUpstream(httpx.Response(200, json={}))
    await client(fake, key="secret").ask("/v1/models")
    assert fake.requests[0].headers["Authorization"] == "Bearer secret"


async def test_a_stream_ends_at_its_mark():
    body = 'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'
    events = client(FakeUpstream(httpx.Response(200, text=body))).events("/x", {})
    assert [event async for event in events] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("size", [1, 7, 1000], ids="chunks of {} bytes".format)
async def test_a_streams_text_holds_what_other_formats_take_for_ends_of_lines(size):
    event = {"text": "one\u2028two\x85three\r\n"}
    body = f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\ndata: [DONE]\r\n\r\n".encode()

    async def chunks():
        for at in range(0, len(body), size):
            yield body[at : at + size]

    events = client(FakeUpstream(httpx.Response(200, content=chunks()))).events("/x", {})
    assert [event async for event in events] == [event]


async def test_a_stream_that_breaks_off_is_unavailable():
    events = client(FakeUpstream(httpx.Response(200, text='data: {"a": 1}\n\n'))).events("/x", {})
    assert await anext(events) == {"a": 1}
    with pytest.raises(CloudUnavailable, match="broke off"):
        await anext(events)


# What an upstream is


async def test_where_token_ids_are_not_served_completions_are_tried():
    fake = FakeUpstream(
        httpx.Response(200, json=MODELS), httpx.Response(404), httpx.Response(200, json=ROUND)
    )
    service = await inspect(client(fake))
    assert (service.model, service.source, service.context_tokens) == ("tiny", "/models/tiny", 512)
    assert not service.by_tokens
    assert [request.url.path for request in fake.requests] == [
        "/v1/models",
        "/inference/v1/generate",
        "/v1/completions",
    ]


@pytest.mark.parametrize(("details", "tells"), [(None, False), ({"cached_tokens": 0}, True)])
async def test_the_cache_is_read_only_where_the_service_tells_what_it_gave(details, tells):
    answer = {"choices": [{}], "usage": {"prompt_tokens_details": details}}
    fake = FakeUpstream(httpx.Response(200, json=MODELS), httpx.Response(200, json=answer))
    service = await inspect(client(fake))
    assert (service.by_tokens, service.tells_cached) == (True, tells)
    assert json.loads(fake.requests[1].content)["sampling_params"]["skip_reading_prefix_cache"]


@pytest.mark.parametrize("status_of_token_ids", [404, 400])
async def test_too_few_logprobs_are_refused_with_the_flag_that_helps(status_of_token_ids):
    refusal = {"error": {"message": "Requested prompt logprobs of 80, which is greater than max allowed: 20"}}
    fake = FakeUpstream(
        httpx.Response(200, json=MODELS),
        httpx.Response(status_of_token_ids, json=refusal),
        httpx.Response(400, json=refusal),
    )
    with pytest.raises(InvalidSetting, match="--max-logprobs 80"):
        await inspect(client(fake))


@pytest.mark.parametrize("models", [{}, [], {"data": []}, {"data": [{"id": "tiny"}]}], ids=repr)
async def test_something_else_than_vllm_is_refused(models):
    with pytest.raises(CloudFailed, match="check --upstream"):
        await inspect(client(FakeUpstream(httpx.Response(200, json=models))))


# Settings


@pytest.mark.parametrize("url", ["http://gpu:8000", "https://gpu/", "http://10.0.0.1:8000/vllm"])
def test_urls_are_taken(url):
    config, _ = resolve(CloudConfig, {"flags": {"upstream": url}})
    assert config.upstream == url.rstrip("/")


@pytest.mark.parametrize("url", ["gpu:8000", "ftp://gpu", "http://", "http://gpu?x=1", "http://gpu:port"])
def test_other_text_is_refused_as_upstream(url):
    with pytest.raises(InvalidSetting, match="upstream"):
        resolve(CloudConfig, {"flags": {"upstream": url}})


def test_the_target_needs_an_upstream():
    with pytest.raises(InvalidSetting, match="--upstream"):
        loading.target_loader(CloudConfig(target="openai"), lambda *_: None)
