"""Judge heads by how many wrong tokens they may accept: what each is worth on answers of held-out questions.

Reads what `duet-cloud judge collect` left; runs no model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import save
from cloud_service.judging.evaluation import evaluate
from cloud_service.judging.head_file import write_head
from cloud_service.judging.labels import is_held_out, judged_tokens
from cloud_service.judging.states import load_states
from cloud_service.judging.training import train_heads
from edge_agent.evaluation.metrics import auroc
from shared.config import DEFAULT_TARGET
from shared.labelled_answers import from_lines
from shared.models import Registry, resolve

FALSE_ACCEPTS = (0.02, 0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, nargs="+", help="files of `duet eval answers`, one a data set")
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--heads", type=Path, help="folder that the heads are left in")
    parser.add_argument("--draft-tokens", type=int, default=16)
    arguments = parser.parse_args()
    sha256 = resolve(DEFAULT_TARGET, Registry.load()).sha256
    sets = {
        path.stem: list(load_states(arguments.states, sha256, from_lines(path.read_text("utf-8"), path.name)))
        for path in arguments.answers
    }
    seen = [each for answers in sets.values() for each in answers if not is_held_out(each[0].id)]
    tokens = judged_tokens(seen)
    assert tokens is not None, "no labelled answer was read"
    rows = []
    heads = train_heads(tokens, model=DEFAULT_TARGET, model_sha256=sha256, shares=FALSE_ACCEPTS)
    for share, head in zip(FALSE_ACCEPTS, heads, strict=True):
        if arguments.heads is not None:
            write_head(head, arguments.heads / f"judge-{share:g}.safetensors")
        for name, answers in sets.items():
            unseen = [each for each in answers if is_held_out(each[0].id)]
            judged = judged_tokens(unseen)
            assert judged is not None, "no answer of a held-out question was read"
            disputed, right = judged.disputed, judged.right[judged.disputed]
            quality = evaluate(head, unseen, target=DEFAULT_TARGET, draft_tokens=arguments.draft_tokens)
            rows.append(
                [
                    f"{share:g}",
                    name,
                    f"{quality.num_questions} / {quality.num_answers}",
                    f"{auroc(head.probabilities(judged.hidden[disputed]), right):.2f}",
                    f"{auroc(judged.logprobs[disputed], right):.2f}",
                    str(quality.precision),
                    str(quality.recall),
                    str(quality.false_accepts),
                    str(quality.errors_stopped_lossless),
                    str(quality.errors_stopped),
                    str(quality.acceptance_length_lossless),
                    str(quality.acceptance_length),
                    str(quality.gain),
                ]
            )
    save(
        "judge_heads",
        command="python -m benchmarks.judge_heads ANSWERS... --states STATES",
        title="Judge heads on answers of held-out questions",
        notes=(
            f"Hidden states of {DEFAULT_TARGET}; trained on {len(seen)} answers to"
            f" {len({answer.id for answer, _ in seen})} other questions ({len(tokens.right)} labelled tokens,"
            f" {int(tokens.disputed.sum())} in dispute: not the target's own). Tokens a round at"
            f" {arguments.draft_tokens} draft tokens, along the draft model's answers up to their first"
            " errors. AUROC: how well right tokens in dispute rank before wrong ones, by the head and by the"
            " target's probability of them. Errors stopped: first errors with a rejection within a draft's"
            " length. Labels by rule (docs/methods.md). 95% bootstrap intervals over questions."
        ),
        columns=[
            "false accepts allowed",
            "set",
            "questions / answers",
            "AUROC",
            "of likelihood",
            "precision",
            "recall",
            "false accepts",
            "errors stopped, lossless",
            "errors stopped, judge",
            "lossless, tokens a round",
            "judge, tokens a round",
            "gain",
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
