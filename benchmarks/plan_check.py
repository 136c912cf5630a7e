"""`duet-cloud plan`'s simulation against real runs: busy edges are measured, thinking ones foretold."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.edges import Seen, draft_rounds
from benchmarks.harness import quantile, save, summarise
from benchmarks.services import duet_cloud
from cloud_service.planning.simulation import Load, simulate
from cloud_service.planning.tables import ServerTable
from cloud_service.targets.base import Target
from edge_agent.remote import Cloud, Meter
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from tests.mortal import ForgetfulTarget, mortal_clouds, tiny_target
from tests.scripted_target import Passes
from tests.tiny_pair import write_tiny_pair

DRAFT_TOKENS = 4
ANSWER_TOKENS = 160
BASE_S, ROUND_S = 0.04, 0.005
"""Of a scripted pass, and for each of its rounds."""


@dataclass(frozen=True, slots=True)
class Service:
    """Something to measure, and what it answers."""

    name: str
    cloud: Cloud
    texts: list[list[int]]
    """What the target answers to each of the requests."""

    async def edges(self, num: int, *, think_s: float, seconds: float) -> Seen:
        return await draft_rounds(
            self.cloud,
            [request(number) for number in range(num)],
            self.texts[:num],
            num_draft_tokens=DRAFT_TOKENS,
            think_s=think_s,
            seconds=seconds,
        )


@dataclass
class Compared:
    """One entry a repeat."""

    tokens_per_s: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    """Tokens per second, foretold over seen."""
    latency: list[float] = field(default_factory=list)
    """The median round, foretold over seen."""


def request(number: int) -> Open:
    question = f"Write a long story about a fox who has {number + 2} children."
    return Open(prompt=(Message("user", question),), sampling=Sampling(), seed=1, max_tokens=ANSWER_TOKENS)


async def answer(cloud: Cloud, number: int) -> list[int]:
    """The target's own text, which edges then draft."""
    text: list[int] = []
    async for message in cloud.generate(request(number), Meter()):
        if isinstance(message, Tokens):
            text += message.token_ids
    return text


async def compare(service: Service, given: argparse.Namespace) -> list[list[str]]:
    """A row for each time of thinking: what was foretold over what was seen."""
    most = given.edges[-1]
    found = {ms: Compared() for ms in given.think_ms}
    for _ in range(given.repeats):
        # Table and runs in turn: the machine's speed changes from minute to minute.
        backs = [await service.edges(num, think_s=0.0, seconds=given.seconds) for num in given.edges]
        table = ServerTable(
            model="measured",
            gpu="here",
            scheme="request",
            max_draft_tokens=DRAFT_TOKENS,
            source="this run",
            edges=tuple(given.edges),
            rounds_per_s=tuple(each.rounds_per_s for each in backs),
            streams=(1,),
            plain_tokens_per_s=(1,),
        )
        for ms, compared in found.items():
            seen = await service.edges(most, think_s=ms / 1e3, seconds=2 * given.seconds)
            load = Load(
                num_edges=most,
                cycle_s=0.0,
                answer_tokens=1e6,
                tokens_per_round=statistics.mean(each.num_tokens / len(each.rounds_s) for each in backs),
                round_pause_s=ms / 1e3,
                overhead_s=table.overhead_s,
            )
            foretold = simulate(load, table.pass_seconds, max_batch=table.most_edges, seconds=60)
            compared.tokens_per_s.append(seen.tokens_per_s)
            compared.speed.append(foretold.tokens_per_s / seen.tokens_per_s)
            compared.latency.append(foretold.round_p50_s / quantile(seen.rounds_s, 0.5))
            print(
                f"{service.name}, {ms:g} ms: {compared.speed[-1]:.2f}, {compared.latency[-1]:.2f}", flush=True
            )
    return [
        [
            *(service.name, str(most), f"{ms:g}", summarise(compared.tokens_per_s).show("{:.0f}")),
            *(summarise(compared.speed).show(), summarise(compared.latency).show()),
        ]
        for ms, compared in found.items()
    ]


async def scripted(address: str, given: argparse.Namespace) -> list[list[str]]:
    target = ForgetfulTarget()
    texts = [target.answer(request(number)) for number in range(given.edges[-1])]
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=60) as cloud:
        return await compare(Service("scripted", cloud, texts), given)


async def real(address: str, given: argparse.Namespace) -> list[list[str]]:
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=120) as cloud:
        texts = await asyncio.gather(*(answer(cloud, number) for number in range(given.edges[-1])))
        return await compare(Service(given.target, cloud, texts), given)


def _tiny(folder: Path, num_slots: int) -> Callable[[], Target]:
    return tiny_target(write_tiny_pair(folder).target_gguf, step_s=BASE_S, slots=num_slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="'scripted', 'tiny', or the name of a model")
    parser.add_argument("--edges", type=int, nargs="+", default=[1, 2, 4, 8], help="ascending")
    parser.add_argument("--think-ms", type=float, nargs="+", default=[50.0, 200.0, 500.0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args()
    if given.target == "scripted":
        passes = Passes(BASE_S, ROUND_S, given.edges[-1])
        with mortal_clouds(1, partial(ForgetfulTarget, passes)) as [cloud]:
            rows = asyncio.run(scripted(cloud.address, given))
        what = f"a scripted target whose passes wait for {1e3 * BASE_S:g} ms and {1e3 * ROUND_S:g} ms a round"
    elif given.target == "tiny":
        with (
            tempfile.TemporaryDirectory() as folder,
            mortal_clouds(1, _tiny(Path(folder), given.edges[-1])) as [cloud],
        ):
            rows = asyncio.run(real(cloud.address, given))
        what = f"a tiny model in llama.cpp, whose passes are made to last {1e3 * BASE_S:g} ms by waiting"
    else:
        # One thread: on a machine that does other work besides, llama.cpp's threads wait for each other.
        serve = ("--model", given.target, "--threads", "1", "--slots", str(given.edges[-1]))
        with duet_cloud(*serve, "--context-tokens", "512") as (address, _):
            rows = asyncio.run(real(address, given))
        what = f"{given.target} on llama.cpp with one thread"
    save(
        f"plan_check_{given.target}",
        command=f"python -m benchmarks.plan_check {given.target} --edges {' '.join(map(str, given.edges))}",
        title=f"A plan against real runs: {given.target}",
        notes=f"A real service on loopback over {what}. Rounds of {DRAFT_TOKENS} draft tokens, all right:"
        f" {', '.join(map(str, given.edges))} edges back to back give the simulation's table; then"
        f" {given.edges[-1]} think before each draft, half to one and a half of the time named, simulated and"
        f" for real. {given.repeats} tables and runs in turn; windows of {given.seconds:g} s and"
        f" {2 * given.seconds:g} s. Aim: within 15%.",
        columns=[
            "target",
            "edges",
            "thinking, ms",
            "tokens/s seen",
            "tokens/s, foretold / seen",
            "round p50, foretold / seen",
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
