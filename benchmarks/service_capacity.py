"""How many tokens per second one service process carries over gRPC, whatever its engine could make.

A round brings several tokens in one message each way, a plain stream sends each token by itself. The target
costs nothing; what counts is the processor time of the service's process, so that edges may share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial

import psutil

from benchmarks.edges import scripted_rounds
from benchmarks.harness import save
from benchmarks.services import scripted_cloud
from cloud_service.targets.base import GenerateOptions
from edge_agent.remote import Cloud, Meter
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from tests.mortal import ForgetfulTarget

PROMPT_TOKENS = 64
DRAFT_TOKENS = 8
COMMITTED = 5
"""Of a round: every fifth token is drafted wrong."""

Work = Callable[[Cloud, float], Awaitable[int]]
"""A stream until a time -> tokens that it was sent."""


def request() -> Open:
    prompt = (Message("user", "x" * PROMPT_TOKENS),)
    return Open(prompt=prompt, sampling=Sampling(), seed=1, max_tokens=1 << 19)


async def rounds(cloud: Cloud, end: float) -> int:
    num_tokens = 0
    async with aclosing(scripted_rounds(cloud, request(), DRAFT_TOKENS)) as made:
        async for _, num_committed in made:
            num_tokens += num_committed
            if time.monotonic() >= end:
                break
    return num_tokens


async def plain(cloud: Cloud, end: float) -> int:
    num_tokens = 0
    async for message in cloud.generate(request(), Meter()):
        if isinstance(message, Tokens):
            num_tokens += len(message.token_ids)
        if time.monotonic() >= end:
            break
    return num_tokens


async def cost(work: Work, address: str, pid: int, num_streams: int, seconds: float) -> tuple[float, float]:
    """Microseconds of the service's processor for a token, and tokens per second as they came."""
    service = psutil.Process(pid)
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=60) as cloud:
        before = sum(service.cpu_times()[:2])
        end = time.monotonic() + seconds
        num_tokens = sum(await asyncio.gather(*(work(cloud, end) for _ in range(num_streams))))
        spent = sum(service.cpu_times()[:2]) - before
    return 1e6 * spent / num_tokens, num_tokens / seconds


async def script_us() -> dict[str, float]:
    """Microseconds of a token that the target itself takes; a real engine is another process."""
    target, num = ForgetfulTarget(), 2000
    text = target.render_chat(request().messages) + [1] * 200
    options = GenerateOptions(
        sampling=Sampling(), seed=1, start=0, max_tokens=num, end_token_ids=frozenset({0})
    )
    async with target.sequence(text) as sequence:
        began = time.process_time()
        for _ in range(num):
            await sequence.score(text, num_rows=DRAFT_TOKENS + 1, width=1)
        rounds_us = 1e6 * (time.process_time() - began) / num / COMMITTED
        began = time.process_time()
        async for _ in sequence.generate(text, options):
            pass
        return {"rounds": rounds_us, "plain": 1e6 * (time.process_time() - began) / num}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each cell")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 128])
    arguments = parser.parse_args()
    rows = []
    script = asyncio.run(script_us())
    with scripted_cloud(slots=max(arguments.streams)) as (address, pid):
        measure = partial(cost, address=address, pid=pid)
        for num_streams in arguments.streams:
            for what, work in (("rounds", rounds), ("plain", plain)):
                asyncio.run(measure(work, num_streams=num_streams, seconds=1.0))
                us, rate = asyncio.run(measure(work, num_streams=num_streams, seconds=arguments.seconds))
                own = us - script[what]
                rows.append([str(num_streams), what, f"{own:.0f}", f"{1e6 / own:,.0f}", f"{rate:,.0f}"])
    save(
        "service_capacity",
        command=f"python -m benchmarks.service_capacity --seconds {arguments.seconds:g}",
        title="What one service process carries, whatever its engine",
        notes=f"Scripted target, greedy streams, prompts of {PROMPT_TOKENS} tokens; rounds of {DRAFT_TOKENS}"
        f" draft tokens of which {COMMITTED - 1} stand, stop and wait, against plain streams of a token a"
        " message. Processor time of the service's process, less the script's own"
        f" ({script['rounds']:.0f} us a token of rounds, {script['plain']:.0f} of plain streams, measured by"
        " itself); a real engine is another process, whose client takes its part of this one. All edges share"
        " the machine's cores, which limits the last column.",
        columns=["streams", "kind", "us of the service a token", "tokens/s of one core", "tokens/s here"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
