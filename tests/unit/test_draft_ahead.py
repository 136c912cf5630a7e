"""Drafting ahead: what is sent, what survives a verdict; then both ends over a link with random delays."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.draft_ahead import DraftAhead, Pace, Wanted
from shared.drafts import Proposal, Source
from shared.messages import Draft, Finished, Opened, Usage, Verdict
from shared.sampling import Sampling
from shared.session import CloudSession, EdgeSession, EdgeState

END = 0
PROMPT = (7, 7)


def proposals(*token_ids: int) -> list[Proposal]:
    return [Proposal(token, 0.9, Source.MODEL) for token in token_ids]


def started(pace: Pace, *, max_tokens: int = 100, committed: tuple[int, ...] = ()) -> DraftAhead:
    session = EdgeSession(committed)
    session.send_open()
    opened = Opened(
        model="scripted",
        prompt_token_ids=PROMPT,
        end_token_ids=frozenset({END}),
        sampling=Sampling(),
        max_tokens=max_tokens,
        max_draft_tokens=16,
        vocabulary_sha256="",
    )
    session.receive_opened(opened)
    return DraftAhead(session, opened, pace)


def propose(ahead: DraftAhead, *token_ids: int) -> None:
    """One token after the other, as long as any are wanted."""
    for token in token_ids:
        wanted = ahead.wanted(1)
        assert wanted is not None
        ahead.add(wanted, proposals(token))


def ids(ahead: DraftAhead) -> list[int]:
    return [proposal.token_id for proposal in ahead.proposals]


STOP_AND_WAIT = Pace(max_draft_tokens=2)
WINDOW_OF_4 = Pace(max_draft_tokens=2, max_in_flight_tokens=4)


# What is sent


def test_stop_and_wait_sends_one_draft_and_wants_nothing_until_the_verdict():
    ahead = started(STOP_AND_WAIT)
    propose(ahead, 1, 2)
    assert ahead.next_draft() == Draft(0, 0, (1, 2), more=False)
    assert (ahead.next_draft(), ahead.wanted(9)) == (None, None)
    ahead.receive(Verdict(0, 0, 2, 2, 3))
    wanted = ahead.wanted(9)
    assert (wanted.text_ids, wanted.start, wanted.num_tokens) == ((*PROMPT, 1, 2, 3), 3, 2)


def test_drafts_promise_more_until_the_window_is_full():
    ahead = started(WINDOW_OF_4)
    propose(ahead, 1, 2)
    assert ahead.next_draft() == Draft(0, 0, (1, 2), more=True)
    propose(ahead, 3)
    assert ahead.next_draft() is None, "half a draft waits to be filled"
    propose(ahead, 4)
    assert ahead.next_draft() == Draft(0, 2, (3, 4), more=False)


def test_while_the_edge_waits_it_drafts_a_guess_at_the_targets_token_and_one_draft_more():
    ahead = started(Pace(max_draft_tokens=2, max_in_flight_tokens=2))
    propose(ahead, 1, 2)
    assert ahead.next_draft() == Draft(0, 0, (1, 2), more=False)
    propose(ahead, 3, 4, 5)
    assert ahead.wanted(1) is None
    assert ahead.next_draft() is None


def test_a_drafter_that_stops_after_a_promise_asks_for_the_targets_token():
    ahead = started(WINDOW_OF_4)
    propose(ahead, 1, 2)
    assert ahead.next_draft().more
    ahead.add(ahead.wanted(1), [])
    assert ahead.next_draft() == Draft(0, 2, (), more=False)
    assert ahead.wanted(1) is None, "it has nothing to say about the same text"
    ahead.receive(Verdict(0, 0, 2, 2, 3))
    assert ahead.wanted(1) is not None


def test_nothing_is_drafted_behind_an_end_of_text():
    ahead = started(WINDOW_OF_4)
    propose(ahead, END)
    assert ahead.wanted(1) is None
    assert ahead.next_draft() == Draft(0, 0, (END,), more=False)


def test_the_last_position_is_left_to_the_target():
    ahead = started(WINDOW_OF_4, max_tokens=3)
    propose(ahead, 1, 2)
    assert ahead.wanted(1) is None
    assert ahead.next_draft() == Draft(0, 0, (1, 2), more=False)


def test_where_only_the_last_position_is_left_the_target_is_asked_at_once():
    ahead = started(WINDOW_OF_4, max_tokens=3, committed=(1, 2))
    assert ahead.wanted(1) is None
    assert ahead.next_draft() == Draft(0, 2, (), more=False)


def test_tokens_that_were_made_before_are_the_first_draft_however_many():
    ahead = started(STOP_AND_WAIT)
    ahead.begin_with(proposals(1, 2, 3, 4, 5))
    assert ahead.next_draft() == Draft(0, 0, (1, 2, 3, 4, 5), more=False)


# What a verdict leaves


def waiting_with_guesses() -> DraftAhead:
    ahead = started(Pace(max_draft_tokens=2, max_in_flight_tokens=2))
    propose(ahead, 1, 2)
    ahead.next_draft()
    propose(ahead, 3, 4, 5)
    return ahead


def test_where_the_bonus_was_guessed_what_was_drafted_behind_it_goes_out_at_once():
    ahead = waiting_with_guesses()
    ahead.receive(Verdict(0, 0, 2, 2, 3))
    assert ahead.next_draft() == Draft(0, 3, (4, 5), more=False)


def test_where_the_bonus_is_another_what_was_drafted_behind_it_is_dropped():
    ahead = waiting_with_guesses()
    ahead.receive(Verdict(0, 0, 2, 2, 9))
    assert ids(ahead) == []
    assert ahead.wanted(1).text_ids == (*PROMPT, 1, 2, 9)


def test_a_rejection_drops_everything_behind_it():
    ahead = waiting_with_guesses()
    commit = ahead.receive(Verdict(1, 0, 2, 1, 9))
    assert commit.token_ids == (1, 9)
    assert ids(ahead) == []
    assert ahead.wanted(1).text_ids == (*PROMPT, 1, 9)


def test_a_verdict_on_the_first_of_two_drafts_leaves_the_second_and_what_is_not_sent():
    ahead = started(WINDOW_OF_4)
    propose(ahead, 1, 2)
    ahead.next_draft()
    propose(ahead, 3)
    ahead.receive(Verdict(0, 0, 2, 2, None))
    assert ids(ahead) == [3]
    propose(ahead, 4)
    assert ahead.next_draft() == Draft(0, 2, (3, 4), more=True)


def test_a_proposal_for_a_text_that_was_rolled_back_meanwhile_is_dropped():
    ahead = started(WINDOW_OF_4)
    propose(ahead, 1, 2)
    ahead.next_draft()
    wanted = ahead.wanted(1)
    ahead.receive(Verdict(1, 0, 2, 0, 9))
    ahead.add(wanted, proposals(3))
    assert ids(ahead) == []


@pytest.mark.parametrize(("bonus", "kept"), [(3, [4]), (9, [])])
def test_a_guess_that_comes_after_the_bonus_stands_as_far_as_it_agrees(bonus, kept):
    ahead = started(Pace(max_draft_tokens=2, max_in_flight_tokens=2))
    propose(ahead, 1, 2)
    ahead.next_draft()
    wanted = ahead.wanted(2)
    ahead.receive(Verdict(0, 0, 2, 2, bonus))
    ahead.add(wanted, proposals(3, 4))
    assert ids(ahead) == kept


def test_a_repeated_verdict_changes_nothing():
    ahead = started(WINDOW_OF_4)
    propose(ahead, 1, 2)
    ahead.next_draft()
    verdict = Verdict(0, 0, 2, 2, None)
    ahead.receive(verdict)
    propose(ahead, 3)
    estimate = ahead.estimate
    assert ahead.receive(verdict).token_ids == ()
    assert (ids(ahead), ahead.estimate) == ([3], estimate)


def test_the_estimate_learns_from_accepted_tokens_and_the_one_that_was_rejected():
    ahead = waiting_with_guesses()
    before = ahead.estimate
    ahead.receive(Verdict(1, 0, 2, 1, 9))
    assert ahead.estimate == before.updated([(0.9, True), (0.9, False)])


@pytest.mark.parametrize(
    "wrong", [{"max_draft_tokens": 0}, {"max_draft_tokens": 1, "max_in_flight_tokens": 0}]
)
def test_a_pace_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="must hold 1 token or more"):
        Pace(**wrong)


# Both ends over a link


@dataclass
class World:
    """A target's text, a drafter that is often right, and delays that hypothesis chooses."""

    seed: int
    max_tokens: int
    pace: Pace
    agreement: float
    stops: float
    """How often the drafter has nothing to say."""
    step_tokens: int
    committed: int

    def target_at(self, position: int) -> int:
        return random.Random(f"{self.seed} {position}").choice([END, *range(1, 8)] + [*range(1, 8)] * 4)

    @property
    def answer(self) -> tuple[int, ...]:
        text = tuple(self.target_at(i) for i in range(self.max_tokens))
        return text[: text.index(END) + 1] if END in text else text


