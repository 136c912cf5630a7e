"""A prior taken from the questions themselves."""

from __future__ import annotations

import pytest

from edge_agent.evaluation.priors import with_prior_of_questions


def row(**distribution: float) -> dict:
    return {"features": {"letters": 0.0, "who": 0.4}, "distributions": {"letters": distribution}}


def test_what_a_model_always_says_counts_for_nothing() -> None:
    # It likes A throughout; what differs is B or C.
    rows = [row(A=0.6, B=0.3, C=0.1), row(A=0.6, B=0.1, C=0.3)]
    centred = with_prior_of_questions(rows, ["letters"])
    best = [max(r["distributions"]["letters"], key=r["distributions"]["letters"].get) for r in centred]
    assert best == ["B", "C"]


def test_features_follow_and_others_stay() -> None:
    [same, _] = with_prior_of_questions([row(A=0.6, B=0.4), row(A=0.6, B=0.4)], ["letters"])
    assert same["distributions"]["letters"] == pytest.approx({"A": 0.5, "B": 0.5})
    assert same["features"]["letters"] == pytest.approx(0.5)
    assert same["features"]["letters.margin"] == pytest.approx(0.0, abs=1e-9)
    assert same["features"]["who"] == 0.4


def test_questions_of_other_numbers_of_options_have_a_prior_of_their_own() -> None:
    rows = [row(A=0.9, B=0.1), row(A=0.2, B=0.3, C=0.5), row(A=0.9, B=0.1)]
    two, three, _ = with_prior_of_questions(rows, ["letters"])
    assert two["distributions"]["letters"] == pytest.approx({"A": 0.5, "B": 0.5})
    assert three["distributions"]["letters"] == pytest.approx({"A": 1 / 3, "B": 1 / 3, "C": 1 / 3})


def test_a_probability_rounded_to_nothing_does_no_harm_and_rows_are_left_as_they_were() -> None:
    rows = [row(A=1.0, B=0.0), row(A=0.5, B=0.5)]
    assert sum(
        with_prior_of_questions(rows, ["letters"])[0]["distributions"]["letters"].values()
    ) == pytest.approx(1)
    assert rows[0]["distributions"]["letters"] == {"A": 1.0, "B": 0.0}
