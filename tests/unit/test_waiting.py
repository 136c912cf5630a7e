"""Who goes next: first come or shortest first; nobody starves, tenants are equal, predictions make sense."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_service.waiting import AGEING, OVERRUN, Order, Ticket, WaitingLine, expected_tokens


def full_line(order: Order, num_places: int = 1, tenant: str = "a") -> WaitingLine:
    """All places are held by one tenant."""
    line = WaitingLine(order, num_places)
    for _ in range(num_places):
        line.take(tenant)
    return line


def served(line: WaitingLine, holder: str = "a") -> list[Ticket]:
    """Everybody who waits, in the order in which they go, each leaving as soon as it came."""
    order = []
    line.give_back(holder)
    while (ticket := line.call_next()) is not None:
        order.append(ticket)
        line.give_back(ticket.tenant)
    return order


@pytest.mark.parametrize(
    ("order", "went"),
    [
        pytest.param(Order.FIRST_COME, [300, 5, 80, 5], id="first come"),
        pytest.param(Order.SHORTEST, [5, 5, 80, 300], id="shortest first"),
    ],
)
def test_the_order_of_one_tenants_streams(order, went):
    line = full_line(order, num_places=8)
    for tokens in (300, 5, 80, 5):
        line.join("a", tokens)
    assert [ticket.expected_tokens for ticket in served(line)] == went


def test_equal_predictions_go_in_the_order_in_which_they_came():
    line = full_line(Order.SHORTEST, num_places=8)
    tickets = [line.join("a", 7) for _ in range(5)]
    assert served(line) == tickets


def test_a_long_answer_is_overtaken_for_a_while_only():
    """Short ones keep coming, one a turn: the long one, that found none before it, waits its ageing out."""
    line = full_line(Order.SHORTEST, num_places=3)
    long = line.join("a", 500)
    turns = []
    while long not in turns:
        line.join("a", 2)
        line.give_back("a")
        turns.append(line.call_next())
    assert len(turns) == 3 + 1, "one for each place, and its own"


streams = st.lists(
    st.tuples(st.sampled_from("aab"), st.integers(1, 600), st.integers(0, 3), st.booleans()), max_size=60
)


@settings(deadline=None, max_examples=300)
@given(streams, st.integers(1, 5))
def test_nobody_goes_later_than_ageing_allows(coming, num_places):
    """Whatever comes, leaves, and gives up: a stream goes within its turns, by its tenant's own count."""
    line = full_line(Order.SHORTEST, num_places)
    num_turns: Counter[str] = Counter()
    found: dict[Ticket, tuple[int, int]] = {}
    waiting: list[Ticket] = []
    holders = ["a"] * num_places

    def call() -> None:
        line.give_back(holders.pop(0))
        ticket = line.call_next()
        assert ticket is not None
        before, then = found[ticket]
        assert num_turns[ticket.tenant] - then <= (1 + AGEING) * before + num_places
        num_turns[ticket.tenant] += 1
        waiting.remove(ticket)
        holders.append(ticket.tenant)

    for tenant, tokens, num_calls, gives_up in coming:
        before = sum(ticket.tenant == tenant for ticket in waiting)
        ticket = line.join(tenant, tokens)
        found[ticket] = (before, num_turns[tenant])
        waiting.append(ticket)
        if gives_up:
            line.leave(waiting.pop(0))
        for _ in range(min(num_calls, len(waiting))):
            call()
    while waiting:
        call()
    assert len(line) == 0


@given(streams, st.integers(1, 5))
def test_lengths_never_decide_between_tenants(coming, num_places):
    """Which tenant goes next is the same, whatever its streams predict."""

    def tenants(order: Order) -> list[str]:
        line = full_line(order, num_places)
        for tenant, tokens, _, _ in coming:
            line.join(tenant, tokens)
        return [ticket.tenant for ticket in served(line)]

    assert tenants(Order.SHORTEST) == tenants(Order.FIRST_COME)


def test_who_returns_is_never_refused():
    line = full_line(Order.SHORTEST)
    returning, new = line.join("a", 9, returns=True), line.join("b", 1)
    assert line.refuse_one() is new
    assert line.refuse_one() is None
    assert served(line) == [returning]


@pytest.mark.parametrize(
    ("order", "expected", "written", "is_runaway"),
    [
        pytest.param(Order.SHORTEST, 20, int(20 * OVERRUN), True, id="so many times longer than predicted"),
        pytest.param(Order.SHORTEST, 20, int(20 * OVERRUN) - 1, False, id="not yet"),
        pytest.param(Order.FIRST_COME, 20, 500, False, id="a place that was not given for a prediction"),
    ],
)
def test_a_runaway_answer(order, expected, written, is_runaway):
    assert WaitingLine(order, 1).is_runaway(expected, written) is is_runaway


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        pytest.param(40, (40, False), id="a prediction"),
        pytest.param(39.6, (40, False), id="a fraction"),
        pytest.param(None, (512, False), id="none: as long as it may be"),
        pytest.param(1, (1, False), id="the least"),
        pytest.param(512, (512, False), id="the most"),
        pytest.param(0, (1, True), id="nothing"),
        pytest.param(-7, (1, True), id="negative"),
        pytest.param(2**32 - 7, (512, True), id="huge, as a negative one is on the wire"),
        pytest.param(math.inf, (512, True), id="infinite"),
        pytest.param(-math.inf, (1, True), id="minus infinity"),
        pytest.param(math.nan, (512, True), id="no number"),
    ],
)
def test_a_prediction_that_makes_no_sense_is_clamped(predicted, expected):
    assert expected_tokens(predicted, 512) == expected