@dataclass
class Simulation:
    """Both ends on a virtual clock, where drafter, link and target each take as long as they like."""

    world: World
    delays: random.Random
    events: list[tuple[float, int, str, object]] = field(default_factory=list)
    now: float = 0.0
    last_arrival: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})
    drafting: bool = False
    scoring: bool = False
    num_drafts: int = 0
    num_promises: int = 0
    max_in_flight: int = 0

    def __post_init__(self) -> None:
        world = self.world
        committed = world.answer[: world.committed]
        self.ahead = started(world.pace, max_tokens=world.max_tokens, committed=committed)
        self.edge = self.ahead._session
        self.cloud = CloudSession(
            committed=committed,
            max_tokens=world.max_tokens,
            max_draft_tokens=16,
            end_token_ids=frozenset({END}),
            legal_token_ids=range(8),
        )
        self._numbers = count()

    def run(self) -> None:
        self._announce()
        self._edge_acts()
        while self.edge.state is not EdgeState.DONE:
            assert self.events, f"both ends wait: edge {self.edge.state}, cloud {self.cloud.state}"
            self.now, _, what, payload = heapq.heappop(self.events)
            getattr(self, f"_{what}")(payload)
            self.max_in_flight = max(self.max_in_flight, self.edge.num_in_flight)
            self._edge_acts()

    def _after(self, delay: float, what: str, payload: object) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self._numbers), what, payload))

    def _send(self, direction: str, what: str, payload: object) -> None:
        arrival = max(self.last_arrival[direction], self.now + self.delays.choice([0.0, 0.1, 1.0, 7.0]))
        self.last_arrival[direction] = arrival
        self._after(arrival - self.now, what, payload)

    def _edge_acts(self) -> None:
        while (draft := self.ahead.next_draft()) is not None:
            assert draft.epoch == self.edge.epoch
            self.num_drafts += 1
            self.num_promises += draft.more
            self._send("up", "draft_arrives", draft)
        if not self.drafting and (wanted := self.ahead.wanted(self.world.step_tokens)) is not None:
            self.drafting = True
            self._after(self.delays.choice([0.1, 1.0, 5.0]), "proposed", wanted)

    def _proposed(self, wanted: Wanted) -> None:
        self.drafting = False
        made = []
        for position in range(wanted.start, wanted.start + wanted.num_tokens):
            if self.delays.random() < self.world.stops:
                break
            token = self.world.target_at(position)
            if self.delays.random() > self.world.agreement:
                token = 1 + token % 7
            made.append(token)
            if token == END:
                break
        self.ahead.add(wanted, proposals(*made))

    def _draft_arrives(self, draft: Draft) -> None:
        self.cloud.receive(draft)
        self._cloud_acts()

    def _cloud_acts(self) -> None:
        if not self.scoring and (round_ := self.cloud.next_round()) is not None:
            self.scoring = True
            self._after(self.delays.choice([0.1, 2.0, 9.0]), "scored", round_)

    def _scored(self, round_) -> None:
        self.scoring = False
        targets = [self.world.target_at(round_.start + i) for i in range(round_.num_positions)]
        self._send("down", "verdict_arrives", self.cloud.judge(round_, targets))
        self._announce()
        self._cloud_acts()

    def _announce(self) -> None:
        if self.cloud.done:
            usage = Usage(0, len(self.cloud.committed), self.cloud.num_rounds, 0)
            self._send("down", "finished_arrives", Finished(self.cloud.finish_reason, usage))

    def _verdict_arrives(self, verdict: Verdict) -> None:
        before = tuple(self.edge.committed)
        self.ahead.receive(verdict)
        assert tuple(self.edge.committed[: len(before)]) == before
        sent = [p.token_id for p in self.ahead.proposals[: self.edge.num_in_flight]]
        assert sent == [token for draft in self.edge._in_flight for token in draft.token_ids]

    def _finished_arrives(self, finished: Finished) -> None:
        self.edge.receive_finished(finished)


