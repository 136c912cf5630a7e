"""How fast an answer is drafted: fixed, or as the speed controller says by what it measures on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shared.controller import Plan, SpeedController, Way
from shared.draft_ahead import Pace
from shared.messages import Open, Opened, Verdict


class Pacing:
    """A pace that stays. What happens on the way is told to it and changes nothing."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    @property
    def pace(self) -> Pace | None:
        """In force now. None: the answer should go on as the cloud's own stream."""
        return self._pace

    def opened(self, opened: Opened, seconds: float) -> None:
        """A stream was opened, so long after it was asked for."""

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """The edge proposed so many tokens."""

    def sent(self, *, alone: bool) -> None:
        """A draft left; `alone` where no other was in flight."""

    def judged(self, verdict: Verdict) -> None:
        """A verdict came."""

    def streamed(self, num_tokens: int, *, last: bool) -> None:
        """Tokens of the cloud's own stream came."""

    def agreed(self, same: bool) -> None:
        """The edge's guess at a token of the cloud's stream, drafted along with it, was that token or not."""


STREAM_LOOK = 8
"""Tokens of the cloud's stream between two questions to the controller."""


class MeasuredPacing(Pacing):
    """Asks the controller, and tells it the times of one answer, on one stream after the other."""

    def __init__(
        self, controller: SpeedController, pace: Pace, request: Open, meet: Callable[[str], None]
    ) -> None:
        """
        Args:
            controller: of which an answer has begun.
            pace: its thresholds hold; length and window are the controller's.
            meet: takes the target's name, once it is known.
        """
        super().__init__(pace)
        self.controller = controller
        self._meet = meet
        self._prompt_bytes = sum(
            len(part.content.encode()) if not isinstance(part, int) else 3 for part in request.prompt
        )
        self._plan = controller.plan()
        self._stream = _Stream()

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def pace(self) -> Pace | None:
        plan = self._plan
        if plan.way is Way.CLOUD:
            return None
        window = plan.window_tokens if plan.way is Way.PROACTIVE else None
        return replace(self._pace, max_draft_tokens=plan.num_draft_tokens, max_in_flight_tokens=window)

    def opened(self, opened: Opened, seconds: float) -> None:
        self._stream = _Stream()
        self._meet(opened.model)
        # Both ends' prompts travel: the text there, its tokens back.
        self.controller.observe_transfer(self._prompt_bytes + 3 * len(opened.prompt_token_ids), seconds)
        self.controller.limit_drafts(opened.max_draft_tokens)

    def drafted(self, num_tokens: int, seconds: float) -> None:
        # The first proposal of a stream may have read the prompt.
        if self._stream.has_drafted:
            self.controller.observe_draft(num_tokens, seconds)
        self._stream.has_drafted = True

    def sent(self, *, alone: bool) -> None:
        if alone:
            self._stream.sent_at = time.monotonic()
        self._plan = self.controller.plan()

    def judged(self, verdict: Verdict) -> None:
        now, stream, timings = time.monotonic(), self._stream, verdict.timings
        computing_s = (timings.queue_us + timings.verify_us) / 1e6
        travelled = stream.has_verdict and stream.sent_at is not None
        self.controller.observe_round(
            verdict.num_scored,
            verdict.num_accepted,
            gave_token=verdict.next_token is not None,
            # The first round of a stream may wait for a slot, and reads what the cloud has not cached.
            verify_s=timings.verify_us / 1e6 if stream.has_verdict and timings.verify_us else None,
            elapsed_s=now - stream.last_at,
            round_trip_s=max(0.0, now - (stream.sent_at or now) - computing_s) if travelled else None,
        )
        self._stream = replace(stream, has_verdict=True, sent_at=None, last_at=now)
        if verdict.stream_instead:
            self.controller.leave_drafts()
        self._plan = self.controller.plan()

    def streamed(self, num_tokens: int, *, last: bool) -> None:
        now, stream = time.monotonic(), self._stream
        if not stream.num_streamed:  # the first comes with the round trip, and with the prompt's reading
            self._stream = replace(stream, num_streamed=num_tokens, last_at=now)
            return
        stream.num_looked += num_tokens
        if stream.num_looked >= STREAM_LOOK or last:
            self.controller.observe_stream(stream.num_looked, now - stream.last_at)
            self._stream = replace(stream, num_looked=0, last_at=now)
            self._plan = self.controller.plan()

    def agreed(self, same: bool) -> None:
        self.controller.observe_agreement([same])


@dataclass(slots=True)
class _Stream:
    """What is remembered of the stream that runs; times are of the monotonic clock."""

    has_drafted: bool = False
    has_verdict: bool = False
    sent_at: float | None = None
    """When a draft left with no other in flight; None once its verdict is here."""
    last_at: float = field(default_factory=time.monotonic)
    """Of the last verdict, or the last look at the cloud's tokens."""
    num_streamed: int = 0
    """Tokens that came first."""
    num_looked: int = 0
    """Tokens since the last look."""
