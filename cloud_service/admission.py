"""Who gets one of the target's places, who waits for one, and who is refused: a queue for any engine.

The tenant that holds fewest places goes first, and of its streams the one that waits longest. A full queue
refuses the newest stream of the tenant that fills it most, so that nobody can shut others out of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from shared.errors import CloudOverloaded

_RETRY_S = 1.0
"""When a stream that was refused a place may ask again."""


def next_in_line(waiting: Sequence[str], held: Mapping[str, int]) -> int:
    """Index of the stream that gets the next place.

    Args:
        waiting: [num_waiting > 0] tenants, longest waiting first.
        held: places by tenant; none where it is missing.

    >>> next_in_line(["a", "a", "b"], {"a": 3, "b": 1})
    2
    """
    return min(range(len(waiting)), key=lambda i: (held.get(waiting[i], 0), i))


def first_to_refuse(waiting: Sequence[str]) -> int:
    """Index of the stream that a queue with one too many gives up: the newest of the greediest tenant.

    >>> first_to_refuse(["a", "a", "b"])
    1
    """
    counts = Counter(waiting)
    most = max(counts.values())
    return max(i for i, tenant in enumerate(waiting) if counts[tenant] == most)


@dataclass(eq=False, slots=True)
class _Waiter:
    tenant: str
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class AdmissionQueue:
    """Places of one target."""

    def __init__(self, num_places: int, *, max_waiting: int, max_wait_s: float) -> None:
        """
        Args:
            max_waiting: streams that may wait for a place.
            max_wait_s: how long they do.
        """
        self._num_free = num_places
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._held: Counter[str] = Counter()
        self._waiting: list[_Waiter] = []

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Hold a place; waits in line for one.

        Raises:
            CloudOverloaded: the queue is full, or none came free in time.
        """
        if self._num_free:
            self._take(tenant)
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    def _take(self, tenant: str) -> None:
        self._num_free -= 1
        self._held[tenant] += 1

    def _give_back(self, tenant: str) -> None:
        self._num_free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        if self._waiting:
            waiter = self._waiting.pop(next_in_line([w.tenant for w in self._waiting], self._held))
            self._take(waiter.tenant)
            waiter.turn.set_result(None)

    async def _wait(self, tenant: str) -> None:
        waiter = _Waiter(tenant)
        self._waiting.append(waiter)
        if len(self._waiting) > self._max_waiting:
            refused = self._waiting.pop(first_to_refuse([w.tenant for w in self._waiting]))
            refused.turn.set_exception(
                CloudOverloaded(
                    f"all slots are taken and {len(self._waiting)} streams wait already; try again later",
                    retry_after_s=_RETRY_S,
                    limit="places",
                )
            )
        try:
            # Not `wait_for`, which loses a cancellation that comes in the same moment as the turn.
            await asyncio.wait({waiter.turn}, timeout=self._max_wait_s)
        except asyncio.CancelledError:
            if not waiter.turn.done():
                self._waiting.remove(waiter)
            elif waiter.turn.exception() is None:
                self._give_back(tenant)
            raise
        if not waiter.turn.done():
            self._waiting.remove(waiter)
            raise CloudOverloaded(
                f"no slot came free within {self._max_wait_s:g} s; try again later",
                retry_after_s=_RETRY_S,
                limit="places",
            )
        waiter.turn.result()
