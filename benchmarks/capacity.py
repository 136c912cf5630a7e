"""How many tokens per second one vLLM yields to many edges: remote drafts in resident sessions, against plain
decoding and against speculation with a draft model on the same GPU.

Each engine is started in turn in one run, with random weights of a shape (time does not depend on them), so
that nothing is downloaded: `python -m benchmarks.capacity 7b`. Acceptance is forced inside the engine
(vLLM's `synthetic` rejection), so that every scheme commits equally many tokens a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import quantile, save
from benchmarks.verify_vllm import SHAPE_KEYS, SHAPES, Bench, Numbers, numbers, write_shape
from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.vllm import VllmTarget, engine_config
from cloud_service.targets.vllm_resident import MAX_STEP_DRAFT_TOKENS, engine_options
from shared.sampling import Sampling

CONTEXT = 512
USUAL_DRAFT = 8
THINK_S = 0.1
"""A real edge between verdict and next draft: 8 tokens at 100 tokens/s and 20 ms of round trip."""
DRAFT_SHAPE = "0.5b"


@dataclass(frozen=True, slots=True)
class Load:
    """One cell of the table."""

    draft: int
    rates: tuple[float, ...]
    """[MAX_STEP_DRAFT_TOKENS] probability that a draft token is accepted, if those before it were."""
    acceptance: str
    think_s: float = 0.0


def usual(committed: int = 5) -> Load:
    """Every round commits the same: `committed` - 1 draft tokens and the target's own."""
    accepted = committed - 1
    rates = (1.0,) * accepted + (0.0,) * (MAX_STEP_DRAFT_TOKENS - accepted)
    return Load(USUAL_DRAFT, rates, f"{committed} a round")


def independent(draft: int, rate: float, think_s: float = 0.0) -> Load:
    """Each draft token is accepted with the same probability."""
    return Load(draft, (rate,) * MAX_STEP_DRAFT_TOKENS, f"{rate:g}", think_s)


@dataclass(slots=True)
class Measured:
    tokens_s: float
    moved: float
    """Share of edges whose drafts did not pay, so that they went on as plain streams."""
    times_ms: list[float]
    """Of the rounds."""
    per_round_ms: float | None
    """Python of the engine, where its worker runs in the scheduler's process and no edge moved."""


@asynccontextmanager
async def engine(arguments: argparse.Namespace, part: str) -> AsyncIterator[VllmTarget]:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as draft:
        write_shape(Path(name), arguments.shape, arguments.max_tokens)
        options = {
            "load_format": "dummy",
            "max_model_len": arguments.max_tokens,
            "max_num_seqs": max(arguments.edges),
            **OPTIONS[part](arguments, Path(draft)),
            **json.loads(arguments.engine),
        }
        began = time.perf_counter()
        config = engine_config(name, options)
        vocab = Numbers(arguments.shape, config.model_config.get_vocab_size())
        target = VllmTarget(config, vocab)
        runner = "V2" if config.use_v2_model_runner else "V1"
        print(f"{part} started in {time.perf_counter() - began:.0f} s, {runner} runner", flush=True)
        try:
            yield target
        finally:
            await target.close()


def plain_options(arguments: argparse.Namespace, draft: Path) -> dict[str, Any]:
    return {}


def resident_options(arguments: argparse.Namespace, draft: Path) -> dict[str, Any]:
    options = engine_options()
    return {
        **options,
        "scheduler_cls": "benchmarks.capacity_engine.TimedScheduler",
        "worker_extension_cls": "benchmarks.capacity_engine.ForcedAcceptance",
        "speculative_config": {**options["speculative_config"], **forced(usual(), MAX_STEP_DRAFT_TOKENS)},
    }


def draft_model_options(arguments: argparse.Namespace, draft: Path) -> dict[str, Any]:
    """vLLM's own speculation with a smaller model, whose vocabulary must be as large."""
    write_shape(draft, arguments.draft_shape, arguments.max_tokens)
    target = dict(zip(SHAPE_KEYS, SHAPES[arguments.shape], strict=True))
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "vocab_size": target["vocab_size"]}))
    return {
        "speculative_config": {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": USUAL_DRAFT,
            "draft_load_config": {"load_format": "dummy"},
            **forced(usual(), USUAL_DRAFT),
        }
    }


OPTIONS = {"plain": plain_options, "resident": resident_options, "draft-model": draft_model_options}


def forced(load: Load, num_tokens: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}  # vLLM forces nothing on a CPU, which is for trying this program out
    rates: list[float] = []
    for rate in load.rates[:num_tokens]:
        rates.append(rate * (rates[-1] if rates else 1.0))
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


