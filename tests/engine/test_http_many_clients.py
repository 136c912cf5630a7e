"""Many clients of one `duet serve`: a fair line, nobody in another's text, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from edge_agent.http.completions import MODES
from tests.http_server import InProcessServer, in_process_server
from tests.service import connection, eventually, in_process_cloud, running_serve
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine


def body(model: str, question: str = "hi", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], **options}


@asynccontextmanager
async def streaming(server: InProcessServer, model: str, **options: Any) -> AsyncIterator[httpx.Response]:
    """A stream of which the head has come, and at least one line once it makes text."""
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body(model, stream=True, **options)
        ) as response,
    ):
        assert response.status_code == 200
        yield response


async def ask(server: InProcessServer, model: str, question: str = "hi", **options: Any) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return await client.chat.completions.create(**body(model, question, **options))


async def test_twenty_clients_at_once_get_what_each_gets_alone(tiny_pair: TinyPair) -> None:
    requests = [(list(MODES)[i % len(MODES)], f"Count to {i // 4}", i) for i in range(20)]
    async with in_process_server(tiny_pair) as server:
        alone = [await ask(server, model, text, seed=seed, temperature=1.0) for model, text, seed in requests]
        together = await asyncio.gather(
            *(ask(server, model, text, seed=seed, temperature=1.0) for model, text, seed in requests)
        )
        texts = [[answer.choices[0].message.content for answer in answers] for answers in (alone, together)]
        assert texts[0] == texts[1]
        assert len(set(texts[0])) > 10
        assert max(answer.duet["queue_position"] for answer in together) > 5
        await eventually(lambda: server.is_idle)


async def test_who_waits_sees_the_position_fall(tiny_pair: TinyPair) -> None:
    async with (
        in_process_server(tiny_pair, slots=1, step_s=0.01) as server,
        streaming(server, "duet-speculate", max_tokens=40) as first,
    ):
        assert first.headers["x-duet-queue-position"] == "0"
        async with streaming(server, "duet-local", max_tokens=4) as second:
            assert second.headers["x-duet-queue-position"] == "1"
            async with streaming(server, "duet-local", max_tokens=4) as third:
                assert third.headers["x-duet-queue-position"] == "2"
                await first.aread()
                lines = [line async for line in third.aiter_lines()]
    comments = [line for line in lines if line.startswith(":")]
    assert comments == [f": waiting for the edge model, position {n}" for n in (2, 1)]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert chunks[-1]["duet"]["queue_position"] == 2


async def test_the_page_sees_its_position_too(tiny_pair: TinyPair) -> None:
    async with (
        in_process_server(tiny_pair, slots=1, step_s=0.01) as server,
        streaming(server, "duet-speculate", max_tokens=40),
        httpx.AsyncClient() as http,
    ):
        chat = {
            "messages": [{"role": "user", "content": "hi"}],
            "settings": {"mode": "local", "max_tokens": 2},
        }
        made = await http.post(f"{server.url}/api/chat", json=chat, timeout=60)
    types = [json.loads(line)["type"] for line in made.text.splitlines()]
    assert types[0] == "waiting"
    assert types[-1] == "answer"


async def test_who_stops_waiting_gives_up_the_place_at_once(tiny_pair: TinyPair) -> None:
    async with in_process_server(tiny_pair, slots=1, step_s=0.01) as server:
        async with streaming(server, "duet-speculate", max_tokens=60):
            async with streaming(server, "duet-local"):
                async with streaming(server, "duet-local") as third:
                    assert third.headers["x-duet-queue-position"] == "2"
                    assert server.edge.num_waiting == 2
                await eventually(lambda: server.edge.num_waiting == 1)
            await eventually(lambda: server.edge.num_waiting == 0)
        await eventually(lambda: server.is_idle)


async def test_a_short_answer_need_not_wait_for_a_long_one(tiny_pair: TinyPair) -> None:
    async with in_process_server(tiny_pair, slots=2) as server:
        long = asyncio.create_task(ask(server, "duet-local", max_tokens=400))
        await eventually(lambda: server.edge.num_free_slots == 1)
        await ask(server, "duet-local", max_tokens=5)
        assert not long.done()
        await long


@pytest.mark.parametrize("model", MODES)
@pytest.mark.parametrize("kind", ["whole", "streamed"])
async def test_a_client_that_goes_leaves_no_task_and_no_slot_behind(
    tiny_pair: TinyPair, model: str, kind: str
) -> None:
    async with in_process_server(tiny_pair, step_s=0.01) as server:
        for _ in range(3):
            if kind == "streamed":
                async with streaming(server, model, max_tokens=200) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            break
            else:
                asking = asyncio.create_task(ask(server, model, max_tokens=200))
                await eventually(lambda: not server.is_idle)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await eventually(lambda: server.is_idle)
        await eventually(lambda: len(asyncio.all_tasks()) <= server.tasks_before)


async def test_a_client_that_stops_reading_blocks_nobody_and_is_given_up(tiny_pair: TinyPair) -> None:
    async with in_process_server(tiny_pair, slots=2, stall_timeout_s=1.0, send_buffer=4096) as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            content = json.dumps(body("duet-local", stream=True, max_tokens=450)).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\n"
            head += f"Host: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
            await asyncio.get_running_loop().run_in_executor(None, deaf.sendall, head.encode() + content)
            await eventually(lambda: server.edge.num_free_slots == 1)
            for model in MODES:
                assert (await ask(server, model)).usage.completion_tokens > 0
            await eventually(lambda: server.is_idle)
            assert len(deaf.recv(1 << 20)) < 100_000  # it was cut off, not served to the end


async def test_a_cloud_that_is_gone_is_503_in_its_modes_and_a_notice_in_auto(tiny_pair: TinyPair) -> None:
    async with in_process_cloud(tiny_pair.target_gguf) as cloud:
        address = cloud.address
    async with in_process_server(tiny_pair) as server, connection(address) as gone:
        server.agent._cloud = server.agent._router._cloud = gone
        for model in ("duet-cloud", "duet-speculate"):
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as failed:
                    await ask(server, model, stream=stream)
                assert (failed.value.status_code, failed.value.code) == (503, "cloud_unavailable")
        answer = await ask(server, "duet")
        assert answer.duet["mode"] == "local"
        assert "answered by the edge model alone" in answer.duet["notices"][0]


def test_the_command_serves_and_stops_cleanly(tiny_pair: TinyPair) -> None:
    with running_serve(
        tiny_pair.draft_gguf, cloud="127.0.0.1:1", env={"DUET_CONTEXT_TOKENS": "256"}
    ) as server:
        made = httpx.post(
            f"{server.address}/v1/chat/completions", json=body("duet-local", max_tokens=3), timeout=60
        )
        assert made.json()["usage"]["completion_tokens"] == 3
        assert server.stop() == 0
    assert server.log_lines == [""]
