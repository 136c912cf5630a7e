"""Rows in, headline numbers out: hand-made runs of each experiment."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edge_agent.evaluation import crossfit, metrics
from edge_agent.evaluation.summary import (
    as_json,
    summarise_length,
    summarise_routing,
    summarise_speculation,
    verdict,
)
from shared.bootstrap import Estimate, bootstrap_interval

DRAWS = 100


@pytest.fixture(scope="module", autouse=True)
def one_strength():
    """A fraction of the fits: these tests are not about how strongly a fit is held back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossfit, "_STRENGTHS", (0.1,))
        patch.setattr(crossfit, "_PENALTIES", (0.01,))
        yield


def routing_rows(num=120, seed=0):
    """The edge gets the first half of the subjects right more often; "who" is a good score, "upside" the same
    upside down; a written probe is understood on every fourth question."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        difficulty = rng.random()
        rows.append(
            {
                "id": f"q/{i}",
                "group": "easy" if difficulty < 0.5 else "difficult",
                "prompt_tokens": int(rng.integers(20, 200)),
                "features": {"who": difficulty, "upside": -difficulty, "prompt_tokens.log": float(i)},
                "values": {"who": difficulty, "ten-times": difficulty if i % 4 == 0 else None},
                "texts": {"ten-times": "..."},
                "edge": {"correct": bool(rng.random() > difficulty)},
                "cloud": {"correct": bool(rng.random() < 0.9)},
                "labels": {"routellm_weak": i % 3 > 0, "routellm_strong": i % 7 > 0},
            }
        )
    return rows


@pytest.fixture(scope="module")
def own_and_labels():
    return summarise_routing(routing_rows(), draws=DRAWS)


def test_there_is_a_summary_for_each_pair_of_labels(own_and_labels):
    own, labels = own_and_labels
    assert (own.pair, labels.pair) == ("own", "routellm")
    assert labels.edge.value == pytest.approx(80 / 120)
    assert labels.cloud.value == pytest.approx(102 / 120)
    assert labels.edge.low < labels.edge.value < labels.edge.high
    assert [s.pair for s in summarise_routing([{**r, "labels": {}} for r in routing_rows()], draws=5)] == [
        "own"
    ]
    assert summarise_routing([], draws=DRAWS) == []


def test_every_router_stands_as_it_is_beside_random_length_and_oracle(own_and_labels):
    own, _ = own_and_labels
    routers = {router.name: router for router in own.routers}
    assert {router.role for router in own.routers} == {
        *("blend", "boosting", "length", "probe", "random", "oracle")
    }
    assert "prompt_tokens.log" not in routers
    assert routers["who"].auroc_hard.value > 0.7
    assert routers["upside"].auroc_hard.value == pytest.approx(1 - routers["who"].auroc_hard.value)
    assert routers["random"].apgr.value == pytest.approx(0.5)
    assert routers["oracle"].apgr.value == max(router.apgr.value for router in own.routers)
    best = routers["oracle"].cpt50.value
    assert all(router.cpt50.value >= best for router in own.routers)
    who = np.array([row["features"]["who"] for row in routing_rows()])
    edge, cloud = (np.array([row[m]["correct"] for row in routing_rows()]) for m in ("edge", "cloud"))
    expected = bootstrap_interval(metrics.apgr, who, edge, cloud, draws=DRAWS)
    assert routers["who"].apgr == expected
    assert routers["value of ten-times"].num_missing == 90
    assert "value of who" not in routers  # a feature says the same already
    assert own.parse_failures == {"ten-times": 0.75}


def test_the_blend_is_compared_with_prompt_length_in_words(own_and_labels):
    own, labels = own_and_labels
    assert own.verdict == "better"
    assert "prompt length, APGR" in own.to_markdown()
    assert ": better." in own.to_markdown()
    assert labels.verdict == "unresolved"


def test_half_of_the_questions_go_and_mostly_those_of_the_difficult_subject(own_and_labels):
    own, _ = own_and_labels
    difficult, easy = own.groups
    assert (difficult.name, easy.name) == ("difficult", "easy")
    assert difficult.num_questions + easy.num_questions == 120
    assert difficult.sent > 0.7 > 0.3 > easy.sent
    assert own.confusion.sum() == 120
    assert own.confusion[:, 1].sum() == 60
    assert sum(len(p) for p in own.scores.values()) == 120


def test_without_a_cloud_what_remains_is_how_hard(own_and_labels):
    (alone,) = summarise_routing([{**r, "cloud": None, "labels": {}} for r in routing_rows()], draws=DRAWS)
    assert alone.cloud is alone.confusion is alone.verdict is None
    assert all(router.apgr is None and router.share is None for router in alone.routers)
    assert alone.reliability.brier_skill.value > 0
    assert any("no cloud was asked" in reason for reason in alone.missing)
    assert alone.routers[0].auroc_hard.value > 0.6


def test_a_run_too_small_to_fit_still_shows_its_probes():
    (own, _) = summarise_routing(routing_rows(20), draws=DRAWS)
    assert own.reliability is None
    assert any("too few to fit on" in reason for reason in own.missing)
    assert "who" in own.to_markdown()


def test_two_models_that_are_equally_good_leave_nothing_to_recover():
    rows = [{**row, "cloud": {"correct": row["edge"]["correct"]}, "labels": {}} for row in routing_rows(40)]
    (own,) = summarise_routing(rows, draws=DRAWS)
    assert all(router.apgr is None and router.gap is None for router in own.routers)
    assert any("equally good" in reason for reason in own.missing)


@pytest.mark.parametrize(
    ("low", "high", "smaller_is_better", "expected"),
    [
        pytest.param(0.01, 0.2, False, "better", id="above 0"),
        pytest.param(-0.2, -0.01, False, "worse", id="below 0"),
        pytest.param(-0.2, -0.01, True, "better", id="an error that falls"),
        pytest.param(-0.01, 0.2, False, "unresolved", id="an interval with 0 in it"),
    ],
)
def test_a_difference_is_called_by_its_interval(low, high, smaller_is_better, expected):
    assert verdict(Estimate((low + high) / 2, low, high), smaller_is_better=smaller_is_better) == expected


def length_rows(num_items=60, seed=0):
    """Lengths that follow "bins"; two samples at 0.7; the length prompt adds 10 tokens, 14 to the second."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_items):
        mean = float(rng.integers(40, 300))
        for prompt in ("plain", "words-first-line"):
            for temperature, sample in ((0.0, 0), (0.7, 0), (0.7, 1)):
                tokens = (
                    mean
                    + (14 if sample else 10) * (prompt != "plain")
                    + (5 if sample else -5) * (temperature > 0)
                )
                rows.append(
                    {
                        "id": f"q/{i}|{prompt}|{temperature}|{sample}",
                        "item": f"q/{i}",
                        "prompt": prompt,
                        "temperature": temperature,
                        "seed": sample,
                        "prompt_tokens": int(rng.integers(20, 200)),
                        "tokens": tokens,
                        "words": tokens / 2,
                        "censored": i == 0,
                        "correct": prompt == "plain" if i < 6 else True,
                        "predicted_words": (mean / 2 if i % 2 else None) if prompt != "plain" else None,
                        "features": {"bins": math.log(mean), "noise": float(rng.normal())},
                        "values": {"bins": mean + 20},
                    }
                )
    return rows


