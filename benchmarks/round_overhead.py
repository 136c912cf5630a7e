"""What our own code costs a round: client, gRPC, servicer and session, over a target that costs nothing."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import aclosing

from benchmarks.edges import scripted_rounds
from benchmarks.harness import quantile, save
from benchmarks.services import scripted_cloud
from edge_agent.access import Access
from edge_agent.remote import Cloud
from shared.messages import Message, Open
from shared.sampling import Sampling

DRAFT_TOKENS = 4
_PLAIN = Access()


async def rounds(
    address: str, num_rounds: int, sampling: Sampling, prompt_tokens: int, access: Access = _PLAIN
) -> list[float]:
    """Seconds of each round: draft sent to verdict committed. Every fifth token is drafted wrong."""
    request = Open(
        prompt=(Message("user", "x" * prompt_tokens),),
        sampling=sampling,
        seed=1,
        max_tokens=num_rounds * (DRAFT_TOKENS + 1) + 8,
    )
    times: list[float] = []
    async with (
        Cloud(address, connect_timeout_s=5, silence_timeout_s=30, access=access) as cloud,
        aclosing(scripted_rounds(cloud, request, DRAFT_TOKENS)) as made,
    ):
        async for seconds, _ in made:
            times.append(seconds)
            if len(times) == num_rounds:
                break
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    rows = []
    arguments = parser.parse_args()
    with scripted_cloud() as (address, _):
        for label, sampling, prompt in (
            ("greedy, prompt of 200 tokens", Sampling(), 200),
            ("greedy, prompt of 4,000 tokens", Sampling(), 4000),
            ("temperature 0.7, top-k 64, prompt of 200 tokens", Sampling(temperature=0.7), 200),
        ):
            asyncio.run(rounds(address, 300, sampling, prompt))
            times = [1e3 * t for t in asyncio.run(rounds(address, arguments.rounds, sampling, prompt))]
            rows.append([label, *(f"{quantile(times, q):.2f}" for q in (0.5, 0.95, 0.99))])
    save(
        "round_overhead",
        command=f"python -m benchmarks.round_overhead --rounds {arguments.rounds}",
        title="Overhead of a verification round (our own code)",
        notes=f"{DRAFT_TOKENS} draft tokens a round, one stream, stop and wait, service in its own process"
        " on loopback, scripted target. Aim: p50 <= 1 ms, p99 <= 5 ms.",
        columns=["stream", "p50, ms", "p95, ms", "p99, ms"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
