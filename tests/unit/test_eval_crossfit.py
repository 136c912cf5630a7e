"""Cross-fitting: what the blends learn, that no fit sees the fold it scores, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import astuple

import numpy as np
import pytest

from edge_agent.evaluation import crossfit, metrics
from edge_agent.evaluation.crossfit import (
    SINGLE,
    crossfit_gain,
    crossfit_length,
    crossfit_probability,
    feature_names,
    feature_table,
    folds,
    outcomes,
    single_choices,
    sweep,
)
from shared.errors import InvalidRequest, InvalidSetting


def informed(num=400, seed=0):
    """Labels that follow the first of three features; the second is noise, the third often missing noise."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(num, 3))
    labels = rng.random(num) < 1 / (1 + np.exp(-2 * table[:, 0]))
    table[rng.random(num) < 0.3, 2] = np.nan
    return table, labels


def routing_rows(num=400, seed=0, losses=True):
    """Questions whose feature "who" is how likely the edge is wrong; the cloud is right in four of five."""
    rng = np.random.default_rng(seed)
    who = rng.random(num)
    edge = rng.random(num) > who
    cloud = rng.random(num) < 0.8 if losses else np.ones(num, bool)
    return [
        {
            "features": {"who": float(w), "noise": float(rng.normal()), "same": 1.0},
            "prompt_tokens": int(rng.integers(20, 200)),
            "edge": {"correct": bool(e)},
            "cloud": {"correct": bool(c)},
            "labels": {},
        }
        for w, e, c in zip(who, edge, cloud, strict=True)
    ]


@pytest.fixture
def one_strength(monkeypatch):
    """A fraction of the fits, for tests that are not about how strongly a fit is held back."""
    monkeypatch.setattr(crossfit, "_STRENGTHS", (0.1,))


@pytest.mark.parametrize("method", ["logistic", "single", "boosting"])
def test_a_blend_finds_the_feature_that_counts(method):
    table, labels = informed()
    p = crossfit_probability(table, labels, method=method)
    best = metrics.auroc(table[:, 0], labels)
    assert best - 0.06 < metrics.auroc(p, labels) <= best + 0.01
    assert metrics.brier_skill(p, labels) > 0.2


def test_the_logistic_blend_is_calibrated():
    table, labels = informed(1000)
    p = crossfit_probability(table, labels)
    assert metrics.ece(p, labels) < metrics.ece_ceiling(p)


@pytest.mark.parametrize("method", ["logistic", "single", "boosting"])
def test_noise_teaches_nothing_out_of_fold(method):
    rng = np.random.default_rng(1)
    table, labels = rng.normal(size=(400, 20)), rng.random(400) < 0.5
    assert abs(metrics.auroc(crossfit_probability(table, labels, method=method), labels) - 0.5) < 0.1


def test_one_number_is_chosen_by_how_well_it_tells_either_way_up():
    table, labels = informed()
    assert single_choices(-table, labels).tolist() == [0] * 5
    upside_down, upright = (crossfit_probability(x, labels, method="single") for x in (-table, table))
    assert upside_down == pytest.approx(upright)


def test_a_fit_never_sees_the_fold_it_scores():
    table, labels = informed(100)
    table = table[:, :1]
    fold = folds(labels, 100)
    first, *others = np.flatnonzero(fold == 0)
    changed = table.copy()
    changed[first] = 50.0
    before, after = (crossfit_probability(x, labels, method="platt") for x in (table, changed))
    assert after[others] == pytest.approx(before[others])
    assert np.all(np.abs(after - before)[fold != 0] > 1e-6)


def test_folds_are_even_in_labels_and_keep_groups_whole():
    labels = np.arange(100) % 4 == 0
    fold = folds(labels, 100)
    assert [int(labels[fold == number].sum()) for number in range(5)] == [5] * 5
    groups = [f"question {i // 2}" for i in range(100)]
    for grouped in (folds(labels, 100, groups=groups), folds(None, 100, groups=groups)):
        assert (grouped[::2] == grouped[1::2]).all()
        assert len(set(grouped)) == 5


@pytest.mark.usefixtures("one_strength")
def test_the_same_seed_gives_the_same_scores():
    table, labels = informed(100)
    assert (crossfit_probability(table, labels) == crossfit_probability(table, labels)).all()


def test_platt_keeps_the_order_of_its_feature_within_a_fold():
    table, labels = informed()
    p = crossfit_probability(table[:, :1], labels, method="platt")
    held_out = folds(labels, len(labels)) == 2
    assert (np.argsort(p[held_out]) == np.argsort(table[held_out, 0])).all()


