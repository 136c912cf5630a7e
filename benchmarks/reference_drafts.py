"""What a perfect drafter would get: a data set's own reference answers as drafts, verified losslessly.

The question that Judge Decoding asks (Bachmann et al. 2025, arXiv:2501.19309): how much of a text that is
right does the target accept, when it accepts only what it would have said itself? The target reads question
and reference answer; at each position its likeliest token is compared with the reference's.

The file is named by argument (JSON lines with `question` and `solution`); no text is stored.
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.coupling import interval
from benchmarks.harness import save
from cloud_service.judging.evaluation import num_rounds
from shared.config import DEFAULT_TARGET
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import Registry, resolve

DRAFT_TOKENS = 8
_CALCULATOR = re.compile(r"<<.*?>>")
"""GSM8K's annotations for a calculator, which no model would write by itself."""


def agreement(context: LlamaContext, question: str, reference: str) -> NDArray[np.bool_]:
    """[num_reference_tokens], where the target's likeliest token is the reference's."""
    prompt = context.model.render_chat([Message("user", question)])
    answer = context.model.tokenize(reference)
    context.align(0, [])
    logits = context.extend(0, [*prompt, *answer[:-1]], len(answer))
    return np.array([int(np.argmax(row)) for row in logits]) == np.array(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with `question` and `solution`")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with arguments.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, arguments.questions)]
    model = LlamaModel(resolve(DEFAULT_TARGET, Registry.load()).path, DEFAULT_TARGET)
    with LlamaContext(
        model,
        num_sequences=1,
        context_tokens=1024,
        rollback_tokens=0,
        max_rows=400,
        threads=arguments.threads,
    ) as context:
        agreed = [agreement(context, row["question"], _CALCULATOR.sub("", row["solution"])) for row in rows]
    model.close()
    counts = np.array([float(len(answer)) for answer in agreed])
    hits = np.array([float(answer.sum()) for answer in agreed])
    rounds = np.array([float(num_rounds(answer, DRAFT_TOKENS)) for answer in agreed])
    first = np.array([float(len(answer) if answer.all() else np.argmin(answer)) for answer in agreed])
    rng = np.random.default_rng(0)
    save(
        "reference_drafts",
        command=f"python -m benchmarks.reference_drafts --data ... --questions {len(rows)}",
        title="Reference answers as drafts",
        notes=(
            f"{DEFAULT_TARGET} verifies the data set's own, right answers, calculator marks removed."
            " Agreement: share of positions where its likeliest token is the reference's, after all that"
            f" comes before in the reference. Acceptance length at {DRAFT_TOKENS} draft tokens counts the"
            " target's own token, and flatters: after a rejection it goes on with the reference. 95%"
            " bootstrap intervals over questions."
        ),
        columns=[
            "questions / positions",
            "agreement",
            "acceptance length",
            "tokens before the first rejection",
        ],
        rows=[
            [
                f"{len(rows)} / {int(counts.sum())}",
                interval(hits, counts, rng),
                interval(counts, rounds, rng),
                interval(first, np.ones(len(rows)), rng),
            ]
        ],
    )


if __name__ == "__main__":
    main()
