"""A queue for the places of any engine: `waiting` says who goes next, here they wait for it.

A full queue refuses the newest stream of the tenant that fills it most, so that nobody can shut others
out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloud_service.waiting import Order, Ticket, WaitingLine
from shared.errors import CloudOverloaded

_RETRY_S = 1.0
"""When a stream that was refused a place may ask again."""


class AdmissionQueue:
    """Places of one target."""

    def __init__(
        self, num_places: int, *, max_waiting: int, max_wait_s: float, order: Order = Order.FIRST_COME
    ) -> None:
        """
        Args:
            max_waiting: streams that may wait for a place.
            max_wait_s: how long they do.
        """
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._line = WaitingLine(order, num_places)
        self._turns: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def num_free(self) -> int:
        return self._line.num_free

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    def wants_back(self, expected_tokens: int, num_written: int) -> bool:
        """Whether a stream that has written so much in its place shall give it back, and wait for another."""
        return bool(len(self._line)) and self._line.is_runaway(expected_tokens, num_written)

    @asynccontextmanager
    async def place(
        self, tenant: str, expected_tokens: int = 0, *, returns: bool = False
    ) -> AsyncIterator[None]:
        """Hold a place; waits in line for one.

        Args:
            expected_tokens: that the stream is expected to write.
            returns: the stream gave a place back for others; it is not refused, and waits for any time.
        Raises:
            CloudOverloaded: the queue is full, or none came free in time.
        """
        if self._line.num_free and not len(self._line):
            self._line.take(tenant)
        else:
            await self._wait(tenant, expected_tokens, returns)
        try:
            yield
        finally:
            self._give_back(tenant)

    def _give_back(self, tenant: str) -> None:
        self._line.give_back(tenant)
        if (ticket := self._line.call_next()) is not None:
            self._turns[ticket].set_result(None)

    async def _wait(self, tenant: str, expected_tokens: int, returns: bool) -> None:
        ticket = self._line.join(tenant, expected_tokens, returns=returns)
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        if not returns and len(self._line) > self._max_waiting:
            self._refuse_one()
        try:
            # Not `wait_for`, which loses a cancellation that comes in the same moment as the turn.
            await asyncio.wait({turn}, timeout=None if returns else self._max_wait_s)
        except asyncio.CancelledError:
            if not turn.done():
                self._line.leave(ticket)
            elif turn.exception() is None:
                self._give_back(tenant)
            raise
        finally:
            del self._turns[ticket]
        if not turn.done():
            self._line.leave(ticket)
            raise CloudOverloaded(
                f"no slot came free within {self._max_wait_s:g} s; try again later",
                retry_after_s=_RETRY_S,
                limit="places",
            )
        turn.result()

    def _refuse_one(self) -> None:
        if (refused := self._line.refuse_one()) is not None:
            self._turns[refused].set_exception(
                CloudOverloaded(
                    f"all slots are taken and {len(self._line)} streams wait already; try again later",
                    retry_after_s=_RETRY_S,
                    limit="places",
                )
            )
