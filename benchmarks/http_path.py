"""What HTTP adds to a token: a stream of `duet serve` beside the same request to an Agent in process."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing

import httpx

from benchmarks.harness import save, summarise
from benchmarks.services import duet_serve
from edge_agent import Agent, Message, Text

QUESTION = "Explain why the sky is blue in the day and red in the evening."
NUM_TOKENS = 64
REPEATS = 9
ALLOWED = 1.05


async def per_token_in_process(agent: Agent) -> tuple[float, float]:
    """Milliseconds to the first text, and from text to text."""
    arrivals = []
    began = time.perf_counter()
    async with aclosing(
        agent.chat([Message("user", QUESTION)], mode="local", max_tokens=NUM_TOKENS)
    ) as events:
        async for event in events:
            if isinstance(event, Text):
                arrivals.append(time.perf_counter())
    return _timings(began, arrivals)


async def per_token_over_http(http: httpx.AsyncClient) -> tuple[float, float]:
    arrivals = []
    body = {
        "model": "duet-local",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NUM_TOKENS,
        "stream": True,
    }
    began = time.perf_counter()
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                arrivals.append(time.perf_counter())
    return _timings(began, arrivals)


def _timings(began: float, arrivals: list[float]) -> tuple[float, float]:
    assert len(arrivals) > NUM_TOKENS / 2, "the answer is long enough to time"
    return 1e3 * (arrivals[0] - began), 1e3 * (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


async def measure() -> list[list[str]]:
    in_process, over_http = [], []
    with duet_serve() as url:
        async with Agent.open(mode="local") as agent, httpx.AsyncClient(base_url=url, timeout=120) as http:
            for _ in range(REPEATS + 1):
                in_process.append(await per_token_in_process(agent))
                over_http.append(await per_token_over_http(http))
    rows = []
    for name, i in (("first text", 0), ("each text after it", 1)):
        ours = [times[i] for times in in_process[1:]]  # the first ones warm up
        theirs = [times[i] for times in over_http[1:]]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        rows.append([name, *(summarise(values).show() for values in (ours, theirs, ratios))])
    return rows


def main() -> None:
    save(
        "http_path",
        command="python -m benchmarks.http_path",
        title="What HTTP adds to a token",
        notes="`duet-local` streamed by `duet serve` in a process of its own, and the same request to an"
        f" `Agent` in this one, in turn, {REPEATS} pairs of {NUM_TOKENS} tokens by the edge's 0.5B, prompt"
        " cached; milliseconds as median (interval), ratio pair by pair. Aim: at most"
        f" {ALLOWED - 1:.0%} more for each text.",
        columns=["", "Agent in process, ms", "over HTTP, ms", "ratio"],
        rows=asyncio.run(measure()),
    )


if __name__ == "__main__":
    main()