windows = st.none() | st.integers(1, 32)
worlds = st.builds(
    World,
    seed=st.integers(0, 10**6),
    max_tokens=st.integers(1, 60),
    pace=st.builds(Pace, max_draft_tokens=st.integers(1, 8), max_in_flight_tokens=windows),
    agreement=st.sampled_from([0.0, 0.6, 0.95, 1.0]),
    stops=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    step_tokens=st.integers(1, 4),
    committed=st.integers(0, 10),
)


@settings(max_examples=400)
@given(worlds, st.integers(0, 10**6))
def test_whatever_is_delayed_the_text_is_the_targets_own_and_nobody_waits_in_vain(world, seed):
    simulation = Simulation(world, random.Random(seed))
    simulation.run()
    assert tuple(simulation.edge.committed) == tuple(simulation.cloud.committed) == world.answer
    assert simulation.edge.num_in_flight == 0, "a draft was neither answered nor voided"
    if world.pace.max_in_flight_tokens is None:
        assert simulation.num_promises == 0
    else:
        assert simulation.max_in_flight <= world.pace.max_in_flight_tokens


@settings(max_examples=200)
@given(worlds, st.integers(0, 10**6), st.lists(worlds.map(lambda world: world.pace), min_size=1, max_size=4))
def test_a_pace_that_changes_on_the_way_changes_no_token_and_leaves_nobody_waiting(world, seed, paces):
    """As the speed controller does: other lengths and windows, stop-and-wait or not, at any moment."""
    simulation = Simulation(world, random.Random(seed))
    act = simulation._edge_acts

    def at_another_pace() -> None:
        if simulation.delays.random() < 0.3:
            simulation.ahead.pace = simulation.delays.choice(paces)
        act()

    simulation._edge_acts = at_another_pace
    simulation.run()
    assert tuple(simulation.edge.committed) == tuple(simulation.cloud.committed) == world.answer
    assert simulation.edge.num_in_flight == 0, "a draft was neither answered nor voided"


def test_with_a_slow_verdict_several_drafts_are_in_flight_and_some_are_voided():
    seen: Counter[str] = Counter()
    for seed in range(50):
        pace = Pace(max_draft_tokens=2, max_in_flight_tokens=16)
        world = World(seed, 60, pace, agreement=0.8, stops=0.0, step_tokens=1, committed=0)
        simulation = Simulation(world, random.Random(seed))
        simulation.run()
        seen["drafts"] += simulation.num_drafts
        seen["rounds"] += simulation.cloud.num_rounds
        seen["wide"] += simulation.max_in_flight > 4
        seen["epochs"] += simulation.edge.epoch
    assert seen["rounds"] < seen["drafts"]
    assert seen["wide"] > 25
    assert seen["epochs"] > 50
