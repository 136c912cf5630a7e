"""`duet-cloud plan`'s simulation against a real service: measured back to back, then with pauses."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.harness import quantile, save, summarise
from benchmarks.services import duet_cloud
from cloud_service.planning.simulation import Load, simulate
from cloud_service.planning.tables import ServerTable
from edge_agent.remote import Cloud, Meter
from shared.messages import Finished, Message, Open, Tokens
from shared.sampling import Sampling
from shared.session import EdgeSession

DRAFT_TOKENS = 4
ANSWER_TOKENS = 160


@dataclass
class Seen:
    seconds: float
    num_tokens: int = 0
    rounds_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def rounds_per_s(self) -> float:
        return len(self.rounds_s) / self.seconds


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


async def edges(cloud: Cloud, texts: Sequence[list[int]], think_s: float, seconds: float) -> Seen:
    """Edges that each draft what the target will say, again and again; the first second is not counted."""
    seen = Seen(seconds)
    begin = time.monotonic() + 1.0

    async def edge(number: int) -> None:
        text = texts[number]
        while time.monotonic() < begin + seconds:
            # From the middle on, so that the prompt is read once and then found in the cache.
            async with cloud.speculate(request(number), Meter()) as stream:
                session = EdgeSession()
                session.send_open()
                session.receive_opened(stream.opened)
                while time.monotonic() < begin + seconds:
                    at = len(session.committed)
                    draft = text[at : at + DRAFT_TOKENS]
                    if len(draft) < DRAFT_TOKENS or at + DRAFT_TOKENS + 1 >= len(text):
                        break
                    if think_s:
                        await asyncio.sleep(think_s)
                    sent = time.monotonic()
                    await stream.send(session.send_draft(draft, more=False))
                    verdict = await stream.receive()
                    if isinstance(verdict, Finished):
                        break
                    session.receive_verdict(verdict)
                    if begin <= sent and time.monotonic() <= begin + seconds:
                        seen.rounds_s.append(time.monotonic() - sent)
                        seen.num_tokens += len(session.committed) - at

    await asyncio.gather(*(edge(number) for number in range(len(texts))))
    return seen


async def streams(cloud: Cloud, num_streams: int) -> float:
    """Tokens per second of plain streams together, prompts included."""
    began = time.monotonic()
    texts = await asyncio.gather(*(answer(cloud, number) for number in range(num_streams)))
    return sum(map(len, texts)) / (time.monotonic() - began)


async def measure(address: str, given: argparse.Namespace) -> list[list[str]]:
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=120) as cloud:
        texts = await asyncio.gather(*(answer(cloud, number) for number in range(max(given.edges))))
        plain = [await streams(cloud, n) for n in given.edges]
        rows = []
        for think_ms in given.think_ms:
            ratios = []
            for _ in range(given.repeats):
                # Table and run in turn: the machine's speed changes from minute to minute.
                backs = [await edges(cloud, texts[:n], 0.0, given.seconds) for n in given.edges]
                tokens = statistics.mean(seen.num_tokens / len(seen.rounds_s) for seen in backs)
                table = ServerTable(
                    model="measured",
                    gpu="here",
                    scheme="request",
                    max_draft_tokens=DRAFT_TOKENS,
                    source="this run",
                    edges=tuple(given.edges),
                    rounds_per_s=tuple(seen.rounds_per_s for seen in backs),
                    streams=tuple(given.edges),
                    plain_tokens_per_s=tuple(plain),
                )
                load = Load(
                    num_edges=len(texts),
                    pause_s=0.0,
                    answer_tokens=1e6,
                    tokens_per_round=tokens,
                    round_pause_s=think_ms / 1e3,
                )
                predicted = simulate(load, table.pass_seconds, max_batch=table.most_edges, seconds=60)
                real = await edges(cloud, texts, think_ms / 1e3, given.seconds)
                ratios.append(
                    (
                        predicted.tokens_per_s / real.tokens_per_s,
                        predicted.round_p50_s / quantile(real.rounds_s, 0.5),
                        real.tokens_per_s,
                    )
                )
            speed, latency, tokens_per_s = (summarise(column) for column in zip(*ratios, strict=True))
            shown = [tokens_per_s.show("{:.1f}"), speed.show(), latency.show()]
            rows.append([str(len(texts)), f"{think_ms:g}", *shown])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--edges", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--think-ms", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args()
    # One thread: on a machine that does other work besides, llama.cpp's threads wait for each other.
    serve = (
        "--model",
        given.model,
        "--threads",
        "1",
        "--slots",
        str(max(given.edges)),
        "--context-tokens",
        "512",
    )
    with duet_cloud(*serve) as (address, _):
        rows = asyncio.run(measure(address, given))
    save(
        "plan_check",
        command="python -m benchmarks.plan_check",
        title="A plan against a real run",
        notes=f"{given.model} on llama.cpp, one thread. Rounds of {DRAFT_TOKENS} draft tokens, all right, are"
        f" measured back to back with {', '.join(map(str, given.edges))} edges, which gives the"
        " simulation's table; then edges think between rounds, simulated and for real. Ratios are"
        " predicted over real. Aim: within 15%.",
        columns=[
            "edges",
            "thinking, ms",
            "real tokens/s",
            "tokens/s, predicted / real",
            "round p50, predicted / real",
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
