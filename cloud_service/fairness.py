"""Whose turn it is: virtual token counters (Sheng et al. 2024, arXiv:2401.00588). Pure: counts in, order out.

Every tenant has a counter of the tokens that were served to it, and the tenant with the lowest goes first.
One that comes back after a pause starts at the lowest counter of those that wait, so that it cannot
have saved up turns; so whatever anybody else asks for, two tenants that both have work are served alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Tenant = TypeVar("Tenant", bound=Hashable)
_MOST_TENANTS = 10_000
"""Counters that are remembered; beyond, those of tenants without work are forgotten."""


class TokenCounters:
    """Counters by tenant. `active` says who has work: a tenant that was not among them is lifted."""

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._active: set[Hashable] = set()
        self._least = 0.0
        """Of those that have work, or had some last."""

    def active(self, tenants: Iterable[Hashable]) -> None:
        """Take note of who has work now; all others have none."""
        now = set(tenants)
        stayed = now & self._active
        self._least = min((self._served[tenant] for tenant in stayed or self._active), default=self._least)
        for tenant in now - stayed:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._least)
        self._active = now
        if len(self._served) > _MOST_TENANTS:
            self._served = {tenant: self._served[tenant] for tenant in now}

    def serve(self, tenant: Hashable, num_tokens: float) -> None:
        """Add what an active tenant got."""
        self._served[tenant] += num_tokens

    def order(self, tenants: Sequence[Hashable]) -> list[int]:
        """Indices of entries by the counter of their tenant; entries of one tenant keep their order.

        >>> counters = TokenCounters()
        >>> counters.active("ab")
        >>> counters.serve("a", 5)
        >>> counters.order("aabb")
        [2, 3, 0, 1]
        """
        return sorted(range(len(tenants)), key=lambda i: self._served[tenants[i]])


def shares(num_units: int, wanted: Sequence[int], tenants: Sequence[Hashable]) -> list[int]:
    """Divide units among tenants equally, and each tenant's among its entries; nobody gets more than wanted.

    What one tenant does not want the others share (max-min fairness). Earlier entries get the odd units.

    Args:
        wanted: [num_entries], at most.
        tenants: [num_entries], whose entry it is.
    Returns:
        [num_entries] units.

    >>> shares(12, [9, 9, 9, 2], ["a", "a", "b", "c"])
    [3, 2, 5, 2]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, tenant in enumerate(tenants):
        groups.setdefault(tenant, []).append(i)
    totals = _level(num_units, [sum(wanted[i] for i in entries) for entries in groups.values()])
    given = [0] * len(wanted)
    for entries, total in zip(groups.values(), totals, strict=True):
        for i, units in zip(entries, _level(total, [wanted[i] for i in entries]), strict=True):
            given[i] = units
    return given


def _level(num_units: int, wanted: Sequence[int]) -> list[int]:
    given = [0] * len(wanted)
    open_ = [i for i, most in enumerate(wanted) if most > 0]
    while open_ and num_units:
        share = max(1, num_units // len(open_))
        for i in open_:
            extra = min(share, wanted[i] - given[i], num_units)
            given[i] += extra
            num_units -= extra
        open_ = [i for i in open_ if given[i] < wanted[i]]
    return given
