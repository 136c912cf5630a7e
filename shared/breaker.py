"""When to try again what failed: a backoff schedule, and a circuit breaker on top of it. Pure: no clock.

The breaker is that of Nygard, "Release It!" (2007): while it is open nothing is sent, so that a service
that comes up is not trampled, and nobody waits for an answer that will not come.
Its waits are the schedule's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: doubling up to a cap, and a longer cap once the failure has lasted.

    The low cap is what lets a stream go on within 300 ms of a service's return. The share that is
    random spreads the edges of one service, which all lose it at the same instant (Brooker 2015,
    "Exponential Backoff And Jitter": its "equal jitter").
    """

    first_s: float = 0.05
    cap_s: float = 0.25
    lasting_s: float = 60.0
    """After so long, waits may grow further."""
    lasting_cap_s: float = 5.0

    def wait_s(self, num_failures: int, lasted_s: float, jitter: float) -> float:
        """Seconds until the next attempt.

        Args:
            num_failures: in a row, >= 1.
            lasted_s: since the first of them.
            jitter: uniform in [0, 1).

        >>> backoff = Backoff()
        >>> [round(backoff.wait_s(n, 0.0, 0.999), 2) for n in (1, 2, 3, 9)]
        [0.05, 0.1, 0.2, 0.25]
        """
        cap = self.cap_s if lasted_s < self.lasting_s else self.lasting_cap_s
        longest = min(cap, self.first_s * 2.0 ** min(num_failures - 1, 32))
        return longest * (0.5 + 0.5 * jitter)


class BreakerState(str, Enum):
    CLOSED = "closed"
    """Requests pass."""
    OPEN = "open"
    """None passes until the wait is over."""
    HALF_OPEN = "half open"
    """One passes, as a trial; the others wait for what comes of it."""


class Breaker:
    """Of one replica. Opens at a failure, closes when a trial connects, and forgets once work was done."""

    def __init__(self, backoff: Backoff, *, trial_s: float) -> None:
        """
        Args:
            trial_s: a trial without an outcome for so long has been given up, and another may follow.
        """
        self.state = BreakerState.CLOSED
        self.retry_at_s = 0.0
        """On the caller's clock; when the next attempt may pass, unless closed."""
        self._backoff = backoff
        self._trial_s = trial_s
        self._num_failures = 0
        self._failing_since_s = 0.0

    def admits(self, now_s: float) -> bool:
        """Whether a request may be sent now; where the breaker was not closed, it becomes the trial."""
        if self.state is BreakerState.CLOSED:
            return True
        if now_s < self.retry_at_s:
            return False
        self.state = BreakerState.HALF_OPEN
        self.retry_at_s = now_s + self._trial_s
        return True

    def gave_up(self, now_s: float) -> None:
        """The trial was called off before it had an outcome: another may follow at once."""
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.OPEN
            self.retry_at_s = now_s

    def connected(self) -> None:
        """The replica answers. That it works is not shown yet, so the next wait is no shorter."""
        self.state = BreakerState.CLOSED

    def worked(self) -> None:
        """The replica did what was asked of it."""
        self.state = BreakerState.CLOSED
        self._num_failures = 0

    def failed(self, now_s: float, jitter: float) -> None:
        """A request failed. While open this is old news: the streams of a replica fail together.

        Args:
            jitter: as in `Backoff.wait_s`.
        """
        if self.state is BreakerState.OPEN:
            return
        if not self._num_failures:
            self._failing_since_s = now_s
        self._num_failures += 1
        self.state = BreakerState.OPEN
        lasted_s = now_s - self._failing_since_s
        self.retry_at_s = now_s + self._backoff.wait_s(self._num_failures, lasted_s, jitter)