@pytest.fixture(scope="module")
def lengths():
    return summarise_length(length_rows(), draws=DRAWS)


def test_predictors_are_judged_on_answers_that_are_not_censored(lengths):
    found = {predictor.name: predictor for predictor in lengths.predictors}
    tokens = [r["tokens"] for r in length_rows() if r["prompt"] == "plain" and not r["censored"]]
    assert found["best constant"].error.value == pytest.approx(np.abs(tokens - np.median(tokens)).mean())
    assert found["best constant"].over_constant.value == pytest.approx(1)
    assert len(found["best constant"].actual) == 180
    # The probe is 20 too long; a third of the answers is as long as the mean, a third 5 more, a third 5 less.
    assert found["bins"].error.value == pytest.approx(20)
    assert found["bins"].within_50.value == 1
    assert found["blend"].error.value < 20
    assert lengths.verdict == "better"


def test_words_in_the_first_line_are_scaled_to_tokens_and_count_their_failures(lengths):
    found = {predictor.name: predictor for predictor in lengths.predictors}["words-first-line"]
    assert lengths.tokens_per_word.value == pytest.approx(2)
    assert found.parse_failures == pytest.approx(0.5)
    assert found.error.value == pytest.approx((10 + 5 + 19) / 3)


def test_words_in_the_first_line_are_judged_on_the_plain_answer_too(lengths):
    found = {predictor.name: predictor for predictor in lengths.predictors}
    own, plain = (found[f"words-first-line{what}"] for what in ("", ", of the plain answer"))
    assert plain.predicted.tolist() == own.predicted.tolist()
    assert plain.actual.tolist() != own.actual.tolist()
    assert plain.parse_failures == own.parse_failures


