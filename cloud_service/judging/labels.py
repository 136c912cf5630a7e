"""Which tokens of answers are right or wrong, and which questions are held out. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_service.judging.states import ReadAnswer
from shared.labelled_answers import LabelledAnswer

RIGHT, WRONG, UNKNOWN = 1, 0, -1

_HELD_OUT_SHARE = 0.4
_ONLY_THE_ANSWER_IS_WRONG = "final"
"""`found_by` of an error before which nothing is known to be right."""


def token_labels(answer: LabelledAnswer, ends: NDArray[np.int32]) -> NDArray[np.int8]:
    """RIGHT, WRONG or UNKNOWN for each token of an answer.

    Args:
        ends: [num_tokens], bytes of the answer up to the end of each token.
    """
    if answer.right:
        return np.full(len(ends), RIGHT, np.int8)
    if answer.error_at is None:
        return np.full(len(ends), UNKNOWN, np.int8)
    before = UNKNOWN if answer.found_by == _ONLY_THE_ANSWER_IS_WRONG else RIGHT
    num_bytes = len(answer.answer[: answer.error_at].encode())
    return np.where(ends > num_bytes, WRONG, before).astype(np.int8)


def is_held_out(question_id: str) -> bool:
    """Whether a question is for measuring, and not for training: the same on every machine.

    >>> is_held_out("gsm8k/0"), is_held_out("gsm8k/5")
    (True, False)
    """
    digest = hashlib.sha256(question_id.encode()).digest()
    return int.from_bytes(digest[-8:], "big") < _HELD_OUT_SHARE * 2**64


@dataclass(frozen=True, slots=True)
class JudgedTokens:
    """Tokens of many answers, one after the other, each with a label that is known."""

    hidden: NDArray[np.float16]
    """[num_tokens, hidden_size]"""
    right: NDArray[np.bool_]
    """[num_tokens]"""
    disputed: NDArray[np.bool_]
    """[num_tokens], whether the target would have said another: only these ask for the judge."""
    logprobs: NDArray[np.float32]
    """[num_tokens], nats, to the target."""
    question: NDArray[np.int64]
    """[num_tokens], a number for each question, so that no question is on both sides of a split."""


def judged_tokens(read: Iterable[tuple[LabelledAnswer, ReadAnswer]]) -> JudgedTokens | None:
    """Lay answers end to end; None where no token has a label."""
    parts = []
    questions: dict[str, int] = {}
    for answer, states in read:
        labels = token_labels(answer, states.ends)
        known = labels != UNKNOWN
        number = questions.setdefault(answer.id, len(questions))
        parts.append(
            (
                states.hidden[known],
                labels[known] == RIGHT,
                (states.token_ids != states.own_ids)[known],
                states.logprobs[known],
                np.full(int(known.sum()), number),
            )
        )
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return JudgedTokens(*columns) if columns and len(columns[0]) else None
