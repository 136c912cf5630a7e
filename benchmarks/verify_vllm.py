"""What verification costs on vLLM: one round against context and draft length, and many edges at once.

The weights are random where a shape is given by name (time does not depend on them), so that nothing is
downloaded: `python -m benchmarks.verify_vllm 7b`. A folder measures a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import torch
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks.harness import quantile, save
from cloud_service.targets import vllm_judge
from cloud_service.targets.base import GenerateOptions, TextSide
from cloud_service.targets.hf_text import HfText
from cloud_service.targets.vllm import VllmTarget, engine_config
from shared.judge import JudgeHead
from shared.messages import Message
from shared.sampling import Sampling
from shared.vocab import TokenKind, Vocabulary

# Of Qwen2.5; "tiny" is for trying this program out.
SHAPES = {
    "tiny": (256, 512, 2, 4, 2, 4096, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
}
SHAPE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
USUAL_DRAFT = 8
COMMITTED = 5
"""Tokens that a round of `USUAL_DRAFT` draft tokens gains."""


class Numbers:
    """The text side of a model without a tokenizer: ids stand for themselves."""

    def __init__(self, name: str, vocab_size: int) -> None:
        self.name = name
        self.end_token_ids: frozenset[int] = frozenset()
        self.vocabulary = Vocabulary(name, [b"?"] * vocab_size, [TokenKind.TEXT] * vocab_size)

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        raise NotImplementedError

    def piece(self, token_id: int) -> bytes:
        return self.vocabulary.pieces[token_id]


def write_shape(folder: Path, name: str, max_tokens: int) -> None:
    config = {
        **dict(zip(SHAPE_KEYS, SHAPES[name], strict=True)),
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


@asynccontextmanager
async def loaded(arguments: argparse.Namespace) -> AsyncIterator[VllmTarget]:
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_model_len": arguments.max_tokens, **json.loads(arguments.engine)}
        judged = "judge" in arguments.parts
        if judged:
            options |= vllm_judge.engine_options()
        model = arguments.model
        if model in SHAPES:
            write_shape(Path(folder), model, arguments.max_tokens)
            config = engine_config(folder, {"load_format": "dummy", **options})
            text: TextSide = Numbers(model, config.model_config.get_vocab_size())
        else:
            config = engine_config(model, options)
            vocab_size = config.model_config.get_vocab_size()
            text = HfText.load(model, Path(model).name, vocab_size=vocab_size)
        head = random_head(config.model_config.get_hidden_size()) if judged else None
        target = VllmTarget(config, text, head)
        try:
            yield target
        finally:
            await target.close()


def random_head(hidden_size: int) -> JudgeHead:
    weight = np.random.default_rng(0).normal(size=hidden_size)
    return JudgeHead(model="", model_sha256="", weight=weight, bias=0.0, threshold=0.5)


class Bench:
    def __init__(self, target: VllmTarget, num_rounds: int) -> None:
        self.target = target
        self.num_rounds = num_rounds
        self._ids = sorted(target.vocabulary.legal_ids)
        self._rng = random.Random(0)
        self._salts = itertools.count()

    def text(self, length: int) -> list[int]:
        return self._rng.choices(self._ids, k=length)

    async def score(
        self, text: list[int], num_rows: int, width: int, salt: str | None = None, num_judged: int = 0
    ) -> None:
        async with self.target.sequence(text, tenant=salt) as sequence:
            await sequence.score(text, num_rows=num_rows, width=width, num_judged=num_judged)

    async def bare(self, text: list[int], num_rows: int, width: int) -> None:
        """The request of a round with nothing of ours around it."""
        asked = self.target.asked_width(width)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=asked,
            logprobs=asked,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in self.target.llm.generate(tokens_input(text), params, f"bare-{next(self._salts)}"):
            pass

    async def round_ms(self, context: int, draft: int, *, width: int = 1, cached: bool = True) -> float:
        """Median of rounds over a context that grows a little and ends in another draft each time."""
        times = []
        async for text in self._texts(context, draft):
            salt = None if cached else f"salt-{next(self._salts)}"
            times.append(await timed_ms(self.score(text, draft + 1, width, salt)))
        return statistics.median(times[2:])

    async def over_bare(self, context: int, draft: int) -> float:
        """Median ratio of a round to the bare request, taken in turn on equal terms."""
        ratios = []
        async for text in self._texts(context, draft):
            other = text[:-draft] + self.text(draft)
            ours = await timed_ms(self.score(text, draft + 1, 1))
            ratios.append(ours / await timed_ms(self.bare(other, draft + 1, 1)))
        return statistics.median(ratios[2:])

    async def judged_ms(self, context: int, draft: int) -> tuple[float, float]:
        """Medians of a lossless and of a judged round, taken in turn on equal terms."""
        lossless, judged = [], []
        async for text in self._texts(context, draft):
            other = text[:-draft] + self.text(draft)
            lossless.append(await timed_ms(self.score(text, draft + 1, 1)))
            judged.append(await timed_ms(self.score(other, draft + 1, 1, num_judged=draft)))
        return statistics.median(lossless[2:]), statistics.median(judged[2:])

    async def _texts(self, context: int, draft: int) -> AsyncIterator[list[int]]:
        base = self.text(context + self.target.block_tokens)
        await self.score(base[:context], 1, 1)
        for i in range(self.num_rounds + 2):  # two to warm up
            # Spreads how much lies past the last whole block.
            length = context + 1 + (7 * i) % (self.target.block_tokens - 1)
            yield base[:length] + self.text(draft)

    async def decode(self, num_streams: int, context: int, num_tokens: int) -> float:
        """Tokens per second of plain greedy streams, prompts being cached."""
        options = GenerateOptions(
            sampling=Sampling(), seed=0, start=0, max_tokens=num_tokens, end_token_ids=frozenset()
        )
        texts = [self.text(context) for _ in range(num_streams)]
        for text in texts:
            await self.score(text, 1, 1)

        async def stream(text: list[int]) -> None:
            async with self.target.sequence(text) as sequence:
                async for _ in sequence.generate(text, options):
                    pass

        await stream(texts[0])
        began = time.perf_counter()
        await asyncio.gather(*map(stream, texts))
        return num_streams * num_tokens / (time.perf_counter() - began)

    async def edges(
        self, num_edges: int, context: int, seconds: float, num_judged: int = 0
    ) -> tuple[float, float]:
        """Rounds per second and 95th percentile in ms, every edge sending its next round at once."""
        times: list[float] = []
        ends = [float("inf")]

        async def edge() -> None:
            text = self.text(context)
            await self.score(text, 1, 1)
            async with self.target.sequence(text) as sequence:
                while time.perf_counter() < ends[0] and len(text) < self.target.context_tokens - 64:
                    draft = self.text(USUAL_DRAFT)
                    began = time.perf_counter()
                    await sequence.score(
                        text + draft, num_rows=USUAL_DRAFT + 1, width=1, num_judged=num_judged
                    )
                    now = time.perf_counter()
                    if starts <= began and now <= ends[0]:
                        times.append(1e3 * (now - began))
                    text += draft[: COMMITTED - 1] + self.text(1)

        starts = float("inf")
        tasks = [asyncio.create_task(edge()) for _ in range(num_edges)]
        await asyncio.sleep(1.0 + num_edges * context / 40_000)  # prompts first
        starts = time.perf_counter()
        ends[0] = starts + seconds
        await asyncio.gather(*tasks)
        return len(times) / seconds, quantile(times, 0.95) if times else float("nan")


async def timed_ms(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return 1e3 * (time.perf_counter() - began)


async def measure(arguments: argparse.Namespace) -> None:
    async with loaded(arguments) as target:
        bench = Bench(target, arguments.rounds)
        for context in arguments.contexts:  # what is compiled or captured on first use
            await bench.round_ms(context, USUAL_DRAFT)
        await bench.decode(1, arguments.contexts[0], 16)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        notes = (
            f"{where}; {'random weights' if arguments.model in SHAPES else 'real weights'};"
            f" {'V2' if target.config.use_v2_model_runner else 'V1'} runner, engine options"
            f" `{arguments.engine}`; median of {arguments.rounds} rounds, one stream, greedy unless said"
            " otherwise."
        )
        suffix = f"{Path(arguments.model).name}_{where.replace(' ', '_').lower()}"
        if "rounds" in arguments.parts:
            await measure_rounds(bench, arguments, notes, suffix)
        if "edges" in arguments.parts:
            await measure_edges(bench, arguments, notes, suffix)
        if "judge" in arguments.parts:
            await measure_judge(bench, arguments, notes, suffix)


async def measure_rounds(bench: Bench, arguments: argparse.Namespace, notes: str, suffix: str) -> None:
    rows = []
    for context in arguments.contexts:
        step_ms = 1e3 / await bench.decode(1, context, 64)
        by_draft = {draft: await bench.round_ms(context, draft) for draft in arguments.drafts}
        rows.append(
            [
                f"{context:,}",
                *[f"{by_draft[draft]:.1f}" for draft in arguments.drafts],
                f"{await bench.round_ms(context, USUAL_DRAFT, width=64):.1f}",
                f"{await bench.round_ms(context, USUAL_DRAFT, cached=False):.1f}",
                f"{await bench.over_bare(context, USUAL_DRAFT):.2f}",
                f"{step_ms:.1f}",
                f"{by_draft[max(by_draft)] / step_ms:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    save(
        f"verify_vllm_{suffix}",
        command=f"python -m benchmarks.verify_vllm {arguments.model} --parts rounds",
        title=f"A verification round on vLLM: {Path(arguments.model).name}",
        notes=f"{notes} Times in ms. Over bare: our round over the same request to the engine alone.",
        columns=[
            "context",
            *[f"draft of {draft}" for draft in arguments.drafts],
            f"{USUAL_DRAFT}, top-k 64",
            f"{USUAL_DRAFT}, no cache",
            "over bare",
            "decode step",
            f"draft of {max(arguments.drafts)} / step",
        ],
        rows=rows,
    )


async def measure_edges(bench: Bench, arguments: argparse.Namespace, notes: str, suffix: str) -> None:
    rows = []
    for num_edges in arguments.edges:
        plain = await bench.decode(num_edges, 512, 64)
        rounds, p95 = await bench.edges(num_edges, 512, arguments.seconds)
        rows.append(
            [
                str(num_edges),
                *(f"{rounds:.0f}", f"{p95:.0f}", f"{rounds * COMMITTED:,.0f}", f"{plain:,.0f}"),
                f"{rounds * COMMITTED / plain:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    save(
        f"verify_vllm_edges_{suffix}",
        command=f"python -m benchmarks.verify_vllm {arguments.model} --parts edges",
        title=f"Many edges on one vLLM: {Path(arguments.model).name}",
        notes=f"{notes} Edges send rounds back to back: {USUAL_DRAFT} draft tokens, {COMMITTED} tokens"
        " gained, context 512. Plain: as many greedy streams of the target alone.",
        columns=["edges", "rounds/s", "p95, ms", "committed tokens/s", "plain tokens/s", "ratio"],
        rows=rows,
    )


async def measure_judge(bench: Bench, arguments: argparse.Namespace, notes: str, suffix: str) -> None:
    await bench.target.warm_up()
    if bench.target.judge_head is None:
        raise SystemExit("this engine shows no hidden states; its log says why")
    rows = []
    for context in arguments.contexts:
        lossless, judged = await bench.judged_ms(context, USUAL_DRAFT)
        rows.append(
            ["1", f"{context:,}", f"{lossless:.1f} ms", f"{judged:.1f} ms", f"{judged / lossless:.2f}"]
        )
        print(rows[-1], flush=True)
    for num_edges in arguments.edges:
        lossless, _ = await bench.edges(num_edges, 512, arguments.seconds)
        judged, _ = await bench.edges(num_edges, 512, arguments.seconds, USUAL_DRAFT)
        rows.append(
            [str(num_edges), "512", f"{lossless:.0f} /s", f"{judged:.0f} /s", f"{lossless / judged:.2f}"]
        )
        print(rows[-1], flush=True)
    save(
        f"verify_vllm_judge_{suffix}",
        command=f"python -m benchmarks.verify_vllm {arguments.model} --parts judge",
        title=f"Judged rounds on vLLM: {Path(arguments.model).name}",
        notes=f"{notes} {USUAL_DRAFT} draft tokens; a random head, applied in the engine. One edge: time of a"
        " round; more: rounds per second, back to back. A judged round calls the engine once more.",
        columns=["edges", "context", "lossless", "judged", "time over lossless"],
        rows=rows,
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help=f"a shape ({', '.join(SHAPES)}) or a Hugging Face folder")
    parser.add_argument("--parts", default="rounds,edges", help="of: rounds, edges, judge")
    parser.add_argument("--contexts", type=numbers, default=[256, 1024, 4096])
    parser.add_argument("--drafts", type=numbers, default=[1, 4, USUAL_DRAFT, 16])
    parser.add_argument("--edges", type=numbers, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=8.0, help="window of each number of edges")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--engine", default="{}", help="options of vLLM's engine, as JSON")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
