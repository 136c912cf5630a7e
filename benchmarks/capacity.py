"""How many tokens per second one vLLM yields to many edges: remote drafts in resident sessions, against plain
decoding and against vLLM's own speculation, with a draft model and with n-grams, on the same GPU.

Each engine is started in turn in one run, with random weights of a shape (time does not depend on them), so
that nothing is downloaded. Acceptance is forced inside the engine (vLLM's `synthetic` rejection), so that
every scheme commits equally many tokens a round. There is more to measure than one run should take:

    python -m benchmarks.capacity 7b usual      # 1 to 256 edges, without and with a real edge's think time
    python -m benchmarks.capacity 7b groups     # many edges in one, two and three steps
    python -m benchmarks.capacity 7b grid       # draft lengths 4, 8, 16, acceptance .5, .7, .85
    python -m benchmarks.capacity 7b baselines  # beside vLLM's own speculation

Each begins with plain decoding, which its ratios refer to. Several in one command share the engines.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import quantile, save
from benchmarks.verify_vllm import SHAPE_KEYS, SHAPES, Bench, Numbers, numbers, write_shape
from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.resident_rounds import TOGETHER
from cloud_service.targets.vllm import VllmTarget, engine_config
from cloud_service.targets.vllm_resident import (
    MAX_STEP_DRAFT_TOKENS,
    engine_options,
    graph_options,
    makes_room,
)
from shared.sampling import Sampling

CONTEXT = 512
USUAL_DRAFT = 8
THINK_S = 0.1
"""A real edge between verdict and next draft: 8 tokens at 100 tokens/s and 20 ms of round trip."""
DRAFT_SHAPE = "0.5b"
START_S = 120.0
"""An engine's, on a machine that has compiled nothing for it yet."""
CELL_S = 10.0


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


LOADS = {
    "usual": [usual(), replace(usual(), think_s=THINK_S)],
    "groups": [usual()],
    "grid": [independent(draft, rate) for draft in (8, 4, 16) for rate in (0.7, 0.5, 0.85)],
    "baselines": [usual()],
}
"""By run, what edges send."""


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
            "max_num_seqs": arguments.slots,
            **OPTIONS[part](arguments, Path(draft)),
            **json.loads(arguments.engine),
        }
        began = time.perf_counter()
        config = engine_config(name, options)
        if makes_room(config):
            scheduler = config.scheduler_config.get_scheduler_cls().__name__
            config.scheduler_config.scheduler_cls = f"benchmarks.capacity_engine.Timed{scheduler}"
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