class Edges:
    """Edges that send rounds of random drafts to a target with resident sessions."""

    def __init__(self, target: VllmTarget, num_edges: int) -> None:
        self.target = target
        bench = Bench(target, 1)
        self._prompts = [bench.text(CONTEXT) for _ in range(num_edges)]
        self._draft = bench.text(MAX_STEP_DRAFT_TOKENS)

    async def run(self, num_edges: int, load: Load, seconds: float) -> Measured:
        if torch.cuda.is_available():
            await self.target.llm.collective_rpc("accept", args=(list(load.rates),))
        times: list[float] = []
        moved: set[int] = set()
        committed = 0
        starts = ends = float("inf")

        async def edge(prompt: Sequence[int]) -> None:
            nonlocal committed
            draft = self._draft[: load.draft]
            room = self.target.context_tokens - len(draft) - 1
            while time.perf_counter() < ends:
                text = list(prompt)
                async with self.target.sequence(text) as sequence:
                    while time.perf_counter() < ends and len(text) < room and sequence.drafts_pay:
                        began = time.perf_counter()
                        scores = await sequence.score(text + draft, num_rows=len(draft) + 1, width=1)
                        made = scores.rows.token_ids[:, 0].tolist()
                        text += made
                        now = time.perf_counter()
                        ready.discard(id(prompt))
                        if starts <= began and now <= ends:
                            times.append(1e3 * (now - began))
                            committed += len(made)
                        if load.think_s:
                            await asyncio.sleep(load.think_s)
                    if len(text) < room and time.perf_counter() < ends:
                        moved.add(id(prompt))
                        async with aclosing(sequence.generate(text, plain(room - len(text)))) as made_alone:
                            async for new in made_alone:
                                now = time.perf_counter()
                                if now > ends:
                                    break
                                committed += len(new) if now >= starts else 0

        prompts = self._prompts[:num_edges]
        ready = {id(prompt) for prompt in prompts}
        tasks = [asyncio.create_task(edge(prompt)) for prompt in prompts]
        while ready:  # prompts first
            await asyncio.sleep(0.05)
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.sleep(0.5)
        spent = await self._spent()
        starts = time.perf_counter()
        ends = starts + seconds
        await asyncio.gather(*tasks)
        after = await self._spent()
        per_round = None
        if "schedule" in after and times and not moved:
            per_round = 1e3 * (sum(after.values()) - sum(spent.values())) / len(times)
        share = len(moved) / num_edges
        return Measured(committed / seconds, share, times, per_round)

    async def _spent(self) -> dict[str, float]:
        [spent, *_] = await self.target.llm.collective_rpc("spent")
        return dict(spent)


COLUMNS = [
    *("scheme", "edges", "draft", "acceptance", "think, ms", "tokens/s", "of plain", "moved"),
    *("p50, ms", "p95, ms", "engine Python, ms a round"),
]


