"""Policy judge against lossless on held-out questions: acceptance length and right answers.

Under judge both models run, greedy, stop-and-wait. Lossless needs neither: its text is the target's own,
which was recorded and graded (`duet eval answers`), and a greedy draft stands exactly as far as the draft
model, reading that text, would have said the same. Rows go to a file, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.coupling import interval
from benchmarks.harness import machine, save
from cloud_service.judging.evaluation import num_rounds
from cloud_service.judging.head_file import read_head
from cloud_service.judging.labels import is_held_out
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item, load_items
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.json_lines import numbered_lines
from shared.judge import JudgeHead
from shared.labelled_answers import LabelledAnswer, from_lines
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import Registry, resolve
from shared.policies import num_judged

CONTEXT_TOKENS = 1024
MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One question under both policies."""

    id: str
    draft_tokens: int
    lossless_tokens: int
    lossless_rounds: int
    lossless_right: bool
    judge_tokens: int
    judge_rounds: int
    judge_right: bool
    judge_alone: int
    """Draft tokens that stand by the judge's word only."""


def context_of(name: str, threads: int, gpu_layers: int) -> LlamaContext:
    model = LlamaModel(resolve(name, Registry.load()).path, name, gpu_layers=gpu_layers)
    return LlamaContext(
        model,
        num_sequences=1,
        context_tokens=CONTEXT_TOKENS,
        rollback_tokens=0,
        max_rows=MAX_TOKENS,
        threads=threads,
    )


def likeliest(context: LlamaContext, text: Sequence[int], count: int) -> NDArray[np.int64]:
    """[count], the token that the model would put behind each of the text's last tokens."""
    kept = context.align(0, text[:-count])
    return np.array([int(row.argmax()) for row in context.extend(0, text[kept:], count)])


def draft(context: LlamaContext, text: list[int], count: int, ends: frozenset[int]) -> list[int]:
    drafted: list[int] = []
    while len(drafted) < count and not ends.intersection(drafted[-1:]):
        known = [*text, *drafted]
        kept = context.align(0, known[:-1])
        drafted.append(int(context.extend(0, known[kept:], 1)[0].argmax()))
    return drafted


def judged_answer(
    edge: LlamaContext, target: LlamaContext, head: JudgeHead, prompt: list[int], draft_tokens: int
) -> tuple[list[int], int, int]:
    """Completion, rounds, and draft tokens that stand by the judge's word only."""
    ends = target.model.end_token_ids
    completion: list[int] = []
    rounds = alone = 0
    while len(completion) < MAX_TOKENS and not ends.intersection(completion[-1:]):
        text = [*prompt, *completion]
        drafted = draft(edge, text, draft_tokens, ends)
        kept = target.align(0, text[:-1])
        work = [*text[kept:], *drafted]
        [rows] = target.decode([Extension(0, work, len(drafted) + 1, wants_hidden=True)])
        own = [int(row.argmax()) for row in rows]
        acceptable = head.acceptable(target.hidden_states(0)[1:]) & [token not in ends for token in drafted]
        stands = num_judged(drafted, own, acceptable)
        alone += sum(a != b for a, b in zip(drafted[:stands], own, strict=False))
        completion += drafted[:stands]
        if not ends.intersection(completion[-1:]):
            completion.append(own[stands])
        rounds += 1
    return completion, rounds, alone


def measure(
    item: Item,
    recorded: LabelledAnswer,
    edge: LlamaContext,
    target: LlamaContext,
    head: JudgeHead,
    draft_tokens: int,
) -> Row:
    model = target.model
    prompt = model.render_chat([Message("user", item.question)])
    own = model.tokenize(recorded.answer, special=False)
    agreed = likeliest(edge, [*prompt, *own[:-1]], len(own)) == np.array(own)
    completion, rounds, alone = judged_answer(edge, target, head, prompt, draft_tokens)
    answer = b"".join(map(model.piece, completion)).decode("utf-8", "replace")
    return Row(
        item.id,
        draft_tokens,
        lossless_tokens=len(own),
        lossless_rounds=num_rounds(agreed, draft_tokens),
        lossless_right=recorded.right,
        judge_tokens=len(completion),
        judge_rounds=rounds,
        judge_right=bool(is_right(item, answer)),
        judge_alone=alone,
    )


def measured(path: Path) -> list[Row]:
    text = path.read_text("utf-8") if path.exists() else ""
    return [Row(**json.loads(line)) for _, line in numbered_lines(text)]


