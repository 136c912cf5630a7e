"""Two replicas behind nginx against one: committed tokens per second, cached prompts, what failover costs.

Speed is measured on a scripted target whose passes take a set time, so that the replicas are the limit and
not this machine; caches and failover on a tiny model in llama.cpp. nginx runs as deploy/loadbalancer has it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from benchmarks.balancers import nginx
from benchmarks.edges import draft_rounds
from benchmarks.harness import Summary, save, summarise
from cloud_service.targets.base import Target
from edge_agent.remote import Cloud, Meter
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from tests.counters import scraped, total
from tests.engine.test_survival import NUM_WORKERS, STEP_S, Tally, expected_answers, run_under
from tests.mortal import ForgetfulTarget, MortalCloud, mortal_clouds, tiny_target
from tests.ports import free_port
from tests.scripted_target import Passes
from tests.service import TargetAlone
from tests.tiny_pair import TinyPair, write_tiny_pair

PASS_S, PASS_ROUNDS = 0.04, 4
DRAFT_TOKENS = 4
MOST_TOKENS_PER_S = PASS_ROUNDS / PASS_S * (DRAFT_TOKENS + 1)
"""Of one replica."""
TEXT_TOKENS = 400
ANSWER_TOKENS = 16
KILLS = 20


@contextmanager
def replicas(load: Callable[[], Target], num: int) -> Iterator[tuple[list[str], list[str]]]:
    """Services that run; yields their addresses and those of their metrics."""
    with ExitStack() as stack:
        metrics = [f"127.0.0.1:{free_port()}" for _ in range(num)]
        clouds = [stack.enter_context(closing(MortalCloud(load, metrics_listen=each))) for each in metrics]
        for cloud in clouds:
            cloud.start()
        yield [cloud.address for cloud in clouds], metrics


# Committed tokens per second


async def tokens_per_s(cloud: Cloud, num_edges: int, seconds: float) -> float:
    requests = [
        Open(
            prompt=(Message("user", f"Question {number}"),),
            sampling=Sampling(),
            seed=1,
            max_tokens=TEXT_TOKENS,
        )
        for number in range(num_edges)
    ]
    seen = await draft_rounds(
        cloud,
        requests,
        [ForgetfulTarget().answer(request) for request in requests],
        num_draft_tokens=DRAFT_TOKENS,
        think_s=0.0,
        seconds=seconds,
    )
    return seen.tokens_per_s


async def speeds(folder: Path, given: argparse.Namespace) -> tuple[Summary, Summary, Summary]:
    """Tokens per second of one replica, asked directly, of two behind nginx, and their ratio; in turn."""
    with (
        replicas(partial(ForgetfulTarget, Passes(PASS_S, 0.0, PASS_ROUNDS)), 2) as (addresses, _),
        nginx(addresses, folder) as balancer,
    ):
        async with (
            Cloud(addresses[0], connect_timeout_s=5, silence_timeout_s=60) as one,
            balancer.cloud() as two,
        ):
            pairs = []
            for _ in range(given.repeats):
                pair = [await tokens_per_s(cloud, given.edges, given.seconds) for cloud in (one, two)]
                print(f"one replica {pair[0]:.0f} tokens/s, two {pair[1]:.0f}", flush=True)
                pairs.append(pair)
    ones, twos = zip(*pairs, strict=True)
    return summarise(ones), summarise(twos), summarise([two / one for one, two in pairs])


# What their caches find


@dataclass
class Counted:
    """Sums over the replicas, from their metrics."""

    prompt_tokens: float = 0.0
    computed_tokens: float = 0.0
    committed_tokens: float = 0.0
    streams: float = 0.0

    @classmethod
    async def of(cls, metrics: Sequence[str]) -> Counted:
        pages = [await scraped(address) for address in metrics]
        return cls(*(sum(total(page, f"duet_cloud_{f.name}_total") for page in pages) for f in fields(cls)))

    def __sub__(self, other: Counted) -> Counted:
        return Counted(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_share(self) -> float:
        """Of prompt tokens, those that the cache spared. An answer's are computed, but for the last."""
        computed = self.computed_tokens - self.committed_tokens + self.streams
        return 1.0 - computed / self.prompt_tokens


