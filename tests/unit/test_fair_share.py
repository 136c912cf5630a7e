"""Virtual token counters and equal shares: two tenants with work are served alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_service.fairness import TokenCounters, shares


def served(counters: TokenCounters, tenants: str, rounds: int) -> dict[str, int]:
    """Tokens by tenant after so many turns of 10 tokens, each of which goes to the first in order."""
    got = dict.fromkeys(tenants, 0)
    for _ in range(rounds):
        counters.active(tenants)
        first = tenants[counters.order(tenants)[0]]
        counters.serve(first, 10)
        got[first] += 10
    return got


def test_a_tenant_with_many_streams_is_served_like_one_with_a_single_stream() -> None:
    assert served(TokenCounters(), "aaaab", 20) == {"a": 100, "b": 100}


def test_a_tenant_that_paused_has_saved_up_no_turns() -> None:
    counters = TokenCounters()
    served(counters, "ab", 2)
    served(counters, "a", 50)
    assert served(counters, "ab", 20) == {"a": 100, "b": 100}


def test_a_tenant_that_leaves_and_comes_back_at_once_gains_nothing() -> None:
    counters = TokenCounters()
    served(counters, "a", 10)
    counters.active([])
    counters.active("ab")
    assert counters.order("ab") in ([0, 1], [1, 0])
    assert served(counters, "ab", 20) == {"a": 100, "b": 100}


def test_entries_of_one_tenant_keep_their_order() -> None:
    counters = TokenCounters()
    counters.active("ab")
    counters.serve("a", 1)
    assert counters.order("aabab") == [2, 4, 0, 1, 3]


@pytest.mark.parametrize(
    ("num_units", "wanted", "tenants", "given_"),
    [
        pytest.param(0, [3], "a", [0], id="nothing to share"),
        pytest.param(9, [], "", [], id="nobody there"),
        pytest.param(10, [3, 3], "ab", [3, 3], id="enough for all"),
        pytest.param(12, [99, 99, 99], "aab", [3, 3, 6], id="by tenant, not by stream"),
        pytest.param(12, [99, 99, 2], "aab", [5, 5, 2], id="what one does not want the others share"),
        pytest.param(3, [9, 9], "ab", [2, 1], id="the odd unit goes to the first"),
    ],
)
def test_units_are_shared(num_units: int, wanted: list[int], tenants: str, given_: list[int]) -> None:
    assert shares(num_units, wanted, tenants) == given_


@given(st.integers(0, 500), st.lists(st.tuples(st.integers(0, 99), st.sampled_from("abc")), max_size=9))
def test_nothing_is_lost_and_nobody_gets_more_than_wanted(num_units: int, entries: list) -> None:
    wanted = [count for count, _ in entries]
    got = shares(num_units, wanted, [tenant for _, tenant in entries])
    assert sum(got) == min(num_units, sum(wanted))
    assert all(0 <= units <= most for units, most in zip(got, wanted, strict=True))
