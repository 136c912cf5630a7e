"""What a decision costs over reading the question, which an answer needs anyway, on the real edge model."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys

from benchmarks.harness import paired_ratios, save, seconds, summarise
from edge_agent.edge_model import EdgeModel
from edge_agent.routing.probes import default_probes
from edge_agent.routing.reading import QuestionReader
from shared.config import DEFAULT_DRAFT, EdgeConfig
from shared.messages import Message
from shared.models import Registry, resolve

SENTENCE = "A merchant buys twelve crates of apples and sells them at the market on the next day. "
CHOICES = "\nWhich of these is true?\nA. He gains\nB. He loses\nC. Neither\nD. Both"
"""Multiple choice, so that all default probes are asked."""
NUM_EXTRA_TOKENS = 32


def question_of(edge: EdgeModel, num_tokens: int) -> Message:
    """A question that renders to about `num_tokens`."""
    text = SENTENCE
    while len(edge.model.render_chat([Message("user", text + CHOICES)])) < num_tokens:
        text += SENTENCE
    return Message("user", text + CHOICES)


def measure(edge: EdgeModel, reader: QuestionReader, num_tokens: int, repeats: int) -> list[str]:
    context = edge.context
    message = question_of(edge, num_tokens)
    prompt = edge.model.render_chat([message])
    probes = default_probes()

    def bare() -> float:
        context.align(0, [])
        return seconds(lambda: context.extend(0, prompt, 1))

    def decide() -> float:
        context.align(0, [])
        return seconds(lambda: reader.read(reader.question([message]), probes))

    reader.read(reader.question([message]), probes)  # measures priors, where no calibration has them
    context.align(0, [])
    before = context.num_decoded_tokens
    reader.read(reader.question([message]), probes)
    extra = context.num_decoded_tokens - before - len(prompt)
    decision, prefill, ratio = paired_ratios(decide, bare, repeats=repeats)
    step = summarise([_step(edge, prompt) for _ in range(5)]).median
    allowed = 1.25 if len(prompt) >= 256 else 1 + NUM_EXTRA_TOKENS * step / prefill.median
    return [
        str(len(prompt)),
        prefill.show("{:.3f}"),
        decision.show("{:.3f}"),
        ratio.show(),
        f"{allowed:.2f}",
        str(extra),
    ]


def _step(edge: EdgeModel, prompt: list[int]) -> float:
    """Seconds of one token after the prompt."""
    edge.context.align(0, prompt)
    return seconds(lambda: edge.context.extend(0, prompt[:1], 1))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_DRAFT)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    config = EdgeConfig(mode="auto", context_tokens=1024, threads=arguments.threads)
    resolved = resolve(arguments.model, Registry.load())
    edge = await EdgeModel.load(resolved.path, resolved.name, config)
    reader = QuestionReader(edge, {})
    rows = [
        await edge.run(lambda n=n: measure(edge, reader, n, arguments.repeats)) for n in arguments.lengths
    ]
    await edge.close()
    save(
        "routing_cost",
        command=shlex.join(["python", "-m", "benchmarks.routing_cost", *sys.argv[1:]]),
        title="A routing decision against reading the question",
        notes=f"{resolved.name}, default probes, {arguments.repeats} pairs in turn; seconds as median"
        " (interval), the ratio pair by pair. Aim: at most 1.25 from 256 tokens, below that a prefill and"
        f" {NUM_EXTRA_TOKENS} single tokens' time; at most 24 tokens more than the question. The answer"
        " reuses the prefill.",
        columns=["question, tokens", "bare prefill, s", "decision, s", "ratio", "allowed", "extra tokens"],
        rows=rows,
    )


if __name__ == "__main__":
    asyncio.run(main())