def resident_options(
    arguments: argparse.Namespace, draft: Path, *, num_groups: int | None = None
) -> dict[str, Any]:
    options = engine_options(num_groups=num_groups)
    given = {"max_num_seqs": arguments.slots, **json.loads(arguments.engine)}
    return {
        **options,
        **graph_options(given),
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


def ngram_options(arguments: argparse.Namespace, draft: Path) -> dict[str, Any]:
    """vLLM's own speculation with what followed the last tokens where the text had them before."""
    return {
        "speculative_config": {
            "method": "ngram_gpu" if torch.cuda.is_available() else "ngram",
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
            "num_speculative_tokens": USUAL_DRAFT,
            **forced(usual(), USUAL_DRAFT),
        }
    }


PARTS = {
    "usual": ["plain", "resident"],
    "groups": ["plain", "resident", "two", "one"],
    "grid": ["plain", "resident"],
    "baselines": ["plain", "resident", "draft-model", "ngram"],
}
"""By run, the engines in turn."""

EDGES = {
    "usual": [1, 16, 64, 128, 256],
    "groups": [48, 64, 128, 256],
    "grid": [1, 16, 64, 128, 256],
    "baselines": [1, 16, 64, 128],
}

OPTIONS = {
    "plain": plain_options,
    "resident": resident_options,
    "two": partial(resident_options, num_groups=2),
    "one": partial(resident_options, num_groups=1),
    "draft-model": draft_model_options,
    "ngram": ngram_options,
}


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
    """The rows of one run; written after each, so that one that is cut short leaves what it measured."""

    def __init__(self, run: str, arguments: argparse.Namespace) -> None:
        self.run = run
        self.edges: list[int] = arguments.edges or EDGES[run]
        self._where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self._arguments = arguments
        self._plain: dict[int, float] = {}
        self._rows: list[list[str]] = []

    def add_plain(self, num_edges: int, tokens_s: float) -> None:
        self._plain[num_edges] = tokens_s
        self.add_alone("plain decoding", num_edges, tokens_s)

    def add_alone(
        self, scheme: str, num_edges: int, tokens_s: float, draft: str = "", acceptance: str = ""
    ) -> None:
        """Streams that the engine writes without edges."""
        self._add(
            [
                *(scheme, str(num_edges), draft, acceptance, "", f"{tokens_s:,.0f}"),
                *(self._of_plain(tokens_s, num_edges), "", "", "", ""),
            ]
        )

    def add(self, num_edges: int, load: Load, measured: Measured, scheme: str) -> None:
        times, python = measured.times_ms, measured.per_round_ms
        self._add(
            [
                *(scheme, str(num_edges), str(load.draft), load.acceptance, f"{1e3 * load.think_s:.0f}"),
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
            self._arguments.rows.mkdir(parents=True, exist_ok=True)
            (self._arguments.rows / f"{self.run}.json").write_text(json.dumps(self._rows))

    def save(self) -> None:
        shape, run = self._arguments.shape, self.run
        parts = ["capacity", shape, *([] if run == "usual" else [run]), self._where.replace(" ", "_").lower()]
        save(
            "_".join(parts),
            command=f"python -m benchmarks.capacity {shape} {run}",
            title=f"Many edges on one vLLM, resident sessions: {shape}, {run}",
            notes=f"{self._where}; random weights, engine options `{self._arguments.engine}`, prompts of"
            f" {CONTEXT} tokens, windows of {self._arguments.seconds:g} s. Edges send the next draft at"
            " once or after the think time. Acceptance is forced in the engine: a number is the probability"
            " of each draft token. Plain decoding: as many greedy streams of an engine without speculation,"
            f" vLLM's defaults. Draft model, n-grams: vLLM's own speculation, the model a"
            f" {self._arguments.draft_shape} on the same GPU; tokens a step as they came."
            " Engine Python: taking drafts in, scheduling, reading outputs and preparing inputs.",
            columns=COLUMNS,
            rows=self._rows,
        )


async def measure(arguments: argparse.Namespace) -> None:
    tables = [Table(run, arguments) for run in arguments.runs]
    arguments.slots = max(all_edges(tables))
    for part in OPTIONS:
        asking = [table for table in tables if part in PARTS[table.run]]
        if not asking:
            continue
        if arguments.seconds_left() < START_S:
            print(f"no time to start {part}", flush=True)
            break
        async with engine(arguments, part) as target:
            await MEASURE[part](target, arguments, asking)
        for table in asking:
            table.save()


async def measure_plain(target: VllmTarget, arguments: argparse.Namespace, tables: Sequence[Table]) -> None:
    async for num_edges, (tokens_s, _) in decode_all(target, arguments, all_edges(tables)):
        for table in tables:
            if num_edges in table.edges:
                table.add_plain(num_edges, tokens_s)


def all_edges(tables: Sequence[Table]) -> list[int]:
    return sorted({num_edges for table in tables for num_edges in table.edges})


async def measure_own_speculation(
    scheme: str, target: VllmTarget, arguments: argparse.Namespace, tables: Sequence[Table]
) -> None:
    for table in tables:
        async for num_edges, (tokens_s, per_step) in decode_all(target, arguments, table.edges):
            table.add_alone(scheme, num_edges, tokens_s, str(USUAL_DRAFT), f"{per_step:.1f} a step")


async def decode_all(
    target: VllmTarget, arguments: argparse.Namespace, edges: Sequence[int]
) -> AsyncIterator[tuple[int, tuple[float, float]]]:
    """`decode` for each number of edges."""
    bench = Bench(target, 1)
    await decode(bench, max(edges), 16)  # what is compiled or captured on first use
    for num_edges in edges:
        if arguments.seconds_left() < CELL_S:
            return
        yield num_edges, await decode(bench, num_edges)


async def decode(bench: Bench, num_streams: int, num_tokens: int = 192) -> tuple[float, float]:
    """Tokens per second of plain streams, and tokens that a stream gets at once: medians of three."""
    # Every pattern comes twice, so that n-grams find something from the first token on.
    texts = [2 * bench.text(CONTEXT // 2) for _ in range(num_streams)]

    async def stream(text: Sequence[int], num_tokens: int) -> int:
        async with bench.target.sequence(text) as sequence:
            return len([new async for new in sequence.generate(text, plain(num_tokens))])

    await asyncio.gather(*(stream(text, 1) for text in texts))  # prompts first
    rates, per_step = [], []
    for _ in range(3):
        began = time.perf_counter()
        num_steps = await asyncio.gather(*(stream(text, num_tokens) for text in texts))
        rates.append(num_streams * num_tokens / (time.perf_counter() - began))
        per_step.append(num_streams * num_tokens / sum(num_steps))
    return statistics.median(rates), statistics.median(per_step)


def plain(num_tokens: int) -> GenerateOptions:
    return GenerateOptions(
        sampling=Sampling(), seed=0, start=0, max_tokens=num_tokens, end_token_ids=frozenset()
    )


async def warmed(target: VllmTarget, arguments: argparse.Namespace) -> Edges:
    """Edges whose first rounds are over, with the engine's clocks running."""
    target.verification = "resident"  # random weights may make NaN rows, which its own test would refuse
    edges = Edges(target, arguments.slots)
    await edges.run(arguments.slots, usual(), 1.0)
    await target.llm.collective_rpc("time_preparation")
    if arguments.explain:
        await target.llm.collective_rpc("watch_steps")
    return edges


async def measure_resident(
    target: VllmTarget, arguments: argparse.Namespace, tables: Sequence[Table]
) -> None:
    edges = await warmed(target, arguments)
    for table in tables:
        cells = [(count, load) for load in LOADS[table.run] for count in table.edges]
        await measure_cells(edges, cells, arguments, table, "resident")
        if table.run == "usual":
            async for count, (tokens_s, _) in decode_all(target, arguments, table.edges):
                table.add_alone("plain decoding, the same engine as resident", count, tokens_s)


async def measure_groups(
    scheme: str, target: VllmTarget, arguments: argparse.Namespace, tables: Sequence[Table]
) -> None:
    """Other numbers of groups than the service's; few sessions are in one."""
    edges = await warmed(target, arguments)
    for table in tables:
        cells = [(count, usual()) for count in table.edges if count > TOGETHER]
        await measure_cells(edges, cells, arguments, table, scheme)


async def measure_cells(
    edges: Edges,
    cells: Sequence[tuple[int, Load]],
    arguments: argparse.Namespace,
    table: Table,
    scheme: str,
) -> None:
    for count, load in cells:
        if arguments.seconds_left() < CELL_S:
            return
        before = await steps(edges.target)
        table.add(count, load, await edges.run(count, load, arguments.seconds), scheme)
        if arguments.explain:
            explain(before, await steps(edges.target))


async def steps(target: VllmTarget) -> dict[str, tuple[int, float]]:
    [found] = await target.llm.collective_rpc("steps")
    return dict(found)


def explain(before: dict[str, tuple[int, float]], after: dict[str, tuple[int, float]]) -> None:
    """Print what one call of each part of a step took, prompts and warm-up included."""
    for what, (calls, seconds) in after.items():
        calls_before, seconds_before = before.get(what, (0, 0.0))
        if calls > calls_before:
            calls, seconds = calls - calls_before, seconds - seconds_before
            print(f"    {what}: {calls} calls, {1e3 * seconds / calls:.2f} ms each", flush=True)


MEASURE = {
    "plain": measure_plain,
    "resident": measure_resident,
    "two": partial(measure_groups, "resident, in two groups"),
    "one": partial(measure_groups, "resident, in one"),
    "draft-model": partial(measure_own_speculation, "draft model"),
    "ngram": partial(measure_own_speculation, "n-grams"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("runs", nargs="+", choices=PARTS)
    parser.add_argument("--edges", type=numbers, help="instead of the run's own")
    parser.add_argument("--seconds", type=float, default=2.5, help="window of each cell")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--draft-shape", choices=SHAPES, default=DRAFT_SHAPE)
    parser.add_argument("--engine", default='{"max_num_batched_tokens": 8192}', help="of vLLM's, as JSON")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds that all may take")
    parser.add_argument("--explain", action="store_true", help="print what a step's parts take")
    parser.add_argument("--rows", type=Path, help="folder for the rows so far, written after each")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.budget
    arguments.seconds_left = lambda: deadline - time.perf_counter()
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
