"""Labels of tokens, fitting a head to them, and what a head is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_service.judging.evaluation import evaluate, num_rounds
from cloud_service.judging.labels import JudgedTokens, is_held_out, judged_tokens, token_labels
from cloud_service.judging.states import ReadAnswer
from cloud_service.judging.training import threshold_for, train
from shared.errors import InvalidSetting
from shared.judge import JudgeHead
from shared.labelled_answers import LabelledAnswer

SHA = "ab" * 32
WIDTH = 8


def answer(right=False, error_at=None, found_by=None, text="abcdef", **fields) -> LabelledAnswer:
    defaults = {"id": "q", "model": "draft", "question": "?"}
    return LabelledAnswer(
        answer=text, right=right, error_at=error_at, found_by=found_by, **(defaults | fields)
    )


def tokens(num=200, noise=0.3, seed=0) -> JudgedTokens:
    """Hidden states whose first number says whether a token is right."""
    rng = np.random.default_rng(seed)
    right = rng.random(num) < 0.6
    hidden = rng.normal(size=(num, WIDTH))
    hidden[:, 0] = np.where(right, 2.0, -2.0) + noise * rng.normal(size=num)
    return JudgedTokens(
        hidden=hidden.astype(np.float16),
        right=right,
        disputed=rng.random(num) < 0.5,
        logprobs=np.zeros(num, np.float32),
        question=np.arange(num) // 10,
    )


# Labels


@pytest.mark.parametrize(
    ("labelled", "labels"),
    [
        pytest.param(answer(right=True), [1, 1, 1], id="a right answer is right throughout"),
        pytest.param(
            answer(error_at=2, found_by="calculation"), [1, 0, 0], id="a sum is wrong from there on"
        ),
        pytest.param(
            answer(error_at=3, found_by="hand"), [1, 0, 0], id="a token with the error in it is wrong"
        ),
        pytest.param(answer(error_at=4, found_by="final"), [-1, -1, 0], id="before a wrong end nobody knows"),
        pytest.param(answer(), [-1, -1, -1], id="without a known error nothing is known"),
        pytest.param(
            answer(error_at=1, found_by="hand", text="éabcd"), [1, 0, 0], id="offsets are characters"
        ),
    ],
)
def test_labels_of_three_tokens_of_two_bytes(labelled, labels):
    assert token_labels(labelled, np.array([2, 4, 6], np.int32)).tolist() == labels


def test_two_fifths_of_the_questions_are_held_out():
    share = np.mean([is_held_out(f"gsm8k/{number}") for number in range(2000)])
    assert share == pytest.approx(0.4, abs=0.03)


# Training


def test_a_head_trained_on_separable_tokens_separates_others():
    head = train(tokens(), model="t", model_sha256=SHA, max_false_accepts=0.0)
    unseen = tokens(seed=1)
    assert np.array_equal(head.acceptable(unseen.hidden), unseen.right)
    assert (head.model, head.model_sha256, head.hidden_size) == ("t", SHA, WIDTH)


def test_the_threshold_keeps_false_accepts_where_tokens_overlap():
    seen = tokens(noise=3.0, num=4000)
    heads = [train(seen, model="t", model_sha256=SHA, max_false_accepts=share) for share in (0.05, 0.3)]
    unseen = tokens(noise=3.0, num=8000, seed=1)
    accepted = [head.acceptable(unseen.hidden)[unseen.disputed & ~unseen.right].mean() for head in heads]
    assert accepted == pytest.approx([0.05, 0.3], abs=0.04)


@given(
    st.lists(st.tuples(st.floats(0.001, 0.999), st.booleans()), min_size=1, max_size=30), st.floats(0.0, 1.0)
)
def test_no_more_wrong_tokens_than_allowed_reach_the_threshold(scored, share):
    probabilities, right = np.array([p for p, _ in scored]), np.array([r for _, r in scored])
    threshold = threshold_for(probabilities, right, share)
    assert 0.0 < threshold < 1.0
    assert (probabilities[~right] >= threshold).sum() <= share * (~right).sum()


def test_too_little_to_train_on_is_refused_in_one_line():
    seen = tokens()
    one_question = JudgedTokens(
        seen.hidden, seen.right, seen.disputed, seen.logprobs, np.zeros(200, np.int64)
    )
    all_right = JudgedTokens(seen.hidden, seen.right | True, seen.disputed, seen.logprobs, seen.question)
    undisputed = JudgedTokens(seen.hidden, seen.right, seen.disputed & False, seen.logprobs, seen.question)
    for few in (one_question, all_right, undisputed):
        with pytest.raises(InvalidSetting, match="too few to train on") as caught:
            train(few, model="t", model_sha256=SHA, max_false_accepts=0.1)
        assert "\n" not in str(caught.value)


# Measuring


def read(own, hidden) -> ReadAnswer:
    """An answer of one-byte tokens, of which those that are not the target's own are in dispute."""
    num = len(own)
    return ReadAnswer(
        token_ids=np.ones(num, np.int32),
        own_ids=np.array(own, np.int32),
        logprobs=np.zeros(num, np.float32),
        ends=np.arange(1, num + 1, dtype=np.int32),
        hidden=np.array(hidden, np.float16)[:, None],
    )


