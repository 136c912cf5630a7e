"""Both state machines wired head to head (h11's ConnectionPair), over a link that hypothesis abuses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.messages import Draft, Finished, FinishReason, Opened, Policy, Usage, Verdict
from shared.sampling import Sampling
from shared.session import Admission, CloudSession, CloudState, EdgeSession, EdgeState, Origin

END = 0
VOCABULARY = range(8)
MAX_DRAFT = 6


@dataclass
class World:
    """What the target would say, whatever anybody drafts, and how one stream is run."""

    target_text: tuple[int, ...]
    max_tokens: int

    @property
    def answer(self) -> tuple[int, ...]:
        text = tuple(self.target_at(i) for i in range(self.max_tokens))
        return text[: text.index(END) + 1] if END in text else text

    def target_at(self, position: int) -> int:
        return self.target_text[position] if position < len(self.target_text) else 1


def logprob(position: int, token: int) -> float:
    """What the target thinks of a token, whatever precedes it: 0 to -9 nats."""
    return -float((3 * position + 7 * token) % 10)


@dataclass
class Pair:
    """Two ends and the messages between them, which a schedule delivers in any way it likes."""

    world: World
    committed: tuple[int, ...] = ()
    rollback_threshold: float | None = None
    uplink: deque[Draft] = field(default_factory=deque)
    downlink: deque[Verdict | Finished] = field(default_factory=deque)
    answered: int = 0

    def __post_init__(self) -> None:
        self.edge = EdgeSession(self.committed)
        self.cloud = CloudSession(
            committed=self.committed,
            max_tokens=self.world.max_tokens,
            max_draft_tokens=MAX_DRAFT,
            end_token_ids=frozenset({END}),
            legal_token_ids=VOCABULARY,
            policy=Policy.LOSSLESS if self.rollback_threshold is None else Policy.BILD,
            rollback_threshold=self.rollback_threshold,
        )
        self.edge.send_open()
        self.edge.receive_opened(
            Opened(
                model="scripted",
                prompt_token_ids=(),
                end_token_ids=frozenset({END}),
                sampling=Sampling(),
                max_tokens=self.world.max_tokens,
                max_draft_tokens=MAX_DRAFT,
                vocabulary_sha256="",
            )
        )
        self._announce_finish()

    # One method for each thing that can happen next; each returns whether it could.

    def edge_drafts(self, num_tokens: int, wrong_at: int | None, more: bool) -> bool:
        if self.edge.state is not EdgeState.DRAFTING or self.edge.position >= self.world.max_tokens:
            return False
        if more and not num_tokens:
            return False
        start = self.edge.position
        num_tokens = min(num_tokens, self.world.max_tokens - start)
        tokens = [self.world.target_at(start + i) for i in range(num_tokens)]
        if wrong_at is not None and wrong_at < len(tokens):
            tokens[wrong_at] = (tokens[wrong_at] + 1) % len(VOCABULARY)
        self.uplink.append(self.edge.send_draft(tokens, more=more))
        return True

    def cloud_receives(self) -> bool:
        if not self.uplink:
            return False
        self.cloud.receive(self.uplink.popleft())
        return True

    def cloud_scores(self) -> bool:
        if (round_ := self.cloud.next_round()) is None:
            return False
        targets = [self.world.target_at(round_.start + i) for i in range(round_.num_positions)]
        logprobs = np.array([logprob(round_.start + i, token) for i, token in enumerate(round_.token_ids)])
        self.downlink.append(self.cloud.judge(round_, targets, logprobs=logprobs))
        self._announce_finish()
        return True

    def edge_receives(self) -> bool:
        if not self.downlink:
            return False
        message = self.downlink.popleft()
        before = tuple(self.edge.committed)
        if isinstance(message, Finished):
            self.edge.receive_finished(message)
        else:
            self.edge.receive_verdict(message)
        assert tuple(self.edge.committed[: len(before)]) == before, "committed text went backwards"
        return True

    def _announce_finish(self) -> None:
        if self.cloud.state is CloudState.DONE and self.cloud.finish_reason is not None:
            usage = Usage(0, len(self.cloud.committed), self.cloud.num_rounds, 0)
            self.downlink.append(Finished(self.cloud.finish_reason, usage))
            self.cloud.finish_reason = None

    def deliver_everything(self) -> None:
        while self.edge_receives() or self.cloud_receives() or self.cloud_scores():
            pass


worlds = st.builds(
    World,
    target_text=st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 40),
)
steps = st.tuples(
    st.sampled_from(["draft", "draft", "up", "up", "score", "down"]),
    st.integers(0, MAX_DRAFT),
    st.none() | st.integers(0, MAX_DRAFT - 1),
    st.booleans(),
)
schedules = st.lists(steps, max_size=60)


def play(pair: Pair, schedule) -> None:
    for action, num_tokens, wrong_at, more in schedule:
        if action == "draft":
            pair.edge_drafts(num_tokens, wrong_at, more)
        else:
            {"up": pair.cloud_receives, "score": pair.cloud_scores, "down": pair.edge_receives}[action]()


def finish(pair: Pair) -> None:
    """Let a fair scheduler run the stream to its end."""
    for _ in range(10 * pair.world.max_tokens + 10):
        pair.deliver_everything()
        if pair.edge.state is EdgeState.DONE:
            return
        assert (
            pair.edge_drafts(2, None, more=False)
            or pair.edge.state is EdgeState.WAITING
            or (
                # Everything up to the limit is in flight and promised more: the verdict is what is missing.
                pair.edge.num_in_flight
            )
        )
    raise AssertionError(f"both ends wait: edge {pair.edge.state}, cloud {pair.cloud.state}")


@given(worlds, schedules)
def test_any_interleaving_of_drafts_rounds_and_verdicts_commits_the_targets_own_text(world, schedule):
    pair = Pair(world)
    play(pair, schedule)
    assert tuple(pair.edge.committed) == world.answer[: len(pair.edge.committed)]
    finish(pair)
    assert tuple(pair.edge.committed) == tuple(pair.cloud.committed) == world.answer


@given(worlds, schedules)
def test_when_every_message_has_arrived_exactly_one_end_has_something_to_do(world, schedule):
    pair = Pair(world)
    play(pair, schedule)
    pair.deliver_everything()
    edge_owes = pair.edge.state is EdgeState.DRAFTING and pair.edge.position < world.max_tokens
    over = pair.edge.state is EdgeState.DONE
    assert edge_owes or over
    assert pair.cloud.state is (CloudState.DONE if over else CloudState.LISTENING)
    assert pair.edge.num_in_flight == 0, "a draft was neither answered nor voided"


@given(worlds, schedules)
def test_each_draft_is_answered_by_one_verdict_or_voided_by_a_higher_epoch(world, schedule):
    pair = Pair(world)
    answered = voided = drafted = 0
    for action, num_tokens, wrong_at, more in schedule:
        if action == "draft" and pair.edge_drafts(num_tokens, wrong_at, more):
            drafted += len(pair.uplink[-1].token_ids)
        elif action == "up" and pair.uplink:
            draft = pair.uplink.popleft()
            if pair.cloud.receive(draft) is Admission.VOID:
                assert draft.epoch < pair.cloud.epoch or pair.cloud.state is CloudState.DONE
                voided += len(draft.token_ids)
        elif action == "score":
            waiting = sum(len(d.token_ids) for d in pair.cloud._waiting)
            if pair.cloud_scores():
                verdict = next(m for m in reversed(pair.downlink) if isinstance(m, Verdict))
                answered += verdict.num_scored
                assert verdict.num_scored == waiting
        elif action == "down":
            pair.edge_receives()
    queued = sum(len(d.token_ids) for d in [*pair.uplink, *pair.cloud._waiting])
    # What is left over was waiting at the cloud in the moment its epoch ended.
    assert answered + voided + queued <= drafted


@given(worlds, schedules, st.data())
def test_a_resume_at_any_point_continues_the_same_text(world, schedule, data):
    pair = Pair(world)
    play(pair, schedule)
    shown = tuple(pair.edge.committed)
    resumed = Pair(world, committed=shown)
    finish(resumed)
    assert tuple(resumed.edge.committed) == world.answer
    assert resumed.edge.committed[: len(shown)] == list(shown)


@given(worlds, schedules, st.floats(0, 10, exclude_min=True))
def test_under_bild_both_ends_agree_and_each_token_is_likely_enough_or_the_targets_own(
    world, schedule, threshold
):
    pair = Pair(world, rollback_threshold=threshold)
    play(pair, schedule)
    finish(pair)
    assert pair.edge.committed == pair.cloud.committed
    assert pair.edge.state is EdgeState.DONE
    for position, token in enumerate(pair.edge.committed):
        assert -logprob(position, token) <= threshold or token == world.target_at(position)


@given(worlds, schedules)
def test_under_bild_with_next_to_no_threshold_the_text_differs_only_in_certainties(world, schedule):
    pair = Pair(world, rollback_threshold=1e-9)
    play(pair, schedule)
    finish(pair)
    for position, token in enumerate(pair.edge.committed):
        assert token == world.target_at(position) or logprob(position, token) == 0.0


faults = st.sampled_from(["repeat", "drop", "swap", "late repeat"])


@given(worlds, schedules, st.lists(st.tuples(st.integers(0, 59), st.booleans(), faults), max_size=6))
def test_a_faulty_link_never_changes_the_text_and_costs_at_most_a_resume(world, schedule, link_faults):
    """Repeated, late, reordered and dropped messages: an error and a resume at worst."""
    pair = Pair(world)
    by_step = {step: (up, fault) for step, up, fault in link_faults}
    old: list[tuple[bool, object]] = []
    try:
        for i, step in enumerate(schedule):
            if i in by_step:
                up, fault = by_step[i]
                _disturb(pair.uplink if up else pair.downlink, fault, old, up)
            for queue, up in ((pair.uplink, True), (pair.downlink, False)):
                old += [(up, message) for message in queue]
            play(pair, [step])
            assert tuple(pair.edge.committed) == world.answer[: len(pair.edge.committed)]
    except ProtocolError:
        pass  # the stream ends; the edge keeps what was committed
    assert tuple(pair.edge.committed) == world.answer[: len(pair.edge.committed)]
    resumed = Pair(world, committed=tuple(pair.edge.committed))
    finish(resumed)
    assert tuple(resumed.edge.committed) == world.answer


def _disturb(queue: deque, fault: str, old: list[tuple[bool, object]], up: bool) -> None:
    past = [message for direction, message in old if direction == up]
    if fault == "late repeat" and past:
        queue.append(past[len(past) // 2])
    elif not queue:
        return
    elif fault == "repeat":
        queue.append(queue[-1])
    elif fault == "drop":
        queue.popleft()
    elif fault == "swap" and len(queue) > 1:
        queue[0], queue[1] = queue[1], queue[0]


@given(worlds, schedules)
def test_origins_say_who_made_each_token(world, schedule):
    pair = Pair(world)
    for action, num_tokens, wrong_at, more in schedule:
        if action == "down" and pair.downlink and isinstance(pair.downlink[0], Verdict):
            verdict = pair.downlink.popleft()
            commit = pair.edge.receive_verdict(verdict)
            assert commit.origins.count(Origin.ACCEPTED) == verdict.num_accepted
            assert commit.rolled_back == (Origin.CORRECTION in commit.origins)
            assert len(commit.origins) == len(commit.token_ids)
        else:
            play(pair, [(action, num_tokens, wrong_at, more)])


def test_a_drained_stream_ends_where_it_stands_and_says_why():
    pair = Pair(World((1, 2, 3, 4), max_tokens=4))
    pair.edge_drafts(2, None, more=False)
    pair.cloud_receives()
    pair.cloud.finish(FinishReason.DRAIN)
    pair._announce_finish()
    pair.edge_receives()
    assert pair.edge.finished is not None
    assert pair.edge.finished.reason is FinishReason.DRAIN
    assert pair.edge.committed == []