class Table:
    """The rows so far; written after each, so that a run that is cut short leaves what it measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self._arguments = arguments
        self._plain: dict[int, float] = {}
        self._rows: list[list[str]] = []

    def add_plain(self, num_edges: int, tokens_s: float) -> None:
        self._plain[num_edges] = tokens_s
        self._add(["plain decoding", str(num_edges), "", "", "", f"{tokens_s:,.0f}", "1.00", "", "", "", ""])

    def add_speculation(
        self, scheme: str, num_edges: int, draft: int, acceptance: str, tokens_s: float
    ) -> None:
        self._add(
            [
                *(scheme, str(num_edges), str(draft), acceptance, "", f"{tokens_s:,.0f}"),
                *(self._of_plain(tokens_s, num_edges), "", "", "", ""),
            ]
        )

    def add(self, num_edges: int, load: Load, measured: Measured) -> None:
        times, python = measured.times_ms, measured.per_round_ms
        self._add(
            [
                *("resident", str(num_edges), str(load.draft), load.acceptance, f"{1e3 * load.think_s:.0f}"),
                *(f"{measured.tokens_s:,.0f}", self._of_plain(measured.tokens_s, num_edges)),
                f"{measured.moved:.0%}",
                *(
                    [f"{q:.1f}" for q in (statistics.median(times), quantile(times, 0.95))]
                    if times
                    else ["", ""]
                ),
                "" if python is None else f"{python:.3f}",
            ]
        )

    def _of_plain(self, tokens_s: float, num_edges: int) -> str:
        plain = self._plain.get(num_edges)
        return f"{tokens_s / plain:.2f}" if plain else ""

    def _add(self, row: list[str]) -> None:
        self._rows.append(row)
        print(" | ".join(row), flush=True)
        if self._arguments.rows is not None:
            self._arguments.rows.write_text(json.dumps(self._rows))

    def save(self) -> None:
        shape = self._arguments.shape
        save(
            f"capacity_{shape}_{self._where.replace(' ', '_').lower()}",
            command=f"python -m benchmarks.capacity {shape}",
            title=f"Many edges on one vLLM, resident sessions: {shape}",
            notes=f"{self._where}; random weights, engine options `{self._arguments.engine}`, prompts of"
            f" {CONTEXT} tokens, windows of {self._arguments.seconds:g} s. Edges send the next draft at"
            " once or after the think time. Acceptance is forced in the engine: a number is the probability"
            " of each draft token. Plain decoding: as many greedy streams of an engine without speculation,"
            f" vLLM's defaults. Draft model: vLLM's own speculation with a {DRAFT_SHAPE} on the same GPU."
            " Engine Python: taking drafts in, scheduling, reading outputs and preparing inputs.",
            columns=COLUMNS,
            rows=self._rows,
        )


async def measure(arguments: argparse.Namespace) -> None:
    table = Table(arguments)
    for part in arguments.parts:
        async with engine(arguments, part) as target:
            await MEASURE[part](target, arguments, table)
        table.save()


async def measure_plain(target: VllmTarget, arguments: argparse.Namespace, table: Table) -> None:
    bench = Bench(target, 1)
    await decode(bench, max(arguments.edges), 16)  # what is compiled or captured on first use
    for num_edges in arguments.edges:
        table.add_plain(num_edges, await decode(bench, num_edges))


async def measure_draft_model(target: VllmTarget, arguments: argparse.Namespace, table: Table) -> None:
    bench = Bench(target, 1)
    await decode(bench, max(arguments.edges), 16)
    for num_edges in arguments.edges:
        tokens_s = await decode(bench, num_edges)
        table.add_speculation("draft model", num_edges, USUAL_DRAFT, usual().acceptance, tokens_s)


async def decode(bench: Bench, num_streams: int, num_tokens: int = 192) -> float:
    """Tokens per second of plain streams: the median of three."""
    texts = [bench.text(CONTEXT) for _ in range(num_streams)]

    async def stream(text: Sequence[int], num_tokens: int) -> None:
        async with bench.target.sequence(text) as sequence:
            async for _ in sequence.generate(text, plain(num_tokens)):
                pass

    await asyncio.gather(*(stream(text, 1) for text in texts))  # prompts first
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        await asyncio.gather(*(stream(text, num_tokens) for text in texts))
        rates.append(num_streams * num_tokens / (time.perf_counter() - began))
    return statistics.median(rates)


def plain(num_tokens: int) -> GenerateOptions:
    return GenerateOptions(
        sampling=Sampling(), seed=0, start=0, max_tokens=num_tokens, end_token_ids=frozenset()
    )


async def measure_resident(target: VllmTarget, arguments: argparse.Namespace, table: Table) -> None:
    target.verification = "resident"  # random weights may make NaN rows, which its own test would refuse
    edges = Edges(target, max(arguments.edges))
    await edges.run(max(arguments.edges), usual(), 1.0)
    await target.llm.collective_rpc("time_preparation")
    many = [count for count in arguments.edges if count > 1]
    cells = [(count, usual()) for count in arguments.edges]
    cells += [
        *[(count, independent(USUAL_DRAFT, rate)) for rate in (0.7, 0.5, 0.85) for count in many],
        *[(count, independent(draft, 0.7)) for draft in (4, 16) for count in many],
        *[(count, independent(USUAL_DRAFT, 0.7, THINK_S)) for count in many],
        *[(count, independent(draft, rate)) for draft in (4, 16) for rate in (0.5, 0.85) for count in many],
    ]
    for count, load in cells:
        if time.perf_counter() > arguments.deadline:
            print("out of time", flush=True)
            break
        table.add(count, load, await edges.run(count, load, arguments.seconds))


MEASURE = {"plain": measure_plain, "resident": measure_resident, "draft-model": measure_draft_model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(MEASURE))
    parser.add_argument("--edges", type=numbers, default=[1, 16, 64, 128, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="window of each cell")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--draft-shape", choices=SHAPES, default=DRAFT_SHAPE)
    parser.add_argument("--engine", default="{}", help="options of vLLM's engine, as JSON")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds until no new cell is begun")
    parser.add_argument("--rows", type=Path, help="file for the rows so far, written after each")
    arguments = parser.parse_args()
    arguments.deadline = time.perf_counter() + arguments.budget
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
