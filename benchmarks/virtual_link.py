"""An edge, a link and a cloud on a virtual clock: real sessions and controller, recorded models.

The state machines of `shared.session` exchange real messages, `shared.draft_ahead` decides about drafts; what
the models would say is recorded (`benchmarks.recorded`), and how long drafting, passes and messages take
comes from a `World`. Not modelled: reading the prompt, which costs every way the same; bandwidth, since
messages are tens of bytes; and our own code.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.recorded import VOCABULARY_SIZE, Answer, propose, target_id
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from shared.controller import EVERY_WAY, Choices, Plan, SpeedController, Way
from shared.draft_ahead import DraftAhead, Pace, Wanted
from shared.drafts import Proposal
from shared.messages import Draft, Opened, Timings, Tokens, Verdict
from shared.sampling import Sampling
from shared.session import CloudSession, EdgeSession

STREAM_LOOK = 8
"""Tokens of the cloud's stream between two questions to the controller."""


@dataclass(frozen=True, slots=True)
class World:
    """What everything costs, seconds."""

    t_draft: float
    t_step: float
    """The target's own step."""
    rtt: float
    verify: Callable[[int], float]
    """A pass over so many draft tokens and the one after them."""


@dataclass(slots=True)
class Outcome:
    """One answer, or the sum over several."""

    num_tokens: int = 0
    seconds: float = 0.0
    first_token_s: float = 0.0
    num_passes: int = 0
    num_bytes: int = 0
    num_answers: int = 0

    def add(self, other: Outcome) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class Clock:
    """Runs what is due, in order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), work))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now, _, work = heapq.heappop(self._due)
            work()


class Cloud:
    """The cloud's session and a target that takes its time: a pass at once where one is due."""

    def __init__(self, clock: Clock, world: World, committed: Sequence[int], max_tokens: int) -> None:
        self._clock = clock
        self._world = world
        self._passing = False
        self.session = CloudSession(
            committed=committed,
            max_tokens=max_tokens,
            max_draft_tokens=64,
            end_token_ids=frozenset(),
            legal_token_ids=range(VOCABULARY_SIZE),
        )

    def receive(self, draft: Draft, answer: Callable[[Verdict], None]) -> None:
        self.session.receive(draft)
        self._pass(answer)

    def _pass(self, answer: Callable[[Verdict], None]) -> None:
        if self._passing or (round_ := self.session.next_round()) is None:
            return
        seconds = self._world.verify(len(round_.token_ids))
        self._passing = True

        def judged() -> None:
            self._passing = False
            wanted = [target_id(round_.start + i) for i in range(round_.num_positions)]
            answer(self.session.judge(round_, wanted, Timings(0, round(1e6 * seconds))))
            self._pass(answer)

        self._clock.after(seconds, judged)


@dataclass
class Speculation:
    """One answer, or its rest, by drafts. A verdict that comes meanwhile is seen when a proposal is made."""

    clock: Clock
    world: World
    answer: Answer
    committed: list[int]
    plan: Callable[[], Plan]
    controller: SpeedController | None
    outcome: Outcome
    left: bool = False
    """The plan turned to the cloud's stream."""
    _drafting: bool = False
    _sent_at: float | None = None
    """When the first of the drafts in flight left, so long as its verdict is due."""

    def run(self) -> list[int]:
        """Returns what is committed when the answer is whole or the plan left."""
        self.session = EdgeSession(self.committed)
        self.session.send_open()
        self.cloud = Cloud(self.clock, self.world, self.committed, len(self.answer))
        self._last_verdict_at = self.clock.now
        self.clock.after(self.world.rtt, self._opened)
        self.clock.run(lambda: self.left or len(self.session.committed) >= len(self.answer))
        self.outcome.num_passes += self.cloud.session.num_rounds
        return self.session.committed

    def _opened(self) -> None:
        opened = Opened(
            model="recorded",
            prompt_token_ids=(),
            end_token_ids=frozenset(),
            sampling=Sampling(),
            max_tokens=len(self.answer),
            max_draft_tokens=64,
            vocabulary_sha256="",
        )
        self.session.receive_opened(opened)
        if self.controller is not None:
            self.controller.observe_round_trip(self.world.rtt)
        plan = self.plan()
        self.ahead = DraftAhead(self.session, opened, pace_of(plan))
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.left = plan.way is Way.CLOUD
        if self.left:
            return
        self.ahead.pace = pace_of(plan)
        alone = not self.session.num_in_flight
        if (draft := self.ahead.next_draft()) is not None:
            self._send(draft, alone=alone)
            self._follow(self.plan())
        elif not self._drafting:
            step = 1 if plan.way is Way.PROACTIVE else plan.num_draft_tokens
            if (wanted := self.ahead.wanted(step)) is not None:
                self._drafting = True
                proposals = propose(self.answer, wanted.text_ids, wanted.num_tokens, wanted.stop)
                seconds = self.world.t_draft * max(len(proposals), 1)
                self.clock.after(seconds, lambda: self._proposed(wanted, proposals, seconds))

    def _proposed(self, wanted: Wanted, proposals: list[Proposal], seconds: float) -> None:
        self._drafting = False
        if self.left:  # what was under way comes to an end, and nothing follows
            return
        if self.controller is not None:
            self.controller.observe_draft(len(proposals), seconds)
        self.ahead.add(wanted, proposals)
        self._follow(self.plan())

    def _send(self, draft: Draft, *, alone: bool) -> None:
        if alone:
            self._sent_at = self.clock.now
        self.outcome.num_bytes += pb2.SpeculateRequest(draft=wire.encode_draft(draft)).ByteSize()
        self.clock.after(self.world.rtt / 2, lambda: self.cloud.receive(draft, self._verdict))

    def _verdict(self, verdict: Verdict) -> None:
        self.outcome.num_bytes += pb2.SpeculateResponse(verdict=wire.encode_verdict(verdict)).ByteSize()
        self.clock.after(self.world.rtt / 2, lambda: self._judged(verdict))

    def _judged(self, verdict: Verdict) -> None:
        if self.left:
            return
        commit = self.ahead.receive(verdict)
        if not self.outcome.first_token_s and commit.token_ids:
            self.outcome.first_token_s = self.clock.now
        if self.controller is not None:
            verify_s = verdict.timings.verify_us / 1e6
            sent_at, self._sent_at = self._sent_at, None
            self.controller.observe_round(
                verdict.num_scored,
                verdict.num_accepted,
                gave_token=verdict.next_token is not None,
                verify_s=verify_s,
                elapsed_s=self.clock.now - self._last_verdict_at,
                round_trip_s=None if sent_at is None else self.clock.now - sent_at - verify_s,
            )
        self._last_verdict_at = self.clock.now
        self._follow(self.plan())


