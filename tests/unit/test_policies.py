"""How much of a draft stands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policies import first_rollback, num_accepted, num_judged, num_tolerated


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        pytest.param([5, 6], [5, 6, 7], 2, id="a draft the target agrees with stands whole"),
        pytest.param([5, 6], [5, 6], 2, id="a target without a bonus token is enough"),
        pytest.param([5, 6, 7], [9, 6, 7, 8], 0, id="a wrong first token leaves nothing"),
        pytest.param([5, 6, 7], [5, 9, 7, 8], 1, id="agreement behind a wrong token does not count"),
        pytest.param([5, 6, 7], [5, 9], 1, id="a target may end with its correction"),
        pytest.param([], [5], 0, id="an empty draft has nothing to accept"),
        pytest.param([], [], 0, id="nothing drafted and nothing wanted"),
    ],
)
def test_draft_tokens_stand_up_to_the_first_that_is_not_the_targets(draft, target, accepted):
    assert num_accepted(draft, target) == accepted


def test_a_draft_that_was_not_scored_whole_is_refused():
    with pytest.raises(ValueError, match="2 draft tokens but 1 target tokens"):
        num_accepted([5, 6], [5])


tokens = st.lists(st.integers(0, 2), max_size=6)


@given(tokens, st.data())
def test_what_stands_is_the_longest_common_prefix(draft, data):
    target = data.draw(st.lists(st.integers(0, 2), min_size=len(draft), max_size=7))
    accepted = num_accepted(draft, target)
    assert draft[:accepted] == target[:accepted]
    assert accepted == len(draft) or draft[accepted] != target[accepted]


# Policy bild


@pytest.mark.parametrize(
    ("logprobs", "rolled_back_at"),
    [
        pytest.param([-0.1, -0.2], None, id="a draft the target agrees with is kept whole"),
        pytest.param([-0.1, -5.0], None, id="a distance equal to the threshold is kept"),
        pytest.param([-0.1, -7.0, -9.0], 1, id="the earliest doubtful token wins over the worst"),
        pytest.param([-5.01, -0.1], 0, id="likely tokens behind a doubtful one do not save it"),
        pytest.param([-np.inf], 0, id="a token the target rules out always rolls back"),
        pytest.param([], None, id="an empty draft has nothing to roll back"),
    ],
)
def test_rollback_at_5_nats(logprobs, rolled_back_at):
    assert first_rollback(np.array(logprobs), threshold=5.0) == rolled_back_at


def test_without_a_threshold_only_what_the_target_rules_out_rolls_back():
    assert first_rollback(np.array([-1e300, -np.inf]), threshold=np.inf) == 1


@pytest.mark.parametrize(
    ("logprobs", "threshold", "message"),
    [
        pytest.param([np.nan, -1.0], 5.0, "must be <= 0", id="a NaN"),
        pytest.param([0.1], 5.0, "must be <= 0", id="a probability above one"),
        pytest.param([[-1.0]], 5.0, "expected", id="two dimensions"),
        pytest.param([-1.0], 0.0, "threshold", id="a threshold of zero"),
        pytest.param([-1.0], np.nan, "threshold", id="a threshold that is no number"),
    ],
)
def test_numbers_that_are_no_distances_are_refused(logprobs, threshold, message):
    with pytest.raises(ValueError, match=message):
        first_rollback(np.array(logprobs), threshold)


def test_an_unlikely_token_that_is_the_targets_own_stands():
    assert num_tolerated([5, 6], [5, 9], np.array([-9.0, -9.0]), threshold=3.0) == 1


@pytest.mark.parametrize(("target", "logprobs"), [([5], [-1.0, -1.0]), ([5, 6], [-1.0])])
def test_a_draft_that_was_not_judged_whole_is_refused(target, logprobs):
    with pytest.raises(ValueError, match="2 draft tokens but"):
        num_tolerated([5, 6], target, np.array(logprobs), threshold=3.0)


# Policy judge


@given(tokens, st.data())
def test_a_token_stands_where_it_is_the_targets_own_or_the_judge_accepts_it(draft, data):
    target = data.draw(st.lists(st.integers(0, 2), min_size=len(draft), max_size=7))
    acceptable = data.draw(st.lists(st.booleans(), min_size=len(draft), max_size=len(draft)))
    stands = [drafted == own or right for drafted, own, right in zip(draft, target, acceptable, strict=False)]
    count = num_judged(draft, target, acceptable)
    assert all(stands[:count])
    assert count == len(draft) or not stands[count]
    assert num_judged(draft, target, [False] * len(draft)) == num_accepted(draft, target) <= count
    assert num_judged(draft, target, [True] * len(draft)) == len(draft)


@pytest.mark.parametrize(("target", "acceptable"), [([5], [True, True]), ([5, 6], [True])])
def test_a_draft_of_which_tokens_were_not_judged_is_refused(target, acceptable):
    with pytest.raises(ValueError, match="2 draft tokens but"):
        num_judged([5, 6], target, acceptable)


@st.composite
def rounds(draw):
    """A draft, the target's own tokens and how likely it finds the draft's."""
    draft = draw(tokens)
    target = draw(st.lists(st.integers(0, 2), min_size=len(draft), max_size=7))
    logprobs = st.floats(-30, 0) | st.just(-np.inf)
    return draft, target, np.array(draw(st.lists(logprobs, min_size=len(draft), max_size=len(draft))))


thresholds = st.floats(0, 40, exclude_min=True)


@given(rounds(), thresholds, thresholds)
def test_a_larger_threshold_never_accepts_less_and_none_accepts_less_than_lossless(judged, first, second):
    small, large = sorted((first, second))
    counts = [num_tolerated(*judged, threshold) for threshold in (small, large, np.inf)]
    assert [num_accepted(*judged[:2]), *counts] == sorted([num_accepted(*judged[:2]), *counts])


@given(rounds())
def test_without_a_threshold_every_draft_that_the_target_thinks_possible_stands_whole(judged):
    draft, target, logprobs = judged
    assert num_tolerated(draft, target, np.maximum(logprobs, -1e9), np.inf) == len(draft)


@given(rounds(), thresholds)
def test_what_stands_is_likely_enough_or_the_targets_own(judged, threshold):
    draft, target, logprobs = judged
    count = num_tolerated(*judged, threshold)
    stands = [-logprobs[i] <= threshold or draft[i] == target[i] for i in range(len(draft))]
    assert all(stands[:count])
    assert count == len(draft) or not stands[count]


@given(rounds())
def test_next_to_no_threshold_accepts_only_certainties_and_the_targets_own(judged):
    draft, target, logprobs = judged
    count = num_tolerated(*judged, 1e-6)
    assert all(np.exp(logprobs[i]) > 1 - 1e-5 or draft[i] == target[i] for i in range(count))
