"""How often sampled drafts agree with the target: shared noise, independent noise, and the textbook ratio.

The target writes answers at the temperature in question; at each position both models' rows are recorded.
From two rows, p of the target and q of the draft, follows how often a draft token is accepted:

- shared noise: both draw by Gumbel-max with the same noise (`sampling.draw`, run here over many seeds);
- independent noise: the sum over x of p(x) q(x);
- the ratio form min(1, p/q) of Leviathan et al. 2023, arXiv:2211.17192, which needs q on the wire:
  the sum over x of min(p(x), q(x));
- the draft's likeliest token, whatever the temperature: p of it.

Prompts come from JSON lines (`question` or `turns`), named by argument; no text is stored.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import save
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.json_lines import numbered_lines
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import Registry, resolve
from shared.sampling import Rows, Sampling, draw, rows_from_logits

TEMPERATURES = (0.7, 1.0)
NUM_SEEDS = 256
"""Draws per position of the coupled pair."""
MAX_PROMPT_TOKENS = 200
NUM_RESAMPLES = 4000
FORMS = ("shared", "independent", "ratio", "likeliest")

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Both models' rows at the same positions of one answer."""

    target: Rows
    draft: Rows


def questions(paths: Sequence[Path]) -> Iterator[str]:
    """First turns of the files in turn: one of each, again and again."""
    columns = []
    for path in paths:
        rows = [json.loads(line) for _, line in numbered_lines(path.read_text(encoding="utf-8"))]
        columns.append([row["question"] if "question" in row else row["turns"][0] for row in rows])
    return (q for rank in itertools.zip_longest(*columns) for q in rank if q is not None)


def record(
    target: LlamaContext, draft: LlamaContext, prompt: list[int], sampling: Sampling, seed: int, num: int
) -> Recorded:
    """Let the target write up to `num` tokens, then read the draft's rows over the same text."""
    text: list[int] = []
    target_rows: list[Rows] = []
    pending = prompt[target.align(0, prompt[:-1]) :]
    while len(text) < num and not target.model.end_token_ids.intersection(text[-1:]):
        row = rows_from_logits(target.extend(0, pending, 1), sampling.row_width)
        pending = [int(draw(row, sampling, seed, len(text))[0])]
        target_rows.append(row)
        text += pending
    read = [*prompt, *text[:-1]]
    kept = draft.align(0, prompt[:-1])
    draft_rows = rows_from_logits(draft.extend(0, read[kept:], len(text)), sampling.row_width)
    return Recorded(
        Rows(
            np.concatenate([row.token_ids for row in target_rows]),
            np.concatenate([row.logprobs for row in target_rows]),
        ),
        draft_rows,
    )


def dense(rows: Rows, temperature: float, ids: NDArray[np.int64]) -> Float:
    """[num_positions, len(ids)], what is drawn from: the rows at a temperature, renormalised.

    Args:
        ids: all that occur in any row, ascending.
    """
    scores = (rows.logprobs - rows.logprobs[:, :1]) / temperature
    probs = np.exp(scores)
    probs /= probs.sum(axis=1, keepdims=True)
    out = np.zeros((len(rows), len(ids)))
    np.put_along_axis(out, np.searchsorted(ids, rows.token_ids), probs, axis=1)
    return out


def acceptance(recorded: Recorded, temperature: float) -> dict[str, Float]:
    """[num_positions] for each form: the probability that a draft token is accepted there."""
    ids = np.unique(np.concatenate([recorded.target.token_ids, recorded.draft.token_ids]))
    p = dense(recorded.target, temperature, ids)
    q = dense(recorded.draft, temperature, ids)
    sampling = Sampling(temperature=temperature)
    agreed = np.zeros(len(p))
    for seed in range(NUM_SEEDS):
        agreed += draw(recorded.target, sampling, seed, 0) == draw(recorded.draft, sampling, seed, 0)
    return {
        "shared": agreed / NUM_SEEDS,
        "independent": (p * q).sum(axis=1),
        "ratio": np.minimum(p, q).sum(axis=1),
        "likeliest": p[np.arange(len(p)), q.argmax(axis=1)],
    }


def interval(tops: Float, bottoms: Float, rng: np.random.Generator) -> str:
    """Ratio of two sums over answers, with its 95% bootstrap interval; answers are drawn, not positions."""
    drawn = rng.integers(len(tops), size=(NUM_RESAMPLES, len(tops)))
    ratios = tops[drawn].sum(axis=1) / bottoms[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{tops.sum() / bottoms.sum():.3f} ({low:.3f} to {high:.3f})"


def table(by_temperature: dict[float, list[Recorded]]) -> list[list[str]]:
    rng = np.random.default_rng(0)
    rows = []
    for temperature, answers in by_temperature.items():
        forms = [acceptance(answer, temperature) for answer in answers]
        counts = np.array([float(len(answer.target)) for answer in answers])
        sums = {name: np.array([form[name].sum() for form in forms]) for name in FORMS}
        rows.append(
            [
                f"{temperature:g}",
                f"{len(answers)} / {int(counts.sum())}",
                *(interval(sums[name], counts, rng) for name in FORMS),
                interval(sums["shared"], sums["ratio"], rng),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, action="append", required=True, help="JSON lines; repeatable")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--positions", type=int, default=48, help="of each prompt's answer")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    registry = Registry.load()
    contexts = [
        LlamaContext(
            LlamaModel(resolve(name, registry).path, name),
            num_sequences=1,
            context_tokens=512,
            rollback_tokens=0,
            max_rows=arguments.positions,
            threads=arguments.threads,
        )
        for name in (DEFAULT_TARGET, DEFAULT_DRAFT)
    ]
    target, draft = contexts
    recorded: dict[float, list[Recorded]] = {temperature: [] for temperature in TEMPERATURES}
    rendered = (target.model.render_chat([Message("user", q)]) for q in questions(arguments.data))
    short = (prompt for prompt in rendered if len(prompt) <= MAX_PROMPT_TOKENS)
    for i, prompt in enumerate(itertools.islice(short, arguments.prompts)):
        for temperature, answers in recorded.items():
            sampling = Sampling(temperature=temperature)
            answers.append(record(target, draft, prompt, sampling, i, arguments.positions))
        print(f"{i + 1} of {arguments.prompts} prompts", flush=True)
    save(
        "coupling",
        command=f"python -m benchmarks.coupling --data ... --prompts {arguments.prompts}",
        title="Sampled drafts: agreement by shared noise against the ratio form",
        notes=(
            f"{DEFAULT_DRAFT} drafts for {DEFAULT_TARGET}. Probability that a draft token is accepted, mean"
            " over positions of the target's own sampled answers to prompts of up to"
            f" {MAX_PROMPT_TOKENS} tokens; 95% bootstrap intervals over answers. Shared noise is what duet"
            " does and puts no probability on the wire; the ratio form, min(1, p/q), needs the draft's; the"
            " likeliest token is drafted whatever the temperature."
        ),
        columns=[
            "temperature",
            "answers / positions",
            "shared noise",
            "independent noise",
            "ratio form",
            "likeliest token",
            "shared / ratio form",
        ],
        rows=table(recorded),
    )
    for context in contexts:
        context.close()
        context.model.close()


if __name__ == "__main__":
    main()
