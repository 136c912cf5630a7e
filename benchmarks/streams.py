"""Many streams on the llama.cpp target: together against one after the other."""

from __future__ import annotations

import argparse
import asyncio
import time

from benchmarks.harness import save, summarise
from benchmarks.services import duet_cloud
from edge_agent.remote import Cloud, Meter
from shared.config import DEFAULT_TARGET
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling

TOPICS = ("rivers", "bridges", "violins", "bees", "glass", "tides", "chess", "bread")


async def stream(cloud: Cloud, i: int, num_tokens: int) -> int:
    request = Open(
        prompt=(Message("user", f"Tell me about {TOPICS[i % len(TOPICS)]}, part {i}."),),
        sampling=Sampling(),
        seed=i,
        max_tokens=num_tokens,
    )
    count = 0
    async for message in cloud.generate(request, Meter()):
        if isinstance(message, Tokens):
            count += len(message.token_ids)
    return count


async def rate(address: str, num_streams: int, num_tokens: int, together: bool) -> float:
    """Tokens per second over all streams, prompts included in the time."""
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=300) as cloud:
        began = time.perf_counter()
        if together:
            counts = await asyncio.gather(*(stream(cloud, i, num_tokens) for i in range(num_streams)))
        else:
            counts = [await stream(cloud, i, num_tokens) for i in range(num_streams)]
        return sum(counts) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_TARGET)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 80])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    sizes = ("--slots", str(arguments.streams), "--context-tokens", "512")
    with duet_cloud("--model", arguments.model, *sizes) as (address, _):
        asyncio.run(rate(address, 2, 4, together=True))
        rows = [row(address, arguments.streams, tokens, arguments.repeats) for tokens in arguments.tokens]
    save(
        "streams",
        command=f"python -m benchmarks.streams --tokens {' '.join(map(str, arguments.tokens))}"
        f" --repeats {arguments.repeats}",
        title="Streams in one batch against one after the other",
        notes=f"{arguments.model}, greedy, prompts of about 40 tokens included in the time, which costs"
        " the same either way. Aim: >= 1.8x for 16 streams.",
        columns=["streams", "tokens each", "together, tok/s", "one by one, tok/s", "ratio"],
        rows=rows,
    )


def row(address: str, num_streams: int, num_tokens: int, repeats: int) -> list[str]:
    """Pairs of both ways in turn."""
    pairs = []
    for _ in range(repeats):
        both = (rate(address, num_streams, num_tokens, way) for way in (True, False))
        pairs.append([asyncio.run(one) for one in both])
    together, alone = (summarise(column) for column in zip(*pairs, strict=True))
    ratio = summarise([a / b for a, b in pairs])
    figures = together.show("{:.1f}"), alone.show("{:.1f}"), ratio.show()
    return [str(num_streams), str(num_tokens), *figures]


if __name__ == "__main__":
    main()