def test_the_length_prompt_is_compared_on_the_same_question_and_seed(lengths):
    greedy, sampled = lengths.effects
    assert (greedy.temperature, sampled.temperature) == (0.0, 0.7)
    assert greedy.tokens == Estimate(10, 10, 10)
    assert sampled.tokens == Estimate(12, 12, 12)
    assert greedy.accuracy.value == pytest.approx(-6 / 60)
    plain, *_ = lengths.conditions
    assert (plain.prompt, plain.temperature, plain.num_answers) == ("plain", 0.0, 60)
    assert plain.censored == pytest.approx(1 / 60)


def test_the_floor_is_how_far_two_answers_to_one_question_are_apart(lengths):
    (floor,) = lengths.floors
    assert (floor.temperature, floor.num_questions) == (0.7, 59)
    assert floor.pair_difference == Estimate(10, 10, 10)


def test_a_length_run_without_whole_answers_says_so():
    assert summarise_length([]) is None
    cut = summarise_length([{**row, "censored": True} for row in length_rows(3)], draws=DRAWS)
    assert cut.predictors == []
    assert any("censored" in reason for reason in cut.missing)
    assert "censored" in cut.to_markdown()


def speculation_row(setting, category, committed, rounds, passes, agreement):
    accepted = committed - rounds
    return {
        "setting": setting,
        "category": category,
        "policy": setting.split("-")[0],
        "max_draft_tokens": 4,
        "committed": committed,
        "rounds": rounds,
        "drafted": 4 * rounds,
        "accepted": accepted,
        "rejections": rounds // 2,
        "target_passes": passes,
        "seconds": committed / 10,
        "correct": None,
        "agreement": agreement,
    }


def test_speculation_is_summed_by_setting_and_by_category():
    rows = [
        speculation_row("lossless-4", "maths", 40, 10, 10, 1.0),
        speculation_row("lossless-4", "writing", 20, 10, 10, 1.0),
        speculation_row("bild-4", "maths", 40, 8, 8, 0.9),
        speculation_row("bild-slow-4", "maths", 40, 20, 20, 0.8),
    ]
    summary = summarise_speculation(rows, draws=DRAWS)
    lossless, bild, slow = summary.settings
    assert lossless.acceptance_length.value == pytest.approx(60 / 20)
    assert lossless.acceptance_rate.value == pytest.approx(40 / 80)
    assert lossless.alpha_hat.value == pytest.approx(40 / 50)
    assert lossless.passes_per_token.value == pytest.approx(20 / 60)
    assert lossless.seconds_per_token.value == pytest.approx(0.1)
    assert {name: e.value for name, e in lossless.by_category.items()} == {"maths": 4.0, "writing": 2.0}
    assert lossless.accuracy is None
    assert (lossless.on_front, bild.on_front, slow.on_front) == (True, True, False)
    assert "| writing | 2.000 [2.000, 2.000] | – | – |" in summary.to_markdown()
    assert summarise_speculation([]).missing


def test_summaries_are_strict_json(own_and_labels, lengths):
    for summary in (own_and_labels[0], lengths, summarise_speculation([])):
        found = json.loads(json.dumps(as_json(summary), allow_nan=False))
        assert "missing" in found
    own = as_json(own_and_labels[0])
    assert len(own["routers"][0]["share"]) == 121
    assert own["confusion"][0][0] == own_and_labels[0].confusion[0, 0]