@pytest.mark.parametrize(
    ("fit", "error"),
    [
        pytest.param(
            lambda: crossfit_probability(np.zeros((20, 1)), np.arange(20) % 2 == 0),
            InvalidRequest,
            id="too few questions",
        ),
        pytest.param(
            lambda: crossfit_probability(np.zeros((100, 1)), np.arange(100) < 3),
            InvalidRequest,
            id="too few of one kind",
        ),
        pytest.param(
            lambda: crossfit_probability(np.zeros((100, 2)), np.arange(100) < 50, method="platt"),
            ValueError,
            id="platt with two features",
        ),
        pytest.param(
            lambda: crossfit_length(np.zeros((100, 1)), np.ones(100), fit_on=np.arange(100) < 9),
            InvalidRequest,
            id="too few lengths",
        ),
        pytest.param(
            lambda: sweep(routing_rows(60), {"x": ["absent"]}), InvalidRequest, id="no such feature"
        ),
        pytest.param(
            lambda: sweep([row | {"cloud": None} for row in routing_rows(60)], {"who": ["who"]}),
            InvalidRequest,
            id="a sweep without a cloud",
        ),
    ],
)
def test_what_teaches_nothing_is_refused(fit, error):
    with pytest.raises(error):
        fit()


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidSetting, match=r"pip install 'duet-llm\[route\]'"):
        crossfit_probability(*informed(100))


# --- length ---


def lengths(num=200, seed=0):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(num, 2))
    return table, np.round(np.exp(4 + 0.6 * table[:, 0] + 0.2 * rng.normal(size=num)))


@pytest.mark.parametrize("options", [{}, {"scale": "raw"}, {"boosting": True}], ids=str)
def test_a_length_regression_beats_the_best_constant(options):
    table, tokens = lengths()
    constant = metrics.length_figures(np.full(len(tokens), metrics.best_constant(tokens)), tokens).error
    assert metrics.length_figures(crossfit_length(table, tokens, **options), tokens).error < 0.6 * constant


def test_lengths_that_are_not_fitted_on_are_predicted_but_teach_nothing():
    table, tokens = lengths()
    whole = np.arange(len(tokens)) % 4 > 0
    predicted, other = (
        crossfit_length(table, np.where(whole, tokens, cut), fit_on=whole) for cut in (9000, 1)
    )
    assert (predicted == other).all()
    assert predicted.max() <= tokens[whole].max()
    assert np.abs(predicted - tokens)[~whole].mean() < 20


# --- rows ---


def test_a_missing_feature_is_nan_and_a_constant_one_is_left_out():
    rows = [{"features": {"a": 1.0, "b": 2.0}}, {"features": {"a": 1.0}}]
    assert feature_names(rows) == ["b"]
    np.testing.assert_array_equal(feature_table(rows, ["a", "b"]), [[1.0, 2.0], [1.0, np.nan]])


def test_outcomes_come_from_the_answers_or_from_the_labels():
    def row(edge, cloud, labels):
        return {"edge": edge, "cloud": cloud, "labels": labels}

    right, wrong, ungraded = {"correct": True}, {"correct": False}, {"correct": None}
    weak_only = {"routellm_weak": True, "routellm_strong": False}
    rows = [row(right, wrong, weak_only), row(wrong, None, {}), row(ungraded, right, {}), row(None, None, {})]
    use, edge, cloud = outcomes(rows, "own")
    assert (use, edge.tolist(), cloud.tolist()) == (rows[:1], [True], [False])
    use, edge, cloud = outcomes(rows[1:], "own")
    assert (use, edge.tolist(), cloud) == (rows[1:2], [False], None)
    use, edge, cloud = outcomes(rows, "routellm")
    assert (use, edge.tolist(), cloud.tolist()) == (rows[:1], [True], [False])


@pytest.mark.usefixtures("one_strength")
def test_a_sweep_tells_a_good_set_of_features_from_an_empty_one():
    rows = routing_rows(300)
    good, noise = sweep(rows, {"good": ["who"], "noise": ["noise"]}, draws=50)
    assert (good.name, good.num_features, good.num_questions) == ("good", 1, 300)
    assert good.apgr.low > noise.apgr.high
    assert good.over_length.excludes_zero
    assert not noise.over_length.excludes_zero
    assert good.auroc_hard > 0.75
    assert good.ece < good.ece_ceiling
    assert good.gain_apgr > good.apgr.low
    assert all(not math.isnan(x) for x in astuple(good) if isinstance(x, float))


@pytest.mark.usefixtures("one_strength")
def test_a_sweep_takes_one_number_of_the_set_that_asks_for_it():
    rows = routing_rows(100, losses=False)
    (found,) = sweep(rows, {SINGLE: ["noise", "who"]}, draws=10)
    use, edge, cloud = outcomes(rows, "own")
    one = crossfit_probability(feature_table(use, ["noise", "who"]), ~edge & cloud, method="single")
    assert found.apgr.value == metrics.apgr(one, edge, cloud)


@pytest.mark.usefixtures("one_strength")
def test_a_cloud_that_is_never_wrong_has_no_gain_model():
    (found,) = sweep(routing_rows(100, losses=False), {"who": ["who"]}, draws=20)
    assert math.isnan(found.gain_apgr)


@pytest.mark.usefixtures("one_strength")
def test_the_gain_is_of_questions_that_only_one_of_the_two_gets_right():
    rng = np.random.default_rng(0)
    who, whom = rng.random(600) < 0.5, rng.random(600) < 0.5
    edge, cloud = ~who, ~whom
    table = np.stack([who, whom], axis=1).astype(float)
    gain = crossfit_gain(table, edge, cloud)
    assert gain[who & ~whom].min() > gain[who == whom].max() - 0.2
    assert gain[~who & whom].max() < -0.5
