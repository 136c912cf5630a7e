"""Who of the streams that wait for a place goes next, and who is refused. Pure: streams in, streams out.

Between tenants, the one that holds fewest places goes first. Among the streams of one tenant it is first
come, or the shortest predicted answer: scheduling by response length (Zheng et al. 2023, arXiv:2305.13144),
and with it what keeps long answers from starving. Their ageing is counted in turns, not in seconds, so that
it needs no fitting to a target's speed: a stream that finds n others of its tenant before it goes at the
latest after `1 + AGEING` times n turns, and one for each place of the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

AGEING = 1.5
"""How many later streams may go first, for each that a stream found before it."""
OVERRUN = 3.0
"""An answer that is so many times longer than predicted gives its place to others that wait."""


class Order(str, Enum):
    FIRST_COME = "first-come"
    SHORTEST = "shortest"


@dataclass(eq=False, slots=True)
class Ticket:
    """A stream that waits."""

    tenant: str
    expected_tokens: int
    """What it is expected to write still."""
    latest_turn: int
    """Of its tenant's turns, the one by which it goes."""
    returns: bool
    """It held a place before, and is not refused another."""


class WaitingLine:
    """Those that wait, and what each tenant holds."""

    def __init__(self, order: Order, num_places: int) -> None:
        self._order = order
        self._num_places = num_places
        self._held: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        """That each tenant had since it last had nobody waiting."""
        self._waiting: list[Ticket] = []
        """In the order in which they came."""
        self._lineup: list[str] = []
        """Their tenants, by whose turn it would be at first come: lengths decide within a tenant only."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_free(self) -> int:
        return self._num_places - self._held.total()

    def is_runaway(self, expected_tokens: int, num_written: int) -> bool:
        """Whether an answer has got a place for its prediction and not for its length."""
        return self._order is Order.SHORTEST and num_written >= OVERRUN * expected_tokens

    def take(self, tenant: str) -> None:
        """Count a place that is given away."""
        self._held[tenant] += 1

    def give_back(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def join(self, tenant: str, expected_tokens: int, *, returns: bool = False) -> Ticket:
        """Stand in line."""
        num_before = len(self._of(tenant))
        if not num_before:
            self._turns.pop(tenant, None)
        latest = self._turns[tenant] + int((1 + AGEING) * num_before) + self._num_places
        ticket = Ticket(tenant, expected_tokens, latest, returns)
        self._waiting.append(ticket)
        self._lineup.append(tenant)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        own = [i for i, tenant in enumerate(self._lineup) if tenant == ticket.tenant]
        del self._lineup[own[self._of(ticket.tenant).index(ticket)]]
        self._waiting.remove(ticket)

    def call_next(self) -> Ticket | None:
        """Who gets the place that is free: it is out of the line then, and holds the place."""
        if not self._waiting:
            return None
        tenant = min(self._lineup, key=lambda name: self._held[name])
        own = self._of(tenant)
        ticket = own[0] if self._order is Order.FIRST_COME else shortest(own, self._turns[tenant])
        self._waiting.remove(ticket)
        self._lineup.remove(tenant)
        self._turns[tenant] += 1
        self.take(tenant)
        return ticket

    def refuse_one(self) -> Ticket | None:
        """Who is sent away from a line that is too long: the newest of the tenant with most in it."""
        new = [ticket for ticket in self._waiting if not ticket.returns]
        if not new:
            return None
        counts = Counter(ticket.tenant for ticket in new)
        most = max(counts.values())
        refused = next(ticket for ticket in reversed(new) if counts[ticket.tenant] == most)
        self.leave(refused)
        return refused

    def _of(self, tenant: str) -> list[Ticket]:
        return [ticket for ticket in self._waiting if ticket.tenant == tenant]


def shortest(line: Sequence[Ticket], turn: int) -> Ticket:
    """The shortest that may go now without making anybody miss its latest turn.

    Were all served by their latest turns, one at a turn, each would have some turns to spare; nobody may go
    before one that has none.

    Args:
        line: of one tenant, not empty, in the order in which they came.
        turn: that is given away now.

    >>> first, second = Ticket("a", 900, 5, False), Ticket("a", 3, 9, False)
    >>> shortest([first, second], turn=4) is second, shortest([first, second], turn=5) is first
    (True, True)
    """
    may_go = []
    for rank, ticket in enumerate(sorted(line, key=lambda ticket: ticket.latest_turn)):
        may_go.append(ticket)
        if ticket.latest_turn <= turn + rank:
            break
    return min(may_go, key=lambda ticket: ticket.expected_tokens)


def expected_tokens(predicted: float | None, most: int) -> tuple[int, bool]:
    """What an answer is expected to need, and whether the prediction had to be clamped to make sense.

    Args:
        predicted: tokens of the whole answer, as somebody else says; None where nobody does.
        most: tokens that it can have, >= 1. Taken where nothing is predicted, or a NaN is.

    >>> expected_tokens(40, 512), expected_tokens(None, 512), expected_tokens(-3, 512)
    ((40, False), (512, False), (1, True))
    """
    if predicted is None:
        return most, False
    if not 1 <= predicted <= most:  # written so that NaN fails too
        return (1 if predicted < 1 else most), True
    return round(predicted), False
