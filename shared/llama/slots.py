"""Who may use which sequence of a context, and who waits for one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Container, Sequence

from shared.llama.context import common_prefix


class Turn:
    """A stream's place: in line, and then in a slot."""

    def __init__(self, position: int, slot: int | None = None) -> None:
        self.position = position
        """0 has a slot, 1 gets the next one."""
        self.slot = slot
        self._moved = asyncio.Event()

    async def moved(self) -> int:
        """Wait until the position changes; returns it."""
        await self._moved.wait()
        self._moved.clear()
        return self.position

    def move(self, position: int, slot: int | None = None) -> None:
        self.position, self.slot = position, slot
        self._moved.set()


class Slots:
    """Slots are handed out in the order of asking. Free ones keep their text; the oldest text goes first."""

    def __init__(self, slots: Sequence[int], max_waiting: int) -> None:
        """
        Args:
            slots: sequences of the context.
            max_waiting: streams that may wait for one.
        """
        self._free: OrderedDict[int, list[int]] = OrderedDict((slot, []) for slot in slots)
        self._waiting: deque[Turn] = deque()
        self._max_waiting = max_waiting

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def enter(self, token_ids: Sequence[int], *, reusable: Container[int] | None = None) -> Turn | None:
        """Take a free slot or a place in line, to be given back by `leave`; None where the line is full.

        Args:
            token_ids: what the stream begins with.
            reusable: slots whose text it may go on from; None is all of them.
        """
        if self._free:
            slot = self._best_free(list(token_ids), reusable)
            del self._free[slot]
            return Turn(0, slot)
        if len(self._waiting) >= self._max_waiting:
            return None
        turn = Turn(len(self._waiting) + 1)
        self._waiting.append(turn)
        return turn

    def leave(self, turn: Turn, cached: Sequence[int]) -> None:
        """Leave the line, or hand the slot to whoever waits longest; a free one keeps the text that it holds.

        Args:
            cached: what the slot holds, if there is one.
        """
        if turn.slot is None:
            self._waiting.remove(turn)
        elif self._waiting:
            self._waiting.popleft().move(0, turn.slot)
        else:
            self._free[turn.slot] = list(cached)
        for position, waiting in enumerate(self._waiting, start=1):
            if waiting.position != position:
                waiting.move(position)

    def _best_free(self, token_ids: list[int], reusable: Container[int] | None) -> int:
        """The slot that holds most of the text already, or else the one unused for longest.

        Half of the text at least, or half of what the slot holds: every chat begins with the same few tokens
        of the template, and for those nobody else's conversation should be overwritten.
        """
        shared = {
            slot: common_prefix(cached, token_ids) if reusable is None or slot in reusable else 0
            for slot, cached in self._free.items()
        }
        best = max(shared, key=lambda slot: shared[slot])
        is_worth_it = 2 * shared[best] > min(len(token_ids), len(self._free[best]))
        return best if is_worth_it else next(iter(self._free))
