"""Bytes on the wire per committed token, greedy, for the default pair over a few prompts."""

from __future__ import annotations

import asyncio

from benchmarks.harness import save
from benchmarks.services import duet_cloud
from edge_agent.agent import Agent
from edge_agent.opening import open_agent
from shared.config import EdgeConfig
from shared.events import Answer

PROMPTS = (
    "Which planet has the most moons, and how many are known?",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "Begin a story about a lighthouse keeper who finds a message in a bottle.",
)
GRPC_FRAME_BYTES = 5
HTTP2_FRAME_BYTES = 9


async def answers(agent: Agent) -> list[Answer]:
    found = []
    for prompt in PROMPTS:
        *_, last = [event async for event in agent.ask(prompt)]
        assert isinstance(last, Answer)
        found.append(last)
    return found


async def measure(address: str) -> list[list[str]]:
    rows = []
    for mode, draft_tokens in (("speculate", 4), ("speculate", 8), ("cloud", 4)):
        settings = EdgeConfig(mode=mode, cloud=address, max_tokens=64, max_draft_tokens=draft_tokens)
        async with open_agent(settings) as agent:
            found = await answers(agent)
        tokens = sum(answer.completion_tokens for answer in found)
        payload = sum((answer.bytes_per_token or 0) * answer.completion_tokens for answer in found)
        messages = sum(2 * answer.rounds or answer.completion_tokens for answer in found)
        framed = payload + messages * (GRPC_FRAME_BYTES + HTTP2_FRAME_BYTES)
        label = f"{mode}, drafts of {draft_tokens}" if mode == "speculate" else mode
        rows.append([label, str(tokens), f"{payload / tokens:.1f}", f"{framed / tokens:.1f}"])
    return rows


def main() -> None:
    with duet_cloud() as (address, _):
        rows = asyncio.run(measure(address))
    save(
        "wire_bytes",
        command="python -m benchmarks.wire_bytes",
        title="Bytes per committed token",
        notes="Default pair, greedy, both directions. Serialised: Draft and Verdict (or Tokens) messages,"
        " prompt left out. Framed: with the 5 bytes of gRPC and 9 of HTTP/2 around each message."
        " Aim: <= 16 serialised.",
        columns=["mode", "tokens", "serialised", "framed"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