def due(data: Sequence[str], answers: Sequence[Path]) -> Iterator[tuple[Item, LabelledAnswer]]:
    """Held-out questions of all sets in turn, with the target's recorded answer."""
    recorded = {
        answer.id: answer
        for path in answers
        for answer in from_lines(path.read_text("utf-8"), path.name)
        if answer.model == DEFAULT_TARGET
    }
    sets = [
        [item for item in load_items(name) if item.id in recorded and is_held_out(item.id)] for name in data
    ]
    for number in range(max(map(len, sets))):
        for items in sets:
            if number < len(items):
                yield items[number], recorded[items[number].id]


def table(head: str, rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for name in sorted({row.id.partition("/")[0] for row in rows}):
        own = [row for row in rows if row.id.startswith(f"{name}/")]

        def column(field: str, own: list[Row] = own) -> NDArray[np.float64]:
            return np.array([float(getattr(row, field)) for row in own])

        rng = np.random.default_rng(0)
        ones = np.ones(len(own))
        per_round = column("lossless_tokens").sum() / column("lossless_rounds").sum()
        found.append(
            [
                head,
                name,
                str(len(own)),
                f"{per_round:.2f}",
                interval(column("judge_tokens"), column("judge_rounds"), rng),
                f"{column('judge_tokens').sum() / column('judge_rounds').sum() / per_round:.2f}",
                f"{column('lossless_rounds').mean():.1f}",
                f"{column('judge_rounds').mean():.1f}",
                f"{100 * column('judge_alone').sum() / column('judge_tokens').sum():.1f}%",
                f"{int(column('lossless_right').sum())}",
                f"{int(column('judge_right').sum())}",
                interval(100 * (column("judge_right") - column("lossless_right")), ones, rng),
            ]
        )
    return found


def report(rows: Mapping[str, Sequence[Row]], ran_on: dict[str, str]) -> None:
    """
    Args:
        rows: by head.
    """
    [draft_tokens] = {row.draft_tokens for made in rows.values() for row in made}
    save(
        "judge",
        command="python -m benchmarks.judge ANSWERS... --data QUESTIONS... --head HEAD --rows ROWS",
        title="Policy judge against lossless, on held-out questions",
        notes=(
            f"{DEFAULT_DRAFT} drafts {draft_tokens} tokens for {DEFAULT_TARGET}, greedy, and waits."
            " Head: by the share of false accepts that it was allowed in training. Lossless: the target's"
            " recorded answers, and the draft model's agreement along them. Tokens a"
            " round count the target's own. By the judge alone: tokens that lossless would have rolled back."
            " Points: right answers under judge less those of lossless. Aim: 1.5 times the tokens a round at"
            " a loss of 1 point at most. 95% bootstrap intervals over questions."
        ),
        columns=[
            "head",
            "set",
            "questions",
            "lossless, tokens a round",
            "judge, tokens a round",
            "gain",
            "lossless, rounds an answer",
            "judge, rounds an answer",
            "by the judge alone",
            "right, lossless",
            "right, judge",
            "points",
        ],
        rows=[row for head, made in rows.items() for row in table(head, made)],
        ran_on=ran_on,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, nargs="+", help="files of `duet eval answers`")
    parser.add_argument("--data", nargs="+", required=True, help="the data sets that they answer")
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument(
        "--rows",
        type=Path,
        required=True,
        help="file that rows are added to; the table is of all JSONL files beside it, one a head",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="no question is begun after so many")
    parser.add_argument("--draft-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=0, help="of both models; -1 is all")
    arguments = parser.parse_args()
    began = time.monotonic()
    head = read_head(arguments.head)
    done = {row.id for row in measured(arguments.rows)}
    with (
        context_of(DEFAULT_DRAFT, arguments.threads, arguments.gpu_layers) as edge,
        context_of(DEFAULT_TARGET, arguments.threads, arguments.gpu_layers) as target,
    ):
        head.check_fits(DEFAULT_TARGET, resolve(DEFAULT_TARGET, Registry.load()).sha256, target.hidden_size)
        for item, recorded in due(arguments.data, arguments.answers):
            if time.monotonic() - began > arguments.seconds:
                break
            if item.id not in done:
                row = measure(item, recorded, edge, target, head, arguments.draft_tokens)
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(asdict(row))}\n")
    about = arguments.rows.with_name("machine.json")
    about.write_text(json.dumps(machine()), "utf-8")
    tabulate(arguments.rows.parent)


def tabulate(folder: Path) -> None:
    """The table of a folder's heads."""
    rows = {path.stem: measured(path) for path in sorted(folder.glob("*.jsonl"))}
    report(rows, json.loads((folder / "machine.json").read_text("utf-8")))


if __name__ == "__main__":
    main()
