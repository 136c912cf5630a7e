"""Records how the real pair agrees, for the virtual clock of `benchmarks.link`.

The target writes its greedy answer to each prompt; the draft model then reads along, and its greedy token
at each position is compared with the target's. Under greedy lossless verification this decides every
round whatever the draft lengths: a draft counts up to its first disagreement, and up to there it stands on
the target's own text. Prompts are named by argument (JSON lines with `turns` or `question`), and nothing of
them or of the answers is stored: per position only whether the two agree, and the drafter's top probability.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import machine
from benchmarks.recorded import RECORDING
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.json_lines import numbered_lines
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import Registry, resolve

CONTEXT_TOKENS = 1024


def load(name: str, threads: int) -> LlamaContext:
    model = LlamaModel(resolve(name, Registry.load()).path, name)
    return LlamaContext(
        model, num_sequences=1, context_tokens=CONTEXT_TOKENS, rollback_tokens=0, threads=threads
    )


def greedy(target: LlamaContext, prompt: list[int], num_tokens: int) -> list[int]:
    """The target's own answer, its end token included."""
    target.rewind(0, 0)
    text: list[int] = []
    pending = prompt
    while len(text) < num_tokens and not target.model.end_token_ids.intersection(text[-1:]):
        pending = [int(np.argmax(target.extend(0, pending, 1)[0]))]
        text += pending
    return text


def read_along(drafter: LlamaContext, prompt: list[int], text: list[int]) -> list[tuple[int, float]]:
    """For each position of `text`: whether the drafter's top token is the same, and its probability."""
    drafter.rewind(0, 0)
    rows = drafter.extend(0, [*prompt, *text[:-1]], len(text))
    found = []
    for row, wanted in zip(rows, text, strict=True):
        top = int(np.argmax(row))
        probability = float(1.0 / np.exp(row - row[top]).sum(dtype=np.float64))
        found.append((int(top == wanted), round(probability, 3)))
    return found


def prompts(path: Path) -> Iterator[str]:
    """Every line's first question, in a fixed random order."""
    lines = [line for _, line in numbered_lines(path.read_text(encoding="utf-8"))]
    for line in random.Random(0).sample(lines, len(lines)):
        row = json.loads(line)
        yield row["turns"][0] if "turns" in row else row["question"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-prompt-tokens", type=int, default=160)
    parser.add_argument("--draft", default=DEFAULT_DRAFT)
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORDING)
    arguments = parser.parse_args()
    drafter, target = (load(name, arguments.threads) for name in (arguments.draft, arguments.target))
    answers: list[list[tuple[int, float]]] = []
    for question in prompts(arguments.data):
        prompt = target.model.render_chat([Message("user", question)])
        if len(prompt) > arguments.max_prompt_tokens:
            continue
        text = greedy(target, prompt, arguments.tokens)
        answers.append(read_along(drafter, prompt, text))
        agreed = sum(same for same, _ in answers[-1])
        print(f"{len(answers)}: {len(text)} tokens, {agreed} agreed", flush=True)
        if len(answers) == arguments.prompts:
            break
    recorded = {
        "draft": arguments.draft,
        "target": arguments.target,
        "data": arguments.data.name,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "machine": machine(),
        "answers": answers,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(recorded).replace("]], [[", "]],\n[[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
