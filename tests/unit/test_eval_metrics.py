"""Every metric against cases worked out by hand, scikit-learn, and slow, obvious forms of itself."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from edge_agent.evaluation import metrics
from shared.bootstrap import bootstrap_interval, paired_bootstrap_difference
from shared.speed import break_even_rtt, expected_acceptance_length, stop_and_wait_tokens_per_s

# Five questions: only the cloud gets two of them right, both the third, none the fourth, the edge the fifth.
EDGE = [0, 0, 1, 0, 1]
CLOUD = [1, 1, 1, 0, 0]

outcomes = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=2, max_size=6)


def columns(rows):
    scores, edge, cloud = (np.array(column, float) for column in zip(*rows, strict=True))
    return scores, edge, cloud


# --- routing ---


def test_the_curve_starts_at_the_edge_and_ends_at_the_cloud():
    shares, accuracies = metrics.accuracy_curve([5, 4, 3, 2, 1], EDGE, CLOUD)
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert accuracies == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8, 0.6])


def test_the_gap_recovered_may_exceed_one_where_the_edge_knows_better():
    _, pgr = metrics.pgr_curve([5, 4, 3, 2, 1], EDGE, CLOUD)
    assert pgr == pytest.approx([0, 1, 2, 2, 2, 1])
    assert metrics.apgr([5, 4, 3, 2, 1], EDGE, CLOUD) == pytest.approx((1 + 2 + 2 + 2 + 0.5) / 5)


def test_the_oracle_is_the_best_of_all_orders():
    best = max(metrics.apgr(order, EDGE, CLOUD) for order in itertools.permutations(range(5)))
    assert metrics.apgr(metrics.oracle_scores(EDGE, CLOUD), EDGE, CLOUD) == pytest.approx(best)


def test_random_routing_recovers_half_and_calls_the_share_it_must():
    scores = metrics.random_scores(10)
    edge, cloud = [0] * 10, [1] * 10
    assert metrics.apgr(scores, edge, cloud) == pytest.approx(0.5)
    assert metrics.cpt(scores, edge, cloud, 0.5) == 0.5
    assert metrics.cpt(scores, edge, cloud, 0.8) == 0.8


@pytest.mark.parametrize(
    ("level", "share"),
    [
        pytest.param(0.0, 0.0, id="nothing to recover takes no call"),
        pytest.param(0.5, 0.2, id="the first question alone recovers the whole gap"),
        pytest.param(2.0, 0.4, id="two recover it twice"),
    ],
)
def test_cpt_is_the_least_share_that_reaches_the_level(level, share):
    assert metrics.cpt([5, 4, 3, 2, 1], EDGE, CLOUD, level) == pytest.approx(share)


@given(outcomes)
def test_ties_count_as_the_mean_over_all_their_orders(rows):
    scores, edge, cloud = columns(rows)
    curves = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            gains = (cloud - edge)[list(order)]
            curves.append((edge.sum() + np.concatenate([[0], np.cumsum(gains)])) / len(scores))
    assert metrics.accuracy_curve(scores, edge, cloud)[1] == pytest.approx(np.mean(curves, axis=0))


@given(outcomes)
def test_routing_metrics_depend_on_the_order_of_scores_only(rows):
    scores, edge, cloud = columns(rows)
    first = metrics.router_figures(scores, edge, cloud)
    second = metrics.router_figures(np.exp(scores / 2) - 7, edge, cloud)
    assert astuple(first) == pytest.approx(astuple(second), nan_ok=True)


@given(outcomes)
def test_the_figures_made_with_one_sort_are_those_of_each_metric(rows):
    scores, edge, cloud = columns(rows)
    assert astuple(metrics.router_figures(scores, edge, cloud)) == pytest.approx(
        (
            metrics.auroc(scores, 1 - edge),
            metrics.auroc(scores, (1 - edge) * cloud),
            metrics.apgr(scores, edge, cloud),
            metrics.cpt(scores, edge, cloud, 0.5),
            metrics.cpt(scores, edge, cloud, 0.8),
        ),
        nan_ok=True,
    )


@given(outcomes)
def test_routing_upside_down_recovers_what_the_right_way_leaves(rows):
    scores, edge, cloud = columns(rows)
    total = metrics.apgr(scores, edge, cloud) + metrics.apgr(-scores, edge, cloud)
    assert total == pytest.approx(math.nan if edge.sum() == cloud.sum() else 1.0, nan_ok=True)


def test_without_a_gap_nothing_can_be_recovered():
    assert math.isnan(metrics.apgr([1, 2], [0, 1], [1, 0]))
    assert math.isnan(metrics.cpt([1, 2], [0, 1], [1, 0], 0.5))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=50))
def test_auroc_is_that_of_scikit_learn(rows):
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    if labels.all() or not labels.any():
        assert math.isnan(metrics.auroc(scores, labels))
    else:
        assert metrics.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_the_confusion_has_need_in_rows_and_route_in_columns():
    p, need = [0.1, 0.5, 0.6, 0.4, 0.9], [False, False, True, True, True]
    found = metrics.confusion(p, need, threshold=0.5)
    assert found.tolist() == [[1, 1], [1, 2]]
    assert found.tolist() == confusion_matrix(need, np.array(p) >= 0.5).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda: metrics.auroc([], []), id="no questions"),
        pytest.param(lambda: metrics.auroc([0.1, np.nan], [0, 1]), id="a score that is NaN"),
        pytest.param(lambda: metrics.apgr([1, 2, 3], [0, 1], [1, 1]), id="lengths that differ"),
        pytest.param(lambda: metrics.apgr([[1, 2]], [[0, 1]], [[1, 1]]), id="two dimensions"),
        pytest.param(lambda: metrics.ece([0.5, 1.2], [0, 1]), id="a probability above 1"),
        pytest.param(lambda: metrics.length_figures([1.0], [np.nan]), id="an unknown length"),
        pytest.param(lambda: bootstrap_interval(np.mean), id="nothing to draw from"),
    ],
)
def test_arrays_that_are_no_questions_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected|NaN|must"):
        bad()


# --- calibration ---


def test_ece_by_hand():
    # Bins (.2, .4] and (.8, 1.]: |1/2 - .3| and |1 - .9|, two questions each.
    assert metrics.ece([0.3, 0.3, 0.9, 0.9], [0, 1, 1, 1], num_bins=5) == pytest.approx((0.2 + 0.1) / 2)


def test_a_discrete_rating_has_a_bin_a_level():
    p, labels = [0.50, 0.50, 0.51, 0.51], [1, 1, 0, 0]
    assert metrics.ece(p, labels) == pytest.approx(0.005)
    assert metrics.ece(p, labels, num_bins=None) == pytest.approx((0.5 + 0.51) / 2)


@given(
    st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_reliability_and_brier_are_those_of_scikit_learn(rows, num_bins):
    p, labels = (np.array(column) for column in zip(*rows, strict=True))
    bins = metrics.reliability(p, labels, num_bins)
    filled = bins.counts > 0
    observed, predicted = calibration_curve(labels, p, n_bins=num_bins)
    assert bins.observed[filled] == pytest.approx(observed)
    assert bins.predicted[filled] == pytest.approx(predicted)
    weighted = np.abs(observed - predicted) @ bins.counts[filled] / len(p)
    assert metrics.ece(p, labels, num_bins) == pytest.approx(weighted)
    assert metrics.brier(p, labels) == pytest.approx(brier_score_loss(labels, p))


def test_a_perfect_predictor_stays_below_the_ceiling_19_times_in_20():
    rng = np.random.default_rng(3)
    p = rng.uniform(size=400)
    ceiling = metrics.ece_ceiling(p)
    below = np.mean([metrics.ece(p, rng.random(400) < p) <= ceiling for _ in range(1000)])
    assert 0.93 < below < 0.97


def test_certain_predictions_leave_no_room_below_the_ceiling():
    assert metrics.ece_ceiling([0.0, 1.0, 1.0]) == 0.0


@pytest.mark.parametrize(
    ("p", "skill"),
    [
        pytest.param([0.0, 0.0, 1.0, 1.0], 1.0, id="perfect"),
        pytest.param([0.5, 0.5, 0.5, 0.5], 0.0, id="the base rate"),
        pytest.param([1.0, 1.0, 0.0, 0.0], -3.0, id="upside down"),
    ],
)
def test_brier_skill_is_measured_from_the_base_rate(p, skill):
    assert metrics.brier_skill(p, [0, 0, 1, 1]) == pytest.approx(skill)


def test_skill_is_undefined_for_one_class():
    assert math.isnan(metrics.brier_skill([0.2, 0.3], [0, 0]))


# --- length ---


def test_length_errors_count_the_bound_in_and_leave_unparsed_ones_apart():
    found = metrics.length_figures([100, 150, 300, np.nan], [100, 200, 199, 10])
    assert found.parse_failures == 0.25
    assert found.error == pytest.approx((0 + 50 + 101) / 3)
    assert (found.within_50, found.within_100) == pytest.approx((2 / 3, 2 / 3))


def test_predictions_that_were_never_understood_have_no_error():
    found = metrics.length_figures([np.nan, np.nan], [1, 2])
    assert found.parse_failures == 1.0
    assert math.isnan(found.error)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.sampled_from([0, 10, 50, 100]))
def test_no_constant_beats_the_best_one(lengths, tokens):
    actual = np.array(lengths, float)
    candidates = np.arange(-100, 401)[:, None]
    errors = np.abs(candidates - actual).mean(axis=1)
    assert np.abs(metrics.best_constant(actual) - actual).mean() == pytest.approx(errors.min())
    constant, share = metrics.best_constant_within(actual, tokens)
    assert share == pytest.approx(np.mean(np.abs(candidates - actual) <= tokens, axis=1).max())
    assert share == pytest.approx(np.mean(np.abs(constant - actual) <= tokens))


# --- speculation ---


def test_acceptance_by_hand():
    # Drafts of 4: all accepted, one accepted, none accepted.
    assert metrics.acceptance_length(committed=[5, 2, 1], rounds=[1, 1, 1]) == pytest.approx(8 / 3)
    assert metrics.draft_acceptance_rate(accepted=5, drafted=12) == pytest.approx(5 / 12)
    assert metrics.alpha_hat(accepted=5, rejections=2) == pytest.approx(5 / 7)
    assert math.isnan(metrics.acceptance_length(0, 0))
    assert math.isnan(metrics.draft_acceptance_rate(0, 0))
    assert math.isnan(metrics.alpha_hat(0, 0))


def test_alpha_hat_finds_the_rate_that_rounds_were_drawn_with():
    rng = np.random.default_rng(0)
    accepted = np.minimum(rng.geometric(1 - 0.7, size=20_000) - 1, 8)
    assert metrics.alpha_hat(accepted, int(np.sum(accepted < 8))) == pytest.approx(0.7, abs=0.01)
    assert metrics.acceptance_length(accepted + 1, np.ones(20_000)) == pytest.approx(
        expected_acceptance_length(0.7, 8), abs=0.05
    )


def test_the_walltime_factor_is_leviathans():
    alpha, gamma, c = 0.8, 5, 0.1
    assert metrics.walltime_factor(alpha, gamma, c) == pytest.approx(
        (1 - alpha ** (gamma + 1)) / ((1 - alpha) * (gamma * c + 1))
    )
    assert metrics.walltime_factor(1.0, 4, 0.0) == 5.0


def test_speculation_over_a_link_breaks_even_at_the_break_even_round_trip():
    rtt = metrics.stop_and_wait_break_even_rtt(3.0, 4, t_draft=0.01, t_verify=0.05)
    assert rtt == pytest.approx(0.06)
    assert metrics.stop_and_wait_speedup(3.0, 4, 0.01, 0.05, rtt) == pytest.approx(1.0)
    assert metrics.stop_and_wait_speedup(3.0, 4, 0.01, 0.05, rtt + 0.01) < 1.0


def test_a_measured_acceptance_length_gives_what_the_assumed_rate_gives():
    tau = expected_acceptance_length(0.6, 4)
    assert metrics.stop_and_wait_break_even_rtt(tau, 4, 0.01, 0.05) == pytest.approx(
        break_even_rtt(0.6, 4, 0.01, 0.05, 0.05)
    )
    assert metrics.stop_and_wait_speedup(tau, 4, 0.01, 0.05, 0.03) == pytest.approx(
        stop_and_wait_tokens_per_s(0.6, 4, 0.01, 0.05, 0.03) * 0.05
    )


# --- bootstrap ---


def test_the_interval_of_a_mean_is_that_of_theory():
    sample = np.random.default_rng(1).normal(10, 2, size=400)
    found = bootstrap_interval(np.mean, sample)
    half = 1.96 * sample.std() / 20
    assert found.value == sample.mean()
    assert (found.low, found.high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)
    assert bootstrap_interval(np.mean, sample) == found


def test_a_paired_difference_is_narrower_than_what_is_common_to_both():
    rng = np.random.default_rng(2)
    common = rng.normal(0, 10, size=300)
    found = paired_bootstrap_difference(np.mean, common + 1, common)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.excludes_zero
    assert not bootstrap_interval(np.mean, common).excludes_zero


def test_draws_in_which_nothing_is_defined_are_left_out_and_counted():
    scores, labels = np.arange(5), np.array([0, 0, 0, 0, 1])
    found = bootstrap_interval(metrics.auroc, scores, labels)
    # Without the one positive: (4/5)^5; with nothing else: (1/5)^5.
    assert found.num_undefined == pytest.approx(1000 * (0.8**5 + 0.2**5), abs=50)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert math.isnan(bootstrap_interval(metrics.auroc, scores, np.zeros(5)).low)


def test_a_thousand_draws_over_two_thousand_questions_take_moments():
    rng = np.random.default_rng(0)
    scores, edge, cloud = rng.normal(size=2000), rng.random(2000) < 0.5, rng.random(2000) < 0.7
    began = time.process_time()
    bootstrap_interval(metrics.apgr, scores, edge, cloud)
    assert time.process_time() - began < 3.0
