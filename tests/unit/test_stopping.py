"""When a draft stops, and what confidence is worth."""

from __future__ import annotations

import random
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.stopping import AcceptanceEstimate, AnyOf, Following, Never, SurvivalBelow, TopProbBelow

probs = st.floats(0.0, 1.0)
verdicts = st.lists(st.tuples(st.none() | probs, st.booleans()), max_size=200)


@pytest.mark.parametrize(
    ("rule", "run", "top_prob", "ends"),
    [
        pytest.param(Never(), [0.0], 0.0, False, id="without a rule nothing is doubted"),
        pytest.param(TopProbBelow(0.5), [0.1], 0.5, False, id="a likeliest token at the threshold is kept"),
        pytest.param(TopProbBelow(0.5), [0.4], 0.49, True, id="a likeliest token below it is not drafted"),
        pytest.param(TopProbBelow(0.0), [0.0], 0.0, False, id="a threshold of 0 never ends a draft"),
        pytest.param(TopProbBelow(1.0), [None], None, False, id="a copy, which has no probability, is kept"),
        pytest.param(AnyOf(()), [0.1], 0.1, False, id="no rules end nothing"),
        pytest.param(
            AnyOf((Never(), TopProbBelow(0.5))), [0.1], 0.1, True, id="of several rules any one is enough"
        ),
        pytest.param(
            SurvivalBelow(0.8, AcceptanceEstimate()), [0.95], 0.95, False, id="one sure token survives"
        ),
        pytest.param(
            SurvivalBelow(0.8, AcceptanceEstimate()), [0.95] * 5, 0.95, True, id="a run of five hardly does"
        ),
        pytest.param(
            Following((0.95,) * 4, SurvivalBelow(0.8, AcceptanceEstimate())),
            [0.95],
            0.95,
            True,
            id="what is drafted already counts",
        ),
    ],
)
def test_a_draft_ends(rule, run, top_prob, ends):
    assert rule.ends_before(run, top_prob) is ends


@pytest.mark.parametrize("threshold", [-0.1, 1.1, nan])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        TopProbBelow(threshold)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        SurvivalBelow(threshold, AcceptanceEstimate())


@pytest.mark.parametrize("prob", [-0.1, 1.5, nan])
def test_a_confidence_is_a_probability(prob):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        AcceptanceEstimate().of(prob)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        AcceptanceEstimate().updated([(prob, True)])


@given(verdicts, probs, probs)
def test_acceptance_never_falls_as_confidence_rises_whatever_was_seen(seen, a, b):
    estimate = AcceptanceEstimate().updated(seen)
    low, high = sorted((a, b))
    assert 0.0 < estimate.of(low) <= estimate.of(high) < 1.0
    assert 0.0 < estimate.of(None) < 1.0


@given(verdicts, verdicts)
def test_it_does_not_matter_how_verdicts_are_bundled(first, second):
    one_by_one = AcceptanceEstimate()
    for verdict in [*first, *second]:
        one_by_one = one_by_one.updated([verdict])
    assert one_by_one == AcceptanceEstimate().updated([*first, *second])


@given(verdicts, probs)
def test_an_acceptance_never_lowers_the_estimate_and_a_rejection_never_raises_it(seen, prob):
    before = AcceptanceEstimate().updated(seen)
    assert before.updated([(prob, True)]).of(prob) >= before.of(prob) - 1e-12
    assert before.updated([(prob, False)]).of(prob) <= before.of(prob) + 1e-12


@pytest.mark.parametrize("truth", [lambda p: p * p, lambda p: 0.3 + 0.6 * p, lambda p: 0.7])
def test_the_estimate_finds_the_rate_behind_the_verdicts(truth):
    rng = random.Random(1)
    seen = [(p := rng.random(), rng.random() < truth(p)) for _ in range(20_000)]
    estimate = AcceptanceEstimate().updated(seen)
    for i in range(10):
        middle = (i + 0.5) / 10
        assert estimate.of(middle) == pytest.approx(truth(middle), abs=0.04)


def test_copies_have_a_rate_of_their_own():
    estimate = AcceptanceEstimate().updated([(None, False)] * 50)
    assert estimate.of(None) < 0.05
    assert estimate.of(0.9) == AcceptanceEstimate().of(0.9)
