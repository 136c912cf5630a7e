"""The speed controller: what it says, refuses and remembers. tests/simulation measures what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.virtual_link import World, run_auto
from shared.controller import (
    DRAFT_LENGTHS,
    DRAFTING,
    MAX_WINDOW_TOKENS,
    Choices,
    Plan,
    Recent,
    SpeedController,
    SpeedState,
    TargetSpeed,
    Way,
)
from shared.speed import (
    MAX_RUN,
    Runs,
    expected_acceptance_length,
    proactive_rate,
    stop_and_wait_rate,
    stop_and_wait_tokens_per_s,
)
from tests.scripted_worlds import answers, warm, world

# What it costs, what it says, and what it refuses.


def test_one_outlier_changes_nothing():
    where = world(rtt_ms=14)
    controller = warm(where, answers(0.85, num=2))
    before = [each.tokens_per_s for each in controller.forecasts()]
    controller.observe_round_trip(30.0)
    controller.observe_draft(1, 10.0)
    assert [each.tokens_per_s for each in controller.forecasts()] == pytest.approx(before)


def tried_drafts(where: World) -> set[int]:
    """Lengths of the drafts that a fresh controller measures."""
    controller, tried = SpeedController(), set()
    for text in answers(0.8, num=2):
        controller.begin_stream(choices=Choices(ways=DRAFTING))

        def plan(ask: Callable[[], Plan] = controller.plan) -> Plan:
            made = ask()
            if made.why == "warm-up":
                tried.add(made.num_draft_tokens)
            return made

        controller.plan, ask = plan, controller.plan  # type: ignore[method-assign]
        run_auto(where, text, controller, Choices(ways=DRAFTING))
        controller.plan = ask  # type: ignore[method-assign]
    return tried


def test_long_drafts_are_tried_where_a_pass_hardly_cost_more():
    assert tried_drafts(world(step=30, token_ms=0.02)) == {4, 2, 16, 8}


def test_long_drafts_are_not_tried_where_drafting_them_takes_too_long():
    assert tried_drafts(world(step=2, rtt_ms=0, extra_ms=0, token_ms=8)) == {4, 2}


def test_a_few_unlucky_drafts_do_not_end_the_looking():
    controller = SpeedController()
    controller.begin_stream()
    controller.observe_round_trip(0.05)
    controller.observe_stream(8, 0.2)
    for length in (4, 2):
        controller.observe_draft(length, 5e-3 * length)
        controller.observe_round(length, 0, gave_token=True, verify_s=0.03, elapsed_s=0.1)
    controller.begin_stream()
    best, *others = controller.forecasts()
    assert best.way is Way.CLOUD
    assert max(each.tokens_per_s for each in others) < 0.7 * best.tokens_per_s
    assert controller.wants_agreement
    controller.observe_agreement([False] * 120)
    assert not controller.wants_agreement


def test_nothing_is_chosen_but_the_targets_own_answer():
    assert {way.value for way in Way} == {"cloud", "stop_and_wait", "proactive"}


def test_a_fresh_controller_measures_before_it_predicts():
    controller = SpeedController()
    controller.begin_stream()
    assert controller.forecasts() == []
    assert controller.plan() == Plan(Way.CLOUD, 0, 0, None, "warm-up")


def test_no_plan_exceeds_what_the_cloud_takes():
    controller = warm(world(step=30), answers(0.95, num=2))
    controller.begin_stream(choices=Choices(ways=DRAFTING))
    controller.limit_drafts(3)
    assert controller.plan().num_draft_tokens <= 3
    assert {each.num_draft_tokens for each in controller.forecasts()} <= {1, 2, 3}


# What the user set is not chosen.


def test_a_fixed_draft_length_is_the_only_one():
    controller = SpeedController()
    fixed = Choices(ways=DRAFTING, draft_lengths=(5,))
    for text in answers(0.8, num=2):
        run_auto(world(step=30), text, controller, fixed)
        assert controller.plan().num_draft_tokens == 5
    assert {each.way for each in controller.forecasts()} == set(DRAFTING)


def test_a_fixed_window_is_the_only_one():
    controller = SpeedController()
    fixed = Choices(ways=frozenset({Way.PROACTIVE}), window_tokens=12)
    for text in answers(0.8, num=2):
        run_auto(world(step=30), text, controller, fixed)
    assert {each.window_tokens for each in controller.forecasts()} == {12}


@pytest.mark.parametrize(
    ("choices", "leaves"),
    [
        pytest.param(Choices(), True, id="it does where its stream may be chosen"),
        pytest.param(Choices().without_stream(), False, id="it goes on drafting where it may not"),
    ],
)
def test_where_the_cloud_would_rather_write_alone(choices, leaves):
    controller = warm(world(rtt_ms=5), answers(0.9, num=2))
    controller.begin_stream(None, choices)
    assert controller.plan().way is not Way.CLOUD
    controller.leave_drafts()
    assert (controller.plan().way is Way.CLOUD) == leaves
    controller.begin_stream()
    assert controller.plan().way is not Way.CLOUD, "the next answer is another matter"


def test_where_all_is_set_nothing_is_measured_first():
    for way, window in ((Way.STOP_AND_WAIT, None), (Way.PROACTIVE, 9)):
        controller = SpeedController()
        controller.begin_stream(
            choices=Choices(ways=frozenset({way}), draft_lengths=(6,), window_tokens=window)
        )
        assert controller.plan() == Plan(way, 6, window or 6, None, "set")


def test_without_the_stream_among_the_choices_it_is_never_taken():
    controller = SpeedController()
    for text in answers(0.05, num=2):  # hopeless drafts
        controller.begin_stream(choices=Choices(ways=DRAFTING))
        assert controller.plan().way in DRAFTING
        run_auto(world(step=1), text, controller, Choices(ways=DRAFTING))
    assert Way.CLOUD not in {each.way for each in controller.forecasts()}


@pytest.mark.parametrize(
    "wrong",
    [{"ways": frozenset()}, {"draft_lengths": ()}, {"draft_lengths": (0, 4)}, {"window_tokens": 0}],
    ids=str,
)
def test_choices_of_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"nothing is left|a window must hold"):
        Choices(**wrong)


# What was learned is kept between processes.


def test_a_controller_goes_on_from_the_state_of_another():
    where = world(step=30)
    first = warm(where, answers(0.8, num=2))
    first.end_stream()
    second = SpeedController(SpeedState.model_validate_json(first.state().model_dump_json()))
    first.begin_stream()
    second.begin_stream()
    assert second.is_warm
    assert second.forecasts() == first.forecasts()
    assert second.plan().way == first.plan().way != Way.CLOUD


@pytest.mark.parametrize(
    "wrong",
    [{"draft_s": [nan]}, {"draft_s": [-1.0]}, {"trials": [1.0]}, {"unknown": 1}, {"num_tokens": -1}],
    ids=str,
)
def test_a_state_that_is_none_is_refused(wrong):
    with pytest.raises(ValidationError):
        SpeedState.model_validate(wrong)


# The link.


def test_a_long_prompt_tells_how_long_a_byte_takes():
    controller = warm(world(step=30), answers(0.8, num=1))
    before = controller.forecasts()
    for _ in range(3):
        controller.observe_transfer(10_000, 0.050 + 10.0)  # 8 kbit/s
    after = {each.way: each for each in controller.forecasts()}
    assert any("0.0 Mbit/s" in line for line in controller.explain())
    for each in before:
        if each.way is not Way.CLOUD:
            assert after[each.way].tokens_per_s < each.tokens_per_s


def test_a_pass_that_read_the_prompt_too_is_not_taken_for_a_draft_s():
    controller = warm(world(step=30), answers(0.8, num=1))
    before = [line for line in controller.explain() if "checks drafts" in line]
    for _ in range(20):
        controller.observe_round(4, 0, gave_token=False, verify_s=None, elapsed_s=9.0)
    assert before
    assert [line for line in controller.explain() if "checks drafts" in line] == before


def test_a_plan_goes_into_json():
    controller = warm(world(), answers(0.8, num=2))
    controller.begin_stream()
    plan = controller.plan()
    assert json.loads(json.dumps(asdict(plan)))["way"] == plan.way.value


def test_it_explains_what_it_measured_and_what_follows():
    controller = warm(world(step=30, rtt_ms=50), answers(0.8, num=1))
    text = "\n".join(controller.explain())
    for part in (
        "drafting takes 5.0 ms a token",
        "a round trip takes 50.0 ms",
        "the target's own stream takes 150.0 ms a token",
        "chosen: proactive speculation with drafts of",
    ):
        assert part in text


@pytest.mark.parametrize("seconds", [nan, inf, -inf])
def test_a_time_that_is_no_number_is_refused(seconds):
    controller = SpeedController()
    with pytest.raises(ValueError, match="must be a number of seconds"):
        controller.observe_round_trip(seconds)
    with pytest.raises(ValueError, match="must be a number of seconds"):
        controller.observe_draft(1, seconds)


@pytest.mark.parametrize("margin", [1.0, -0.1, nan])
def test_a_margin_out_of_range_is_refused(margin):
    with pytest.raises(ValueError, match="out of range"):
        SpeedController(margin=margin)


# The parts.


def test_a_median_of_recent_values_follows_a_lasting_change_within_five():
    recent = Recent()
    for _ in range(30):
        recent.add(1.0)
    for n in range(1, 6):
        recent.add(9.0)
        assert recent.value == (1.0 if n < 5 else 9.0)


def test_a_target_that_slows_down_is_slower_in_every_way_at_once():
    target = TargetSpeed()
    for _ in range(4):
        target.observe_stream(0.010)
        target.observe_pass(4, 0.020)
        target.observe_pass(8, 0.024)
    before = target.verify(16)
    for _ in range(10):
        target.observe_pass(4, 0.060)
    assert target.stream == pytest.approx(0.030, rel=0.05)
    assert target.verify(8) == pytest.approx(0.072, rel=0.05)
    assert target.verify(16) == pytest.approx(3 * before, rel=0.05)


@given(rate=st.floats(0.05, 0.95), g=st.integers(1, 16), rtt=st.floats(0, 1))
def test_with_independent_tokens_stop_and_wait_is_leviathans(rate, g, rtt):
    runs = Runs.from_hazards([1 - rate] * MAX_RUN)
    assert runs.mean == pytest.approx(1 / (1 - rate), rel=1e-6)
    assert runs.mean / runs.mean_groups(g + 1) == pytest.approx(expected_acceptance_length(rate, g), rel=0.02)
    assert stop_and_wait_rate(runs, g, 0.005, lambda _: 0.03, rtt) == pytest.approx(
        stop_and_wait_tokens_per_s(rate, g, 0.005, 0.03, rtt), rel=0.02
    )


def test_the_end_of_an_answer_costs_less_than_a_rejection():
    hazards = [0.2] * MAX_RUN
    whole, cut = Runs.from_hazards(hazards), Runs.from_hazards(hazards, ended=0.5)
    for g in (2, 8):
        assert stop_and_wait_rate(cut, g, 0.005, lambda k: 0.01 * k, 0.05) > stop_and_wait_rate(
            whole, g, 0.005, lambda k: 0.01 * k, 0.05
        )
        assert proactive_rate(cut, g, 4 * g, 0.005, lambda k: 0.01 * k, 0.05) > proactive_rate(
            whole, g, 4 * g, 0.005, lambda k: 0.01 * k, 0.05
        )


@settings(max_examples=40)
@given(
    rate=st.floats(0, 0.99),
    g=st.sampled_from(DRAFT_LENGTHS),
    times=st.integers(1, 16),
    rtt=st.floats(0, 1),
    t_verify=st.floats(1e-3, 1),
)
def test_no_schedule_of_drafts_beats_drafting_checking_and_a_round_trip_a_run(rate, g, times, rtt, t_verify):
    runs = Runs.from_hazards([1 - rate] * MAX_RUN)
    window = min(g * times, MAX_WINDOW_TOKENS)
    found = proactive_rate(runs, g, window, 0.005, lambda _: t_verify, rtt)
    assert 0 < found <= runs.mean / (runs.mean * 0.005 + t_verify + rtt) * (1 + 1e-9)