async def hit_share(
    connect: Callable[[], Cloud], metrics: Sequence[str], given: argparse.Namespace, *, affinity: bool
) -> float:
    """Of the prompts of all turns but each chat's first.

    Args:
        affinity: whether the turns of a chat carry one session name.
    """
    chats = [[Message("user", f"Tell me about the number {number}.")] for number in range(given.chats)]
    before = Counted()
    async with connect() as usual:
        for turn in range(given.turns):
            if turn == 1:
                before = await Counted.of(metrics)
            random.Random(turn).shuffle(chats)
            for chat in chats:
                if affinity:
                    answer = await _answer(usual, chat)
                else:
                    async with connect() as stranger:  # another salt, so another name
                        answer = await _answer(stranger, chat)
                chat += [Message("assistant", answer), Message("user", f"And what of {turn}?")]
    return (await Counted.of(metrics) - before).hit_share


async def _answer(cloud: Cloud, chat: Sequence[Message]) -> str:
    request = Open(prompt=tuple(chat), sampling=Sampling(), seed=1, max_tokens=ANSWER_TOKENS)
    said = b""
    async for message in cloud.generate(request, Meter()):
        if isinstance(message, Tokens):
            said += b"".join(message.pieces)
    return said.decode("utf-8", "replace")


async def hit_shares(folder: Path, pair: TinyPair, given: argparse.Namespace) -> tuple[float, float, float]:
    """Of one replica, of two with affinity, and of two without; each with fresh caches."""
    load = tiny_target(pair.target_gguf, step_s=0.0, slots=given.chats)
    with replicas(load, 1) as ([address], metrics):
        connect = partial(Cloud, address, connect_timeout_s=5, silence_timeout_s=60)
        one = await hit_share(connect, metrics, given, affinity=True)
    two = []
    for affinity in (True, False):
        with (
            replicas(load, 2) as (addresses, metrics),
            nginx(addresses, folder / f"affinity-{affinity}") as balancer,
        ):
            two.append(await hit_share(balancer.cloud, metrics, given, affinity=affinity))
    return one, two[0], two[1]


# What failover costs


async def failover(folder: Path, pair: TinyPair) -> Tally:
    """Replicas behind nginx are killed in turn while streams of all kinds run."""
    with closing(TargetAlone(pair.target_gguf)) as alone:
        expected = expected_answers(alone, 12, seed=5)
    with (
        mortal_clouds(2, tiny_target(pair.target_gguf, step_s=STEP_S)) as clouds,
        nginx([cloud.address for cloud in clouds], folder) as balancer,
    ):
        return await run_under(clouds, balancer.cloud, pair, expected, num_kills=KILLS, seed=5)


async def measure(folder: Path, given: argparse.Namespace) -> None:
    pair = write_tiny_pair(folder / "pair")
    one, two, ratio = await speeds(folder / "speeds", given)
    alone, affine, scattered = await hit_shares(folder, pair, given)
    tally = await failover(folder / "failover", pair)
    print(tally)
    save(
        "replicas",
        command="python -m benchmarks.replicas",
        title="Two replicas behind nginx against one",
        notes="nginx runs as in deploy/loadbalancer, over TLS; the one replica is asked without it. Speed: a"
        f" scripted target, one pass of {1e3 * PASS_S:g} ms after the other, each over {PASS_ROUNDS} rounds"
        f" at most ({MOST_TOKENS_PER_S:.0f} tokens/s); {given.edges} edges send {DRAFT_TOKENS} draft tokens,"
        f" all right, back to back; {given.repeats} pairs of runs in turn, {given.seconds:g} s each. Caches:"
        f" {given.chats} chats of {given.turns} turns in random order on a tiny model in llama.cpp, counted"
        f" by the services' metrics, first turns left out. Failover: {KILLS} kills, always of the other"
        f" replica, while {NUM_WORKERS} edges draft and stream on; {tally.num_streams} streams, resumed"
        f" {tally.num_resumed} times.",
        columns=["what", "one replica", "two behind nginx", "two / one", "aim"],
        rows=[
            [
                "committed tokens/s",
                one.show("{:.0f}"),
                two.show("{:.0f}"),
                ratio.show(),
                ">= 1.8",
            ],
            [
                "prompt tokens found in a cache",
                f"{alone:.1%}",
                f"{affine:.1%}",
                f"{affine / alone:.2f}",
                ">= 0.95",
            ],
            [
                "the same, each turn under another session name",
                f"{alone:.1%}",
                f"{scattered:.1%}",
                f"{scattered / alone:.2f}",
                "",
            ],
            [
                f"tokens lost, and repeated or wrong, of {tally.num_tokens:,}",
                "",
                f"{tally.num_lost}, {tally.num_twice}",
                "",
                "0, 0",
            ],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--chats", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), given))


if __name__ == "__main__":
    main()
