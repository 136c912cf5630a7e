"""Limits of tenants: how they combine, when a stream is cut off, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import InvalidSetting
from shared.limits import Limits, Phase, limits_from, overdue, retry_after_s


def test_a_tenants_own_limit_replaces_the_services() -> None:
    own = Limits(streams=4, context_tokens=512).replaced_by(Limits(streams=9))
    assert (own.streams, own.context_tokens) == (9, 512)


def test_a_token_can_only_narrow_its_tenants_limits() -> None:
    tenant = Limits(streams=4, idle_s=60.0)
    narrowed = tenant.narrowed_by(Limits(streams=9, max_draft_tokens=2, idle_s=30.0))
    assert (narrowed.streams, narrowed.max_draft_tokens, narrowed.idle_s) == (4, 2, 30.0)


def test_what_a_token_leaves_unset_narrows_nothing() -> None:
    assert Limits(idle_s=600.0).narrowed_by(Limits(streams=1)).idle_s == 600.0


@pytest.mark.parametrize(
    ("phase", "in_phase_s", "in_all_s", "expected"),
    [
        pytest.param(Phase.EDGE, 4, 9, None, id="a patient wait for the edge"),
        pytest.param(Phase.EDGE, 6, 9, ("idle_s", "silent"), id="an edge that fell silent"),
        pytest.param(Phase.READER, 4, 9, ("reading_s", "not read"), id="an edge that does not read"),
        pytest.param(Phase.TARGET, 50, 60, None, id="the target may take its time"),
        pytest.param(Phase.TARGET, 1, 101, ("total_s", "longer than 100 s"), id="no stream lasts for ever"),
    ],
)
def test_when_a_stream_is_cut_off(
    phase: Phase, in_phase_s: float, in_all_s: float, expected: tuple[str, str] | None
) -> None:
    limits = Limits(idle_s=5, reading_s=3, total_s=100)
    found = overdue(limits, phase, in_phase_s=in_phase_s, in_all_s=in_all_s)
    if expected is None:
        assert found is None
    else:
        limit, words = expected
        assert found is not None
        assert found.limit == limit
        assert words in found.why


@pytest.mark.parametrize(
    ("previous", "current", "into_minute_s", "limit", "wait_s"),
    [
        pytest.param(0, 99, 30, 100, 0, id="one token below"),
        pytest.param(0, 100, 30, 100, 30, id="all used in this minute"),
        pytest.param(100, 1, 0.5, 100, 0.1, id="almost: a moment later"),
        pytest.param(100, 50, 0, 100, 30, id="the last minute still counts by half"),
        pytest.param(0, 400, 30, 100, 30 + 45, id="far beyond: the next minute is spent, too"),
    ],
)
def test_when_to_come_back(
    previous: int, current: int, into_minute_s: float, limit: int, wait_s: float
) -> None:
    assert retry_after_s(previous, current, into_minute_s, limit) == pytest.approx(wait_s)


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0, 59.99), st.integers(1, 400))
def test_who_comes_back_when_told_is_let_in_and_not_sooner(
    previous: int, current: int, into_minute_s: float, limit: int
) -> None:
    wait_s = retry_after_s(previous, current, into_minute_s, limit)
    assume(wait_s > 0.01)
    assert wait_s <= 120.0

    def waits_at(later_s: float) -> float:
        minutes, into = divmod(into_minute_s + later_s, 60.0)
        then = {0: (previous, current), 1: (current, 0), 2: (0, 0)}[int(minutes)]
        return retry_after_s(*then, into, limit)

    assert waits_at(wait_s + 0.001) == pytest.approx(0.0, abs=0.001)
    assert waits_at(wait_s - 0.005) > 0.0


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"stream": "3"}, "'stream'"),
        ({"streams": "0"}, "streams = 0"),
        ({"streams": "many"}, "streams = many"),
        ({"idle_s": "-1"}, "idle_s = -1"),
        ({"total_s": "inf"}, "total_s = inf"),
    ],
)
def test_a_limit_that_cannot_be_used_is_named(texts: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        limits_from(texts)
