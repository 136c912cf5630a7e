"""Whether a stream's drafts gain an engine more than they cost it, by what passes and rounds yield. Pure.

Past the point where they do not, streams go on without drafts (`stream_instead` in verdicts).
"""

from __future__ import annotations

import math

from cloud_service.scheduling import PassCost


class StreamRounds:
    """Means over a stream's latest rounds."""

    def __init__(self) -> None:
        self.num = 0
        self.drafted = self.made = self.waited_s = 0.0
        """Draft tokens of a round, tokens that came of it, the target's own with them, and its time from
        draft to verdict."""
        self.seconds = 0.0
        """Since the first round ended."""
        self._began = 0.0
        self._variance = 0.0

    def add(self, num_drafted: int, num_made: int, waited_s: float, now: float) -> None:
        """Take in a round, which ended now (seconds by any clock)."""
        if not self.num:
            self._began = now
        self.seconds = now - self._began
        self.num += 1
        weight = self._weight
        self.drafted += weight * (num_drafted - self.drafted)
        self.made += weight * (num_made - self.made)
        self.waited_s += weight * (waited_s - self.waited_s)
        self._variance += weight * ((num_made - self.made) ** 2 - self._variance)

    @property
    def error(self) -> float:
        """Standard error of `made`."""
        return math.sqrt(self._variance * self._weight / (2 - self._weight))

    @property
    def _weight(self) -> float:
        return max(_NEWEST, 1 / self.num)


class DraftValue:
    """Learns what an engine's passes cost and yield, and so which streams' drafts pay.

    A pass of n tokens takes base + per_token * n seconds. A plain stream makes a token in each pass. One that
    drafts K tokens makes tau of them, its acceptance length, the target's own counted in, within the r passes
    that pass from its draft to its verdict (its own, and those of others that it waits behind). So it gains
    tau - r tokens a round, and makes passes longer by the K + 1 - r tokens more that they compute for it. It
    pays while that is more than all streams together make in so long.
    """

    def __init__(self) -> None:
        # What a token costs does not change; it takes passes of very different lengths to see it.
        self._cost = PassCost(keep=0.999)
        self._made = self._seconds = 0.0
        self._pass_s = 0.0

    def observe(self, num_tokens: int, num_made: int, seconds: float) -> None:
        """A pass of so many tokens, from which so many came, took so long."""
        self._cost.observe(num_tokens, seconds)
        keep = math.exp(-seconds / _RECENT_S)
        self._made = keep * self._made + num_made
        self._seconds = keep * self._seconds + seconds
        self._pass_s += (seconds - self._pass_s) * (_NEWEST if self._pass_s else 1.0)

    def pays(self, rounds: StreamRounds) -> bool:
        """Whether a stream does right to draft; true where too little is known, or chance may be at work."""
        if rounds.num < _ROUNDS_TO_JUDGE or rounds.seconds < 2 * _RECENT_S:
            return True
        if (per_token := self._cost.per_token) is None or not self._seconds:
            return True
        passes = max(1.0, rounds.waited_s / self._pass_s)
        gained = rounds.made - passes
        lost = per_token * (rounds.drafted + 1 - passes) * self._made / self._seconds
        return gained + max(rounds.error, _LEAST_ERROR) >= lost


_NEWEST = 0.05
"""Weight of the newest round or pass in means."""
_RECENT_S = 0.5
"""For how long the engine's yield is remembered: a stream is judged by the load that it runs under."""
_ROUNDS_TO_JUDGE = 8
"""Rounds of a stream before its drafts are judged."""
_LEAST_ERROR = 0.1
"""Tokens: passes vary too."""