def pace_of(plan: Plan) -> Pace:
    """Of a plan that drafts."""
    window = plan.window_tokens if plan.way is Way.PROACTIVE else None
    return Pace(max_draft_tokens=max(plan.num_draft_tokens, 1), max_in_flight_tokens=window)


def run_fixed(world: World, answer: Answer, plan: Plan) -> Outcome:
    """One answer by one plan."""
    return _Answer(world, answer, lambda: plan, None).run()


def run_auto(
    world: World, answer: Answer, controller: SpeedController, choices: Choices = EVERY_WAY
) -> Outcome:
    """One answer as the controller says."""
    controller.begin_stream(choices=choices)
    return _Answer(world, answer, controller.plan, controller).run()


def run_server_side(world: World, answer: Answer, num_draft_tokens: int) -> Outcome:
    """Draft and target both at the cloud: stop and wait without a link between them, the result streamed."""
    plan = Plan(Way.STOP_AND_WAIT, num_draft_tokens, num_draft_tokens, None, "fixed")
    outcome = run_fixed(replace(world, rtt=0.0), answer, plan)
    outcome.seconds += world.rtt
    outcome.first_token_s += world.rtt
    outcome.num_bytes = len(answer) * _tokens_bytes(0)
    return outcome


@dataclass
class _Answer:
    """One answer, one way after the other."""

    world: World
    answer: Answer
    plan: Callable[[], Plan]
    controller: SpeedController | None

    def run(self) -> Outcome:
        clock = Clock()
        outcome = Outcome(num_tokens=len(self.answer), num_answers=1)
        committed: list[int] = []
        while len(committed) < len(self.answer):
            if self.plan().way is Way.CLOUD:
                committed = self._stream(clock, committed, outcome)
            else:
                committed = Speculation(
                    clock, self.world, self.answer, committed, self.plan, self.controller, outcome
                ).run()
        assert committed == [target_id(i) for i in range(len(self.answer))]
        outcome.seconds = clock.now
        return outcome

    def _stream(self, clock: Clock, committed: list[int], outcome: Outcome) -> list[int]:
        """Tokens of the cloud's stream, until the answer is whole or the plan leaves."""
        clock.now += self.world.rtt
        if self.controller is not None:
            self.controller.observe_round_trip(self.world.rtt)
        began, first = clock.now, len(committed)
        while len(committed) < len(self.answer):
            clock.now += self.world.t_step
            outcome.first_token_s = outcome.first_token_s or clock.now
            outcome.num_passes += 1
            outcome.num_bytes += _tokens_bytes(len(committed))
            committed.append(target_id(len(committed)))
            if self.controller is not None:
                self._look(clock, began, first, len(committed))
            if len(committed) - first >= STREAM_LOOK and self.plan().way is not Way.CLOUD:
                break
        return committed

    def _look(self, clock: Clock, began: float, first: int, position: int) -> None:
        assert self.controller is not None
        num = position - first
        # Asked to, the edge drafts along where it keeps up; each token is compared with what came.
        if self.controller.wants_agreement and num * self.world.t_draft <= clock.now - began:
            self.controller.observe_draft(1, self.world.t_draft)
            self.controller.observe_agreement([self.answer[position - 1].agrees])
        if num % STREAM_LOOK == 0 or position == len(self.answer):
            looked = num % STREAM_LOOK or STREAM_LOOK
            # Counted from the token before, since the first comes with the round trip.
            self.controller.observe_stream(looked, looked * self.world.t_step)


def _tokens_bytes(position: int) -> int:
    message = Tokens(position, (target_id(position),), (b"word",))
    return pb2.GenerateResponse(tokens=wire.encode_tokens(message)).ByteSize()
