"""Who answers: the router's rules as a table, and when a running answer is doubted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from shared.routing import WATCH_TOKENS, DoubtWatch, Limits, Link, Route, decide

FAST = Link(up=True, rtt_s=0.02)
SLOW = Link(up=True, rtt_s=0.4)
DOWN = Link(up=False, detail="nobody listens")
LIMITS = Limits(threshold=0.5, slow_rtt_s=0.15)
PAID = replace(LIMITS, price_per_1k_tokens=10.0, max_price=0.5)
BEGUN = replace(PAID, guidance_tokens=50)
SECRET = "it holds a card number"


def decided(p_cloud, *, tokens=100, link=FAST, private=None, fits_edge=True, can_draft=True, limits=LIMITS):
    return decide(
        p_cloud=p_cloud,
        predicted_tokens=tokens,
        link=link,
        private=private,
        fits_edge=fits_edge,
        can_draft=can_draft,
        limits=limits,
    )


@pytest.mark.parametrize(
    ("p_cloud", "circumstances", "route", "because"),
    [
        pytest.param(0.2, {}, "local", "below the threshold 0.50", id="easy: the edge"),
        pytest.param(0.9, {}, "speculate", "probability 0.90", id="hard: the target, by speculation"),
        pytest.param(0.5, {}, "speculate", "at or above", id="at the threshold: the target"),
        pytest.param(0.9, {"link": SLOW}, "cloud", "400 ms", id="hard on a slow link: the cloud's stream"),
        pytest.param(0.2, {"link": SLOW}, "local", "below", id="easy on a slow link: the edge"),
        pytest.param(0.9, {"tokens": 3}, "cloud", "too few", id="hard and short: nothing to speculate on"),
        pytest.param(0.9, {"can_draft": False}, "cloud", "roll back", id="hard and no drafts: the stream"),
        pytest.param(0.2, {"can_draft": False}, "local", "below", id="easy and no drafts: the edge"),
        pytest.param(0.9, {"link": DOWN}, "local", "nobody listens", id="no link: the edge, however hard"),
        pytest.param(0.9, {"private": SECRET}, "local", SECRET, id="private: the edge, however hard"),
        pytest.param(
            0.9, {"private": SECRET, "fits_edge": False}, "local", SECRET, id="private and too long: here"
        ),
        pytest.param(
            1.0, {"private": SECRET, "limits": replace(LIMITS, threshold=0.0)}, "local", SECRET,
            id="private beats a threshold that sends everything",
        ),
        pytest.param(0.1, {"fits_edge": False}, "cloud", "context", id="too long for the edge: the cloud"),
        pytest.param(0.9, {"fits_edge": False, "link": DOWN}, "local", "no cloud", id="too long and no link"),
        pytest.param(0.9, {"limits": PAID}, "local", "budget of 0.5", id="over the budget: the edge"),
        pytest.param(0.9, {"limits": PAID, "tokens": 50}, "speculate", "", id="at the budget: the target"),
        pytest.param(0.9, {"limits": BEGUN}, "guide", "begins with 50 tokens, for 0.5", id="begun for less"),
        pytest.param(0.2, {"limits": BEGUN}, "local", "budget of 0.5", id="easy and over the budget"),
        pytest.param(0.9, {"limits": BEGUN, "tokens": 50}, "speculate", "", id="all of it for the budget"),
        pytest.param(
            0.9, {"limits": replace(BEGUN, guidance_tokens=51)}, "local", "budget", id="no money to begin"
        ),
        pytest.param(0.9, {"limits": BEGUN, "private": SECRET}, "local", SECRET, id="private: no guidance"),
        pytest.param(0.9, {"limits": BEGUN, "link": DOWN}, "local", "no cloud", id="no link: no guidance"),
        pytest.param(0.9, {"limits": BEGUN, "can_draft": False}, "guide", "", id="guidance needs no drafts"),
        pytest.param(
            0.9, {"limits": replace(PAID, max_price=None)}, "speculate", "", id="a price without a budget"
        ),
        pytest.param(0.0, {"limits": replace(LIMITS, threshold=0.0)}, "speculate", "", id="threshold 0"),
        pytest.param(0.99, {"limits": replace(LIMITS, threshold=1.0)}, "local", "", id="threshold 1: hardly"),
    ],
)  # fmt: skip
def test_the_route_and_its_reason(p_cloud, circumstances, route, because):
    decision = decided(p_cloud, **circumstances)
    assert decision.route is Route(route)
    assert because in "; ".join(decision.reasons)
    assert decision.p_cloud == p_cloud


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match="threshold"):
        replace(LIMITS, threshold=threshold)
    with pytest.raises(ValueError, match="threshold"):
        DoubtWatch(threshold)


def doubts(probs, threshold=0.5):
    """After how many tokens doubt comes; None for never."""
    watch = DoubtWatch(threshold)
    return next((i for i, p in enumerate(probs, start=1) if watch.doubts(math.log(p))), None)


@pytest.mark.parametrize(
    ("probs", "after"),
    [
        pytest.param([0.9] * 40, None, id="a sure answer is never doubted"),
        pytest.param([0.1] * 40, WATCH_TOKENS, id="doubt waits for a whole window"),
        pytest.param([0.9] * 20 + [0.1] * 20, 23, id="a sure beginning does not hide a doubtful end"),
        pytest.param([0.01] + [0.95] * 40, None, id="one surprise alone is no doubt"),
    ],
)
def test_late_evidence_is_the_mean_of_a_window(probs, after):
    assert doubts(probs) == after


def test_a_threshold_of_0_never_doubts():
    assert doubts([1e-9] * 40, threshold=0.0) is None


def test_an_answer_shorter_than_the_window_is_judged_at_its_end():
    watch = DoubtWatch(0.5)
    assert not watch.doubts_at_end()
    assert not watch.doubts(math.log(0.1))
    assert watch.doubts_at_end()
