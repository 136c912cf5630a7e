"""How much of a draft stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policies import num_accepted


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        pytest.param([5, 6], [5, 6, 7], 2, id="a draft the target agrees with stands whole"),
        pytest.param([5, 6], [5, 6], 2, id="a target without a bonus token is enough"),
        pytest.param([5, 6, 7], [9, 6, 7, 8], 0, id="a wrong first token leaves nothing"),
        pytest.param([5, 6, 7], [5, 9, 7, 8], 1, id="agreement behind a wrong token does not count"),
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