HEAD = JudgeHead(model="t", model_sha256=SHA, weight=np.ones(1), bias=0.0, threshold=0.5)


def test_no_labelled_token_is_nothing_to_train_on():
    assert judged_tokens([]) is None
    assert judged_tokens([(answer(), read([1, 0], [1, 1]))]) is None


def test_only_tokens_with_a_label_are_kept_and_questions_stay_together():
    kept = judged_tokens(
        [
            (answer(right=True), read([1, 0], [1, 2])),
            (answer(error_at=1, found_by="final"), read([1, 0], [3, 4])),
            (answer(right=True, id="other"), read([0], [5])),
        ]
    )
    assert kept.hidden[:, 0].tolist() == [1, 2, 4, 5]
    assert kept.right.tolist() == [True, True, False, True]
    assert kept.disputed.tolist() == [False, True, True, True]
    assert kept.question.tolist() == [0, 0, 0, 1]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 8))
def test_rounds_are_those_of_a_replay_token_by_token(stands, draft_tokens):
    rounds = drafted = 0
    fresh = True
    for token_stands in stands:
        rounds += fresh
        drafted = 0 if fresh else drafted
        fresh = drafted == draft_tokens or not token_stands  # this one is the target's own
        drafted += 1
    assert num_rounds(np.array(stands, bool), draft_tokens) == rounds


def test_a_head_is_measured_on_disputed_tokens_and_along_the_drafts():
    quality = evaluate(
        HEAD,
        [
            # Right: six tokens, two in dispute, of which the judge accepts one.
            (answer(right=True), read([1, 0, 1, 1, 0, 1], [0, 1, 0, 0, -1, 0])),
            # Wrong from the fourth on: one accepted, one refused.
            (answer(error_at=3, found_by="hand"), read([1, 1, 1, 0, 0, 1], [0, 0, 0, 1, -1, 0])),
            # The target's own answer tells nothing of drafts.
            (answer(right=True, model="t"), read([1, 1], [0, 0])),
        ],
        target="t",
        draft_tokens=4,
    )
    assert (quality.num_questions, quality.num_answers) == (1, 3)
    assert quality.precision.value == pytest.approx(1 / 2)
    assert quality.recall.value == pytest.approx(1 / 2)
    assert quality.false_accepts.value == pytest.approx(1 / 2)
    assert quality.errors_stopped.value == quality.errors_stopped_lossless.value == 1.0
    assert quality.acceptance_length.value == pytest.approx(9 / 3)
    assert quality.acceptance_length_lossless.value == pytest.approx(9 / 4)
    assert quality.gain.value == pytest.approx(4 / 3)


def test_what_was_never_counted_is_no_number():
    quality = evaluate(HEAD, [(answer(right=True), read([1], [0]))], target="t", draft_tokens=4)
    assert math.isnan(quality.false_accepts.value)
    assert math.isnan(quality.errors_stopped.low)
