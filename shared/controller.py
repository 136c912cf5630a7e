"""The speed controller: which way gets the target's own answer soonest, and with which drafts.

Three ways give the same text, because every token is the target's: its own stream (`Way.CLOUD`),
speculation that waits for each verdict, and speculation that drafts on while verdicts travel. The
controller measures what each costs here and now, predicts tokens per second of each (`shared.speed`),
takes the best, and says why. It never chooses `local`, which is another model's answer.

No clock and no I/O: durations are passed in, each `observe_...` says which. One controller serves one
edge model, link and target, over one stream after the other; what it learned stays, and `state` is all of
it. `Choices` says what it may choose from: what the user set is not chosen.

- *Times* are weighted medians of recent observations: an outlier moves nothing, a lasting change wins
  within five.
- *The target's speed* is one scale times a learned shape (a pass over K tokens; a token of the stream), so
  that a target that slows down is noticed in every way at once.
- *The link* is a round trip, and a time per byte that is seen where a long prompt travels.
- *Acceptance* is a chance of rejection by position since the last rollback, each position leaning on the one
  before it; a window of recent tokens that cannot come from it makes the controller forget.
- *Probes* of another way happen at the start of a stream only, where changing is cheapest, and
  together may lose at most PROBE_SHARE of the time and of the tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shared.speed import MAX_RUN, Runs, proactive_rate, stop_and_wait_rate

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Those that are compared, as far as the cloud takes them."""
NARROW_WINDOWS = (2, 3)
"""Drafts in flight at most, where a long pass costs; else more than fit in the time until a verdict comes."""
MAX_WINDOW_TOKENS = 64
PROBE_SHARE = 0.005
"""Of the time, and of the tokens, that may go into trying ways other than the best."""
PROBE_TOKENS = 8
"""Of the cloud's stream, when it is tried."""
WARM_UP_DRAFTS = (4, 2, 16, 8)
"""Lengths of the first rounds: what a pass costs shows only at several lengths. The first two always, those
after them where they may pay.
"""
CLEAR = 0.7
"""A way that promises less than this share of the best is not watched more closely."""
ENOUGH_TOKENS = 100
"""Draft tokens whose fate was seen, before a way counts as clearly slower."""
HOPE = 1.25
"""By so much may drafts do better than the first few rounds say."""
USUAL_TOKENS = 64
"""Of an answer, before any was seen."""
CROSSING_MARGIN = 0.05
"""So much sooner, as a share, must the rest of an answer end to leave the stream for drafts or drafts for the
stream in its middle: what is known of acceptance is no surer than that, and each crossing costs.
"""
PLAN_EVERY = 4
"""Observations between two predictions; in between the plan stands."""
LONG_BYTES = 2_000
"""Messages from so many on tell how long a byte takes."""
_BYTES_PER_DRAFT_TOKEN = 3


class Way(str, Enum):
    CLOUD = "cloud"
    STOP_AND_WAIT = "stop_and_wait"
    PROACTIVE = "proactive"


