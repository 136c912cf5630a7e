"""When a replica that failed is asked again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.breaker import Backoff, Breaker, BreakerState

NO_JITTER = 0.999_999
TRIAL_S = 5.0


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(Backoff(), trial_s=TRIAL_S)


def test_waits_double_up_to_a_quarter_of_a_second_and_to_five_once_a_minute_has_passed():
    backoff = Backoff()
    waits = [backoff.wait_s(n, 0.0, NO_JITTER) for n in range(1, 6)]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.25, 0.25], rel=1e-5)
    assert backoff.wait_s(300, 60.0, NO_JITTER) == pytest.approx(5.0, rel=1e-5)


@given(st.integers(1, 10**6), st.floats(0, 1e6), st.floats(0, 1, exclude_max=True))
def test_half_of_every_wait_is_random(num_failures, lasted_s, jitter):
    backoff = Backoff()
    longest = backoff.wait_s(num_failures, lasted_s, NO_JITTER)
    assert longest / 2 * 0.999 <= backoff.wait_s(num_failures, lasted_s, jitter) <= longest * 1.001


def test_a_closed_breaker_admits_everybody(breaker):
    assert all(breaker.admits(now) for now in (0.0, 0.0, 1.0))


def test_an_open_one_admits_nobody_until_its_wait_is_over_and_then_one_trial(breaker):
    breaker.failed(10.0, NO_JITTER)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admits(10.04)
    assert breaker.admits(10.06)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.admits(10.07)


def test_a_trial_that_connects_lets_everybody_in(breaker):
    breaker.failed(0.0, 0.0)
    assert breaker.admits(1.0)
    breaker.connected()
    assert breaker.admits(1.0)
    assert breaker.admits(1.0)


def test_a_trial_that_fails_makes_the_next_wait_longer(breaker):
    breaker.failed(0.0, NO_JITTER)
    assert breaker.admits(1.0)
    breaker.failed(1.0, NO_JITTER)
    assert breaker.retry_at_s == pytest.approx(1.1)


def test_a_replica_that_answers_and_never_works_is_asked_less_and_less(breaker):
    waits = []
    for now in range(4):
        assert breaker.admits(now)
        breaker.connected()
        breaker.failed(now, NO_JITTER)
        waits.append(breaker.retry_at_s - now)
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.25], rel=1e-5)


def test_work_done_clears_the_record(breaker):
    for now in range(4):
        breaker.admits(now)
        breaker.failed(now, NO_JITTER)
    breaker.admits(9.0)
    breaker.worked()
    breaker.failed(10.0, NO_JITTER)
    assert breaker.retry_at_s == pytest.approx(10.05)


def test_streams_that_break_together_count_as_one_failure(breaker):
    for _ in range(64):
        breaker.failed(0.0, NO_JITTER)
    assert breaker.retry_at_s == pytest.approx(0.05)


def test_a_trial_that_is_called_off_makes_room_for_another(breaker):
    breaker.failed(0.0, 0.0)
    assert breaker.admits(1.0)
    breaker.gave_up(1.1)
    assert breaker.admits(1.1)


def test_a_trial_that_nobody_ends_is_not_waited_for_for_ever(breaker):
    breaker.failed(0.0, 0.0)
    assert breaker.admits(1.0)
    assert not breaker.admits(1.0 + TRIAL_S - 0.01)
    assert breaker.admits(1.0 + TRIAL_S)
