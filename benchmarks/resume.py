"""How long a stream that lost its service goes on waiting once there is one again."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial

from benchmarks.harness import quantile, save, summarise
from edge_agent.drafting.drafters import Drafters
from edge_agent.remote import Cloud, Meter
from edge_agent.resume import TargetStreams
from edge_agent.speeds import Speeds
from edge_agent.steps import Resumed
from shared.config import EdgeConfig
from shared.events import Token
from shared.messages import Message, Open
from shared.resumption import OnOutage
from shared.sampling import Sampling
from tests.mortal import ForgetfulTarget, MortalCloud, mortal_clouds
from tests.service import connection, unobserved

PROMPT_TOKENS = 200
TOKENS_BEFORE = 50
AWAY_S = (0.2, 3.0)
"""The least and the most that an outage lasts."""


def stream_of(cloud: Cloud) -> TargetStreams:
    return TargetStreams(
        edge=None,
        drafters=Drafters(None),
        remote=cloud,
        config=EdgeConfig(on_outage=OnOutage.WAIT),
        speeds=Speeds(),
        meter=Meter(),
        observed=unobserved(),
    )


async def resumed_after_s(addresses: str, outage: Callable[[], float]) -> float:
    """Break a running stream; seconds from the moment there was a service again to the next token.

    Args:
        outage: makes one; returns its end on the monotonic clock.
    """
    request = Open(
        prompt=(Message("user", "x" * PROMPT_TOKENS),), sampling=Sampling(), seed=1, max_tokens=10**5
    )
    num_tokens = 0
    breaking: asyncio.Task[float] | None = None
    async with connection(addresses) as cloud, aclosing(stream_of(cloud).cloud(request)) as steps:
        async for step in steps:
            if isinstance(step, Resumed) and breaking is not None:
                now_s = time.monotonic()
                return now_s - await breaking
            num_tokens += isinstance(step, Token)
            if isinstance(step, Token) and num_tokens == TOKENS_BEFORE:
                breaking = asyncio.create_task(asyncio.to_thread(outage))
    raise AssertionError("the stream ended before its outage began")


def same_returns(first: MortalCloud, _: MortalCloud) -> float:
    first.kill()
    time.sleep(random.uniform(*AWAY_S))
    first.start()
    return time.monotonic()


def other_comes(first: MortalCloud, second: MortalCloud) -> float:
    first.kill()
    time.sleep(random.uniform(*AWAY_S))
    second.start()
    return time.monotonic()


def other_runs(first: MortalCloud, _: MortalCloud) -> float:
    first.kill()
    return time.monotonic()


CASES = (
    ("the same replica returns", same_returns, False),
    ("another one starts, the first stays away", other_comes, False),
    ("another one runs; from the kill", other_runs, True),
)
"""With what happens to the first of two replicas, and whether the second runs before."""


def measured_ms(
    break_it: Callable[[MortalCloud, MortalCloud], float], num: int, *, both: bool
) -> list[float]:
    times = []
    for _ in range(num):
        with mortal_clouds(2, ForgetfulTarget) as [first, second]:
            if not both:
                second.kill()
            addresses = f"{first.address},{second.address}"
            taken_s = asyncio.run(resumed_after_s(addresses, partial(break_it, first, second)))
            times.append(1e3 * taken_s)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outages", type=int, default=40, help="of each kind")
    arguments = parser.parse_args()
    rows = []
    for what, break_it, both in CASES:
        times = measured_ms(break_it, arguments.outages, both=both)
        rows.append([what, summarise(times).show("{:.0f}"), f"{quantile(times, 0.95):.0f}"])
    save(
        "resume",
        command=f"python -m benchmarks.resume --outages {arguments.outages}",
        title="From the return of a service to the first resumed token",
        notes=f"A stream over two replicas on loopback, scripted target, {PROMPT_TOKENS} prompt tokens; its"
        f" service is killed (SIGKILL) in the middle, and there is one again {AWAY_S[0]:g} to {AWAY_S[1]:g} s"
        f" later, at a random moment; {arguments.outages} outages of each kind. The time runs from the moment"
        " that requests are answered again. The target's own reading of prompt and text comes on top. Aim:"
        " <= 300 ms.",
        columns=["what happens", "median, ms", "95%, ms"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