DRAFTING = frozenset({Way.STOP_AND_WAIT, Way.PROACTIVE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be chosen from; settings of the user narrow it."""

    ways: frozenset[Way] = frozenset(Way)
    draft_lengths: tuple[int, ...] = DRAFT_LENGTHS
    """Ascending."""
    window_tokens: int | None = None
    """The only window of proactive speculation; None leaves it open."""

    def __post_init__(self) -> None:
        if not self.ways or not self.draft_lengths or self.draft_lengths[0] < 1:
            raise ValueError("nothing is left to choose from")
        if self.window_tokens is not None and self.window_tokens < 1:
            raise ValueError(f"a window must hold 1 token or more, got {self.window_tokens}")

    def up_to(self, max_draft_tokens: int) -> Choices:
        """The same for a cloud that takes no longer drafts."""
        lengths = tuple(g for g in self.draft_lengths if g <= max_draft_tokens) or (max_draft_tokens,)
        return replace(self, draft_lengths=lengths)

    def without_stream(self) -> Choices:
        return replace(self, ways=self.ways & DRAFTING)

    @property
    def only(self) -> tuple[Way, int, int] | None:
        """Way, draft length and window where there is no choice."""
        if len(self.ways) > 1:
            return None
        [way] = self.ways
        if way is Way.CLOUD:
            return way, 0, 0
        if len(self.draft_lengths) > 1:
            return None
        [length] = self.draft_lengths
        if way is Way.STOP_AND_WAIT:
            return way, length, length
        return None if self.window_tokens is None else (way, length, self.window_tokens)


EVERY_WAY = Choices()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until the next plan."""

    way: Way
    num_draft_tokens: int
    """Per draft message; 0 in the cloud's stream."""
    window_tokens: int
    """Draft tokens in flight at most."""
    tokens_per_s: float | None
    """Predicted; None while too little was seen."""
    why: str
    """`warm-up`, `probe`, `best`, `kept` (another is not enough better to change) or `set` (by the user)."""

    def __str__(self) -> str:
        return _in_words(self.way, self.num_draft_tokens, self.window_tokens)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan, and the position of the completion from which it held."""

    plan: Plan
    position: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The best that a way can do."""

    way: Way
    num_draft_tokens: int
    window_tokens: int
    tokens_per_s: float

    def __str__(self) -> str:
        return _in_words(self.way, self.num_draft_tokens, self.window_tokens)


def _in_words(way: Way, num_draft_tokens: int, window_tokens: int) -> str:
    if way is Way.CLOUD:
        return "the cloud's own stream"
    if way is Way.STOP_AND_WAIT:
        return f"stop-and-wait with drafts of {num_draft_tokens}"
    return f"proactive speculation with drafts of {num_draft_tokens}, {window_tokens} in flight"


_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_POSITION_BINS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, MAX_RUN)
"""Positions of a run up to each share what is seen at them."""
_Weights = Annotated[tuple[_Weight, ...], Field(min_length=11, max_length=11)]


class SpeedState(BaseModel):
    """All that a controller has learned, to be kept between processes. Numbers only, no text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    draft_s: tuple[_Seconds, ...] = ()
    round_trip_s: tuple[_Seconds, ...] = ()
    byte_s: tuple[_Seconds, ...] = ()
    scale_s: tuple[_Seconds, ...] = ()
    shape: dict[_Count, _Weight] = {}
    shape_seen: dict[_Count, _Count] = {}
    stream: _Weight | None = None
    stream_seen: _Count = 0
    trials: _Weights = (0.0,) * len(_POSITION_BINS)
    rejections: _Weights = (0.0,) * len(_POSITION_BINS)
    ends: _Weights = (0.0,) * len(_POSITION_BINS)
    answer_tokens: tuple[_Weight, ...] = ()
    elapsed_s: _Seconds = 0.0
    probed_s: _Seconds = 0.0
    num_tokens: _Count = 0
    num_probed: _Count = 0
    num_warm_up_rounds: _Count = 0


NOTHING_LEARNED = SpeedState()


class Recent:
    """A median of what was seen lately, the newest weighing most: half of the weight is on five values."""

    _KEEP = 0.87
    _SIZE = 16

    def __init__(self, values: Sequence[float] = ()) -> None:
        """
        Args:
            values: newest first.
        """
        self._values: deque[float] = deque(values, maxlen=self._SIZE)
        self.value: float | None = None
        self._find()

    @property
    def values(self) -> tuple[float, ...]:
        """Newest first."""
        return tuple(self._values)

    def add(self, value: float) -> None:
        self._values.appendleft(value)
        self._find()

    def _find(self) -> None:
        weight, weighted, total = 1.0, [], 0.0
        for each in self._values:
            weighted.append((each, weight))
            total += weight
            weight *= self._KEEP
        weighted.sort()
        below = 0.0
        for each, weight in weighted:
            below += weight
            if below >= total / 2:
                self.value = each
                return


class TargetSpeed:
    """Seconds of a pass over K draft tokens, and of a token of the target's stream: scale x shape.

    The first observations of a K say what is particular to it, later ones say how fast the target is now.
    Between lengths that were seen the shape is a straight line, as it is beyond them.
    """

    _TO_LEARN = 2

    def __init__(self, state: SpeedState = NOTHING_LEARNED) -> None:
        self._scale = Recent(state.scale_s)
        self._shape = dict(state.shape)
        self._seen = dict(state.shape_seen)
        self._stream = state.stream
        self._stream_seen = state.stream_seen

    def state(self) -> dict[str, object]:
        return {
            "scale_s": self._scale.values,
            "shape": dict(self._shape),
            "shape_seen": dict(self._seen),
            "stream": self._stream,
            "stream_seen": self._stream_seen,
        }

    def observe_pass(self, num_tokens: int, seconds: float) -> None:
        if self._scale.value is None:
            self._scale.add(seconds)
        scale = self._now
        seen = self._seen.get(num_tokens, 0)
        self._seen[num_tokens] = seen + 1
        if seen < self._TO_LEARN:
            shape = self._shape.get(num_tokens, inf)
            # Nothing makes a pass shorter than it is, so of two first looks the shorter is the better.
            self._shape[num_tokens] = min(shape, seconds / scale)
            return
        # The scale follows at once; the shape goes on learning, slowly, from what the scale does not explain.
        self._scale.add(seconds / self._shape[num_tokens])
        unexplained = seconds / (self._now * self._shape[num_tokens])
        self._shape[num_tokens] *= min(max(unexplained, 0.8), 1.25) ** 0.02

    def observe_stream(self, seconds_per_token: float) -> None:
        if self._scale.value is None:
            self._scale.add(seconds_per_token)
        self._stream_seen += 1
        if self._stream is None:
            self._stream = seconds_per_token / self._now
        elif self._stream_seen <= self._TO_LEARN:
            self._stream = min(self._stream, seconds_per_token / self._now)
        else:
            self._scale.add(seconds_per_token / self._stream)

    @property
    def _now(self) -> float:
        assert self._scale.value is not None
        return self._scale.value

    @property
    def num_lengths(self) -> int:
        """How many draft lengths' passes were seen."""
        return len(self._shape)

    @property
    def longest(self) -> int:
        """The longest draft whose pass was seen."""
        return max(self._shape)

    @property
    def stream(self) -> float | None:
        """Seconds of a token of the target's own stream; None before one was seen."""
        return None if self._stream is None else self._now * self._stream

    def verify(self, num_tokens: int) -> float:
        """Seconds of a pass over so many draft tokens, and of the token after them."""
        known = sorted(self._shape)
        if len(known) == 1:
            return self._now * self._shape[known[0]]
        right = min(max(bisect_left(known, num_tokens), 1), len(known) - 1)
        a, b = known[right - 1], known[right]
        slope = max(0.0, (self._shape[b] - self._shape[a]) / (b - a))
        return self._now * max(self._shape[a] + slope * (num_tokens - a), 0.1 * self._shape[a])


class Acceptance:
    """How long drafts last, by position since the last rollback.

    The end of an answer ends a run like a rejection does: its last verdict must be waited for. Short
    answers so have shorter runs than their acceptance says, and `runs` counts both.
    """

    _KEEP = 0.999
    """Per token: about 300 tokens are remembered."""
    _LEAN = 4.0
    """Tokens' worth of weight that a position takes over from the one before it."""
    _WINDOW = 24
    _SINCE_CHANGE = 8
    _SURPRISE = 5.0
    """Standard deviations."""

    def __init__(self, state: SpeedState = NOTHING_LEARNED) -> None:
        self._trials = list(state.trials)
        self._rejections = list(state.rejections)
        self._ends = list(state.ends)
        self._lately: deque[tuple[bool, float]] = deque(maxlen=self._WINDOW)
        self._at = {0: 1.0}
        """Position -> how probable it is: a bonus token hides whether the drafter was right there."""
        self._runs: Runs | None = None

    def state(self) -> dict[str, object]:
        return {
            "trials": tuple(self._trials),
            "rejections": tuple(self._rejections),
            "ends": tuple(self._ends),
        }

    def begin(self) -> None:
        """A stream begins; the one before ended where it stood."""
        for position, weight in self._at.items():
            if position:
                self._ends[self._bin(position - 1)] += weight
        self._at = {0: 1.0}
        self._runs = None

    def skip(self) -> None:
        """A position at which nothing was drafted: a bonus token. The run went on there, or it broke."""
        hazards = self._hazards(self._rejections)
        went_on = {p + 1: weight * (1.0 - hazards[self._bin(p)]) for p, weight in self._at.items()}
        self._at = {0: 1.0 - sum(went_on.values()), **went_on}

    def observe(self, accepted: bool) -> None:
        hazards = self._hazards(self._rejections)
        for counts in (self._trials, self._rejections, self._ends):
            for i in range(len(_POSITION_BINS)):
                counts[i] *= self._KEEP
        expected = 0.0
        stands = {}
        for position, weight in self._at.items():
            at = self._bin(position)
            expected += weight * hazards[at]
            self._trials[at] += weight
            self._rejections[at] += weight * (not accepted)
            stands[position + 1] = weight * (1.0 - hazards[at])
        total = sum(stands.values())
        likely = {p: weight / total for p, weight in stands.items() if weight > 0.01 * total}
        self._at = likely if accepted else {0: 1.0}
        self._runs = None
        self._lately.append((accepted, expected))
        if self._is_surprised():
            self._forget()

    @property
    def rate(self) -> float:
        """alpha-hat: accepted / (accepted + rejected)."""
        return 1.0 - (sum(self._rejections) + 1.0) / (sum(self._trials) + 5.0)

    @property
    def num_seen(self) -> float:
        """Draft tokens that this rests on; old ones count less."""
        return sum(self._trials)

    @property
    def runs(self) -> Runs:
        if self._runs is None:
            hazards = self._hazards([r + e for r, e in zip(self._rejections, self._ends, strict=True)])
            ended, rejected = sum(self._ends), sum(self._rejections)
            self._runs = Runs.from_hazards(
                [hazards[self._bin(i)] for i in range(MAX_RUN)], ended / (ended + rejected + 1.0)
            )
        return self._runs

    def _bin(self, position: int) -> int:
        return min(bisect_left(_POSITION_BINS, position + 1), len(_POSITION_BINS) - 1)

    def _hazards(self, events: Sequence[float]) -> list[float]:
        """Chance of an event at a position of each bin; positions seldom reached lean on the one before."""
        leaned, found = 1.0 - self.rate, []
        for trials, num_events in zip(self._trials, events, strict=True):
            leaned = (num_events + self._LEAN * leaned) / (max(trials, num_events) + self._LEAN)
            found.append(leaned)
        return found

    def _is_surprised(self) -> bool:
        if len(self._lately) < self._WINDOW:
            return False
        rejected = sum(not accepted for accepted, _ in self._lately)
        expected = sum(hazard for _, hazard in self._lately)
        variance = sum(hazard * (1.0 - hazard) for _, hazard in self._lately)
        return (rejected - expected) ** 2 > self._SURPRISE**2 * max(variance, 1.0)

    def _forget(self) -> None:
        """Keep of the past only what the last few tokens say: the change came within the window."""
        last = list(self._lately)[-self._SINCE_CHANGE :]
        rejected = sum(not accepted for accepted, _ in last)
        for i in range(len(_POSITION_BINS)):
            self._trials[i] *= 0.05
            self._rejections[i] *= 0.05
            self._ends[i] *= 0.05
        self._trials[0] += len(last)
        self._rejections[0] += rejected
        self._lately.clear()


class SpeedController:
    """Measures, predicts, chooses, explains."""

    def __init__(self, state: SpeedState = NOTHING_LEARNED, *, margin: float = 0.01) -> None:
        """
        Args:
            state: of an earlier controller of the same edge model, link and target.
            margin: a way must promise so much more, as a share, to be changed to.
        Raises:
            ValueError: out of range.
        """
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"margin {margin} out of range")
        self._margin = margin
        self._choices = EVERY_WAY
        self._stream_way: Way | None = None
        """The way of this stream so far; None at its start."""
        self._predicted_tokens: int | None = None
        self._begin_with(state)

    def _begin_with(self, state: SpeedState) -> None:
        self._t_draft = Recent(state.draft_s)
        self._rtt = Recent(state.round_trip_s)
        self._byte_s = Recent(state.byte_s)
        self._target = TargetSpeed(state)
        self._acceptance = Acceptance(state)
        self._elapsed_s, self._probed_s = state.elapsed_s, state.probed_s
        self._num_tokens, self._num_probed = state.num_tokens, state.num_probed
        self._num_observed = self._planned_at = 0
        self._num_warm_up_rounds = state.num_warm_up_rounds
        self._plan: Plan | None = None
        self._answer_tokens = Recent(state.answer_tokens)
        self._num_stream_tokens = 0
        self._probe_left = 0
        self._forecasts: list[Forecast] = []

    def state(self) -> SpeedState:
        """All that was learned; a stream that runs is left out of account."""
        return SpeedState.model_validate(
            {
                **self._target.state(),
                **self._acceptance.state(),
                "draft_s": self._t_draft.values,
                "round_trip_s": self._rtt.values,
                "byte_s": self._byte_s.values,
                "answer_tokens": self._answer_tokens.values,
                "elapsed_s": self._elapsed_s,
                "probed_s": self._probed_s,
                "num_tokens": self._num_tokens,
                "num_probed": self._num_probed,
                "num_warm_up_rounds": self._num_warm_up_rounds,
            }
        )

    def forget(self) -> None:
        """It is another target: learn anew, in the middle of a stream too."""
        self._begin_with(NOTHING_LEARNED)

    def begin_stream(self, predicted_tokens: int | None = None, choices: Choices = EVERY_WAY) -> None:
        """An answer begins.

        Args:
            predicted_tokens: what the router expects of it; unset, as many as recent answers had.
        """
        self.end_stream()
        self._predicted_tokens = predicted_tokens
        self._choices = choices
        self._stream_way = None
        self._consider_probe()

    def end_stream(self) -> None:
        """The answer ended, or broke off."""
        if self._num_stream_tokens:
            self._answer_tokens.add(self._num_stream_tokens)
        self._num_stream_tokens = 0
        self._acceptance.begin()

    def leave_drafts(self) -> None:
        """The cloud would rather write the rest of this answer alone; it may, if its stream may be chosen."""
        if Way.CLOUD in self._choices.ways:
            self._choices = replace(self._choices, ways=frozenset({Way.CLOUD}))
            self._stream_way = None

    def limit_drafts(self, max_draft_tokens: int) -> None:
        """The cloud takes no longer drafts, >= 1."""
        self._choices = self._choices.up_to(max_draft_tokens)

    def observe_round_trip(self, seconds: float) -> None:
        """Of a message and its answer, without the time to compute it."""
        self._rtt.add(_positive("seconds", seconds))

    def observe_transfer(self, num_bytes: int, seconds: float) -> None:
        """From Open to Opened: so many bytes there and back, and next to nothing computed in between.

        A short prompt tells the round trip, a long one what its length takes beside that.
        """
        if self._rtt.value is None or num_bytes < LONG_BYTES:
            self.observe_round_trip(seconds)
        else:
            self._byte_s.add(max(0.0, _positive("seconds", seconds) - self._rtt.value) / num_bytes)

    def observe_draft(self, num_tokens: int, seconds: float) -> None:
        """The edge drafted so many tokens in so long."""
        if num_tokens:
            self._t_draft.add(_positive("seconds", seconds) / num_tokens)

    def observe_stream(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of the cloud's stream came in so long; its first token is not counted."""
        if not num_tokens:
            return
        self._target.observe_stream(_positive("seconds", seconds) / num_tokens)
        self._count(num_tokens, seconds)

    def observe_agreement(self, agreed: Sequence[bool]) -> None:
        """The edge drafted along with the cloud's stream: whether its token was the target's, one by one."""
        for each in agreed:
            self._acceptance.observe(each)

    def observe_round(
        self,
        num_scored: int,
        num_accepted: int,
        *,
        gave_token: bool,
        verify_s: float | None,
        elapsed_s: float,
        round_trip_s: float | None = None,
    ) -> None:
        """A verdict came.

        Args:
            gave_token: with a correction or a bonus.
            verify_s: the target's pass, as the verdict says; None where it did more than this, as the first
                of a stream, which reads the prompt.
            elapsed_s: since the verdict before, or since the stream began.
            round_trip_s: from sending the draft to its verdict, less queue and pass; None where the draft
                may have waited for an earlier pass, which cannot be told apart from the link.
        """
        if verify_s is not None:
            self._target.observe_pass(num_scored, _positive("verify_s", verify_s))
        if round_trip_s is not None:
            self.observe_round_trip(round_trip_s)
        for _ in range(num_accepted):
            self._acceptance.observe(True)
        if num_accepted < num_scored:
            self._acceptance.observe(False)
        elif gave_token:
            self._acceptance.skip()
        if verify_s is not None and self._plan is not None and self._plan.why == "warm-up":
            self._num_warm_up_rounds += 1
        self._count(num_accepted + gave_token, elapsed_s)

    @property
    def wants_agreement(self) -> bool:
        """Whether drafting along with the cloud's stream would tell something: the choice is not clear."""
        rival = self._rival()
        if rival is None or self._acceptance.num_seen < ENOUGH_TOKENS:
            return True
        return rival.tokens_per_s > CLEAR * self._forecasts[0].tokens_per_s

    def plan(self) -> Plan:
        """What to do next. Ask before each draft, and every few tokens of a stream."""
        if self._plan is not None and self._stream_way is not None and not self._is_due():
            return self._plan
        self._planned_at = self._num_observed
        self._plan = self._set() or self._warm_up() or self._probe() or self._best()
        self._stream_way = self._plan.way
        return self._plan

    def forecasts(self) -> list[Forecast]:
        """What each way can do by what was measured, the first to end first; none for ways not measured."""
        found: list[Forecast] = []
        ways = self._choices.ways
        if (step := self._target.stream) is not None and Way.CLOUD in ways:
            found.append(Forecast(Way.CLOUD, 0, 0, 1.0 / step))
        t_draft, rtt = self._t_draft.value, self._rtt.value
        if t_draft is not None and rtt is not None and self._knows_passes:
            if Way.STOP_AND_WAIT in ways:
                found.append(max(self._waiting(t_draft, rtt), key=_rate))
            if Way.PROACTIVE in ways:
                found.append(max(self._going_on(t_draft, rtt), key=_rate))
        return sorted(found, key=self._answer_s)

    def measured(self) -> dict[str, object]:
        """What was measured, for a program; times in milliseconds, None where nothing was seen."""
        target, byte_s = self._target, self._byte_s.value
        return {
            "draft_ms": _ms(self._t_draft.value),
            "round_trip_ms": _ms(self._rtt.value),
            "mbit_per_s": round(8e-6 / byte_s, 3) if byte_s else None,
            "stream_ms": _ms(target.stream),
            "verify_ms": {k: _ms(target.verify(k)) for k in (1, 4, 8, 16)} if target.num_lengths else {},
            "acceptance_rate": round(self._acceptance.rate, 3),
            "tokens_per_s": {each.way.value: round(each.tokens_per_s, 2) for each in self.forecasts()},
        }

    def explain(self) -> list[str]:
        """What was measured and what follows from it, for a person."""
        lines = []
        if (t_draft := self._t_draft.value) is not None:
            lines.append(f"drafting takes {1e3 * t_draft:.1f} ms a token")
        if (rtt := self._rtt.value) is not None:
            lines.append(f"a round trip takes {1e3 * rtt:.1f} ms")
        if self._byte_s.value:
            lines.append(f"the link carries {8e-6 / self._byte_s.value:.1f} Mbit/s")
        if self._target.num_lengths:
            passes = ", ".join(f"{1e3 * self._target.verify(k):.1f} ms for {k}" for k in (1, 4, 8, 16))
            lines.append(f"the target checks drafts in one pass: {passes} tokens")
        if (step := self._target.stream) is not None:
            lines.append(f"the target's own stream takes {1e3 * step:.1f} ms a token")
        survival = ", ".join(f"{self._acceptance.runs.survival[n]:.2f}" for n in (1, 2, 4, 8, 16))
        lines.append(
            f"{self._acceptance.rate:.2f} of draft tokens agree;"
            f" drafts of 1, 2, 4, 8, 16 stand whole: {survival}"
        )
        lines += [f"{each} would give {each.tokens_per_s:.1f} tokens/s" for each in self.forecasts()]
        if self._plan is not None:
            lines.append(f"chosen: {self._plan} ({self._plan.why})")
        if self._elapsed_s:
            lines.append(f"trying other ways has cost {self._probed_s / self._elapsed_s:.1%} of the time")
        return lines

    def _count(self, num_tokens: int, seconds: float) -> None:
        self._num_observed += 1
        self._num_tokens += num_tokens
        self._num_stream_tokens += num_tokens
        self._elapsed_s += seconds
        if self._probe_left:
            self._probe_left = max(0, self._probe_left - max(num_tokens, 1))
            self._num_probed += num_tokens
            if self._forecasts:
                self._probed_s += max(0.0, seconds - num_tokens / self._forecasts[0].tokens_per_s)

    def _is_due(self) -> bool:
        assert self._plan is not None
        if self._plan.why in ("warm-up", "probe"):
            return True
        return self._num_observed - self._planned_at >= PLAN_EVERY

    @property
    def is_warm(self) -> bool:
        """Whether every way that may be chosen was measured."""
        return self._warm_up() is None

    @property
    def _knows_passes(self) -> bool:
        return self._target.num_lengths >= min(2, len(self._choices.draft_lengths))

    def _set(self) -> Plan | None:
        """The only plan that there is, where the user left no choice."""
        only = self._choices.only
        return None if only is None else Plan(*only, None, "set")

    def _warm_up(self) -> Plan | None:
        ways, lengths = self._choices.ways, self._choices.draft_lengths
        if self._target.stream is None and Way.CLOUD in ways:
            return Plan(Way.CLOUD, 0, 0, None, "warm-up")
        if ways == {Way.CLOUD}:
            return None
        num_rounds = self._num_warm_up_rounds
        if num_rounds >= len(WARM_UP_DRAFTS) and self._knows_passes:
            return None
        wanted = WARM_UP_DRAFTS[num_rounds % len(WARM_UP_DRAFTS)]
        length = min(lengths, key=lambda g: abs(g - wanted))
        if num_rounds >= 2 and self._knows_passes and not self._may_pay(length):
            return None
        if Way.STOP_AND_WAIT in ways:
            return Plan(Way.STOP_AND_WAIT, length, length, None, "warm-up")
        window = self._choices.window_tokens or 2 * length
        return Plan(Way.PROACTIVE, min(length, window), window, None, "warm-up")

    def _may_pay(self, num_draft_tokens: int) -> bool:
        """Whether drafts so long might be the fastest, if their pass cost no more than the longest seen."""
        t_draft, rtt = self._t_draft.value, self._rtt.value
        if t_draft is None or rtt is None:
            return True
        longest = self._target.longest
        hopeful = stop_and_wait_rate(
            self._acceptance.runs,
            num_draft_tokens,
            t_draft,
            lambda k: self._target.verify(min(k, longest)),
            rtt,
        )
        step = self._target.stream if Way.CLOUD in self._choices.ways else None
        known = [each.tokens_per_s for each in self._waiting(t_draft, rtt)]
        return HOPE * hopeful > max(*known, 1.0 / step if step else 0.0)

    def _probe(self) -> Plan | None:
        if not self._probe_left:
            return None
        if self._stream_way is not None and self._plan is not None and self._plan.why == "probe":
            return self._plan
        rival = self._rival()
        if rival is None:
            self._probe_left = 0
            return None
        return Plan(rival.way, rival.num_draft_tokens, rival.window_tokens, rival.tokens_per_s, "probe")

    def _consider_probe(self) -> None:
        """Try the other side, stream or drafts, where what it may lose is within the share."""
        self._probe_left = 0
        self._forecasts = self.forecasts()
        rival = self._rival()
        if rival is None or self._plan is None or self._plan.why == "warm-up":
            return
        loss = self._crossing_s() + PROBE_TOKENS * (
            1.0 / rival.tokens_per_s - 1.0 / self._forecasts[0].tokens_per_s
        )
        if (
            self._probed_s + loss <= PROBE_SHARE * self._elapsed_s
            and self._num_probed + PROBE_TOKENS <= PROBE_SHARE * self._num_tokens
        ):
            self._probe_left = PROBE_TOKENS
            self._probed_s += self._crossing_s()

    def _rival(self) -> Forecast | None:
        """The best of the side that the best way is not on."""
        if not self._forecasts:
            return None
        streams = self._forecasts[0].way is Way.CLOUD
        return next((each for each in self._forecasts if (each.way is Way.CLOUD) != streams), None)

    def _best(self) -> Plan:
        self._forecasts = self.forecasts()
        if not self._forecasts:  # a drafter that has proposed nothing so far
            length = self._choices.draft_lengths[0]
            return Plan(next(iter(self._choices.ways)), length, 2 * length, None, "best")
        best = self._forecasts[0]
        kept = self._kept()
        if kept is not None and not self._pays(kept, best):
            return Plan(kept.way, kept.num_draft_tokens, kept.window_tokens, kept.tokens_per_s, "kept")
        return Plan(best.way, best.num_draft_tokens, best.window_tokens, best.tokens_per_s, "best")

    def _kept(self) -> Forecast | None:
        """What the way in force can do."""
        way = self._plan.way if self._plan is not None else None
        return next((each for each in self._forecasts if each.way is way), None)

    def _pays(self, kept: Forecast, best: Forecast) -> bool:
        """Whether the rest of the answer would end sooner by the margin, what it costs to change included."""
        crosses = self._stream_way is not None and (best.way is Way.CLOUD) != (kept.way is Way.CLOUD)
        margin = CROSSING_MARGIN if crosses else self._margin
        return (1.0 + margin) * self._answer_s(best) < self._answer_s(kept)

    def _answer_s(self, forecast: Forecast) -> float:
        """Seconds for the rest of the answer."""
        usual = self._predicted_tokens or self._answer_tokens.value or USUAL_TOKENS
        # An answer that is longer than expected goes on for a while.
        left = max(usual - self._num_stream_tokens, self._num_stream_tokens / 2, USUAL_TOKENS / 4)
        seconds = left / forecast.tokens_per_s
        streams = forecast.way is Way.CLOUD
        if self._stream_way is None:
            # Drafts wait for Opened; the stream's first tokens come with it.
            return seconds if streams else seconds + (self._rtt.value or 0.0)
        return seconds if streams == (self._stream_way is Way.CLOUD) else seconds + self._crossing_s()

    def _crossing_s(self) -> float:
        """To resume the answer the other way: a round trip, and a pass over what the new stream reads."""
        pass_s = self._target.verify(1) if self._target.num_lengths else 0.0
        return (self._rtt.value or 0.0) + pass_s

    def _waiting(self, t_draft: float, rtt: float) -> list[Forecast]:
        runs, verify = self._acceptance.runs, self._target.verify
        return [
            Forecast(
                Way.STOP_AND_WAIT, g, g, stop_and_wait_rate(runs, g, t_draft, verify, self._travel(g, rtt))
            )
            for g in self._choices.draft_lengths
        ]

    def _going_on(self, t_draft: float, rtt: float) -> list[Forecast]:
        runs = self._acceptance.runs
        costs = {k: self._target.verify(k) for k in range(1, MAX_RUN + 1)}
        found = []
        for g in self._going_on_lengths():
            for window in self._windows(g, t_draft, costs[min(g, MAX_RUN)] + rtt):
                rate = proactive_rate(runs, g, window, t_draft, costs.__getitem__, self._travel(g, rtt))
                found.append(Forecast(Way.PROACTIVE, g, window, rate))
        return found

    def _going_on_lengths(self) -> set[int]:
        """A draft is never longer than a window that is set."""
        most = self._choices.window_tokens or MAX_RUN
        return {min(g, most) for g in self._choices.draft_lengths}

    def _windows(self, g: int, t_draft: float, until_verdict: float) -> set[int]:
        """Windows to compare at a draft length, tokens."""
        if self._choices.window_tokens is not None:
            return {self._choices.window_tokens}
        most = max(MAX_WINDOW_TOKENS // g, 2)
        ahead = min(int(until_verdict / (g * t_draft) + 0.5) + 2, most)
        return {g * n for n in (*NARROW_WINDOWS, ahead, min(2 * ahead, most)) if 2 <= n <= most}

    def _travel(self, num_draft_tokens: int, rtt: float) -> float:
        """A round trip of a draft that is so long."""
        return rtt + num_draft_tokens * _BYTES_PER_DRAFT_TOKEN * (self._byte_s.value or 0.0)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def _rate(forecast: Forecast) -> float:
    return forecast.tokens_per_s


def _positive(name: str, seconds: float) -> float:
    """Links deliver in bursts, but nothing takes no time. Raises ValueError for NaN and infinity."""
    if not abs(seconds) < inf:
        raise ValueError(f"{name} must be a number of seconds, got {seconds}")
    return max(seconds, 1e-6)
