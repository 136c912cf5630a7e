"""What a judge head is worth on answers that it has not seen. Numbers in, numbers out.

Acceptance is read along the draft model's own answers, up to the first error of a wrong one. What becomes of
texts that the target corrects is not in them: `duet eval speculation --policy judge` runs both models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cloud_service.judging.labels import RIGHT, WRONG, token_labels
from cloud_service.judging.states import ReadAnswer
from shared.bootstrap import Estimate, bootstrap_interval
from shared.judge import JudgeHead
from shared.labelled_answers import LabelledAnswer

Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of a head on one set of questions; NaN where nothing was counted."""

    num_questions: int
    num_answers: int
    precision: Estimate
    """Of the disputed tokens that the judge accepts, those that are right."""
    recall: Estimate
    """Of the disputed tokens that are right, those that the judge accepts."""
    false_accepts: Estimate
    """Of the disputed tokens that are wrong, those that the judge accepts."""
    errors_stopped: Estimate
    """Of the draft model's first errors, those with a rejection within a draft's length from the error on."""
    errors_stopped_lossless: Estimate
    acceptance_length: Estimate
    """Tokens a round, the target's own included, at `draft_tokens`."""
    acceptance_length_lossless: Estimate
    gain: Estimate
    """The first by the second."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one answer; estimates are ratios of their sums."""

    question: str
    accepted_right: int = 0
    accepted_wrong: int = 0
    disputed_right: int = 0
    disputed_wrong: int = 0
    errors: int = 0
    stopped: int = 0
    stopped_lossless: int = 0
    tokens: int = 0
    rounds: int = 0
    rounds_lossless: int = 0


def evaluate(
    head: JudgeHead, read: Sequence[tuple[LabelledAnswer, ReadAnswer]], *, target: str, draft_tokens: int
) -> Quality:
    """
    Args:
        target: name of the target, whose own answers tell nothing of acceptance.
        draft_tokens: of each draft.
    """
    counts = [_count(head, answer, states, target, draft_tokens) for answer, states in read]
    questions = sorted({each.question for each in counts})
    names = [name for name in _Counts.__slots__ if name != "question"]
    by_question = np.zeros((len(questions), len(names)))
    for each in counts:
        by_question[questions.index(each.question)] += [getattr(each, name) for name in names]

    def estimate(figure: Callable[[dict[str, float]], float]) -> Estimate:
        return bootstrap_interval(
            lambda rows: figure(dict(zip(names, rows.sum(axis=0), strict=True))), by_question
        )

    return Quality(
        num_questions=len(questions),
        num_answers=len(counts),
        precision=estimate(lambda c: _ratio(c["accepted_right"], c["accepted_right"] + c["accepted_wrong"])),
        recall=estimate(lambda c: _ratio(c["accepted_right"], c["disputed_right"])),
        false_accepts=estimate(lambda c: _ratio(c["accepted_wrong"], c["disputed_wrong"])),
        errors_stopped=estimate(lambda c: _ratio(c["stopped"], c["errors"])),
        errors_stopped_lossless=estimate(lambda c: _ratio(c["stopped_lossless"], c["errors"])),
        acceptance_length=estimate(lambda c: _ratio(c["tokens"], c["rounds"])),
        acceptance_length_lossless=estimate(lambda c: _ratio(c["tokens"], c["rounds_lossless"])),
        gain=estimate(lambda c: _ratio(c["rounds_lossless"], c["rounds"])),
    )


def num_rounds(stands: Bool, draft_tokens: int) -> int:
    """Rounds that a text takes whose tokens would stand, or not, if they were drafted.

    The target's own token closes a round. After a rejection drafting goes on behind it, as though the
    correction had been the text's token: in the target's own greedy text it is, in another this flatters.

    Args:
        stands: [num_tokens]

    >>> num_rounds(np.array([True, True, False, True, True]), draft_tokens=4)
    2
    """
    rounds = position = 0
    while position < len(stands):
        draft = stands[position : position + draft_tokens]
        position += (len(draft) if draft.all() else int(draft.argmin())) + 1
        rounds += 1
    return rounds


def _count(
    head: JudgeHead, answer: LabelledAnswer, read: ReadAnswer, target: str, draft_tokens: int
) -> _Counts:
    labels = token_labels(answer, read.ends)
    own = read.token_ids == read.own_ids
    accepted = head.acceptable(read.hidden)
    right, wrong = ~own & (labels == RIGHT), ~own & (labels == WRONG)
    counts = _Counts(
        answer.id,
        accepted_right=int((accepted & right).sum()),
        accepted_wrong=int((accepted & wrong).sum()),
        disputed_right=int(right.sum()),
        disputed_wrong=int(wrong.sum()),
    )
    return (
        counts if answer.model == target else _with_course(counts, labels, own, own | accepted, draft_tokens)
    )


def _with_course(
    counts: _Counts, labels: NDArray[np.int8], own: Bool, stands: Bool, draft_tokens: int
) -> _Counts:
    """Add what the draft model's answer tells of rounds, and of its first error."""
    errors = np.flatnonzero(labels == WRONG)
    end = int(errors[0]) if errors.size else len(labels)
    first = slice(end, end + draft_tokens)
    return replace(
        counts,
        errors=int(errors.size > 0),
        stopped=int(errors.size > 0 and not stands[first].all()),
        stopped_lossless=int(errors.size > 0 and not own[first].all()),
        tokens=end,
        rounds=num_rounds(stands[:end], draft_tokens),
        rounds_lossless=num_rounds(own[:end], draft_tokens),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
