"""A stream's two state machines: events in, events out, no I/O, no clock (after python-hyper/h11).

    edge                                     cloud
    Open  ------------------------------->
          <------------------------------- Opened
    Draft ------------------------------->   (several may be in flight)
          <------------------------------- Verdict
          <------------------------------- Finished

Positions count completion tokens from 0. A draft starts where the one before ended. Only the cloud
raises the epoch, at a rejection; drafts of an older epoch are void. `Draft.more` promises another
draft without waiting, so a bonus token is given only after a draft with more=False, and the edge
then waits. The invariant that `tests/unit/test_session_properties.py` proves: every draft is answered
by one verdict or voided by a higher epoch, and no sequence of messages leaves both ends waiting.

A stream that breaks is resumed by a new pair of machines that start from `committed`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from shared.errors import FutureEpoch, InvalidDraft, UnexpectedMessage
from shared.messages import NO_TIMINGS, Draft, Finished, FinishReason, Opened, Policy, Timings, Verdict
from shared.policies import Bool, Float, num_accepted, num_judged, num_tolerated


class Origin(str, Enum):
    """Who made a committed token."""

    ACCEPTED = "accepted"
    """Drafted at the edge, verified by the target."""
    CORRECTION = "correction"
    """The target's own, in place of a rejected draft token."""
    BONUS = "bonus"
    """The target's own, after a draft that was accepted whole."""
    CLOUD = "cloud"
    """The target's own, in mode `cloud`."""
    LOCAL = "local"
    """The edge's own, in mode `local`."""


class EdgeState(Enum):
    IDLE = auto()
    OPENING = auto()
    DRAFTING = auto()
    """The edge owes the next draft."""
    WAITING = auto()
    """The last draft said that no other follows: the cloud owes a verdict."""
    FINISHING = auto()
    """The completion is whole; Finished is due."""
    DONE = auto()


class EdgeEvent(Enum):
    SEND_OPEN = auto()
    OPENED = auto()
    SEND_DRAFT = auto()
    SEND_LAST_DRAFT = auto()
    VERDICT_LEAVES_DRAFTS = auto()
    VERDICT_SETTLES_ALL = auto()
    VERDICT_COMPLETES = auto()
    FINISHED = auto()


EDGE_TRANSITIONS: dict[tuple[EdgeState, EdgeEvent], EdgeState] = {
    (EdgeState.IDLE, EdgeEvent.SEND_OPEN): EdgeState.OPENING,
    (EdgeState.OPENING, EdgeEvent.OPENED): EdgeState.DRAFTING,
    (EdgeState.DRAFTING, EdgeEvent.SEND_DRAFT): EdgeState.DRAFTING,
    (EdgeState.DRAFTING, EdgeEvent.SEND_LAST_DRAFT): EdgeState.WAITING,
    (EdgeState.DRAFTING, EdgeEvent.VERDICT_LEAVES_DRAFTS): EdgeState.DRAFTING,
    (EdgeState.DRAFTING, EdgeEvent.VERDICT_SETTLES_ALL): EdgeState.DRAFTING,
    (EdgeState.WAITING, EdgeEvent.VERDICT_LEAVES_DRAFTS): EdgeState.WAITING,
    (EdgeState.WAITING, EdgeEvent.VERDICT_SETTLES_ALL): EdgeState.DRAFTING,
    (EdgeState.DRAFTING, EdgeEvent.VERDICT_COMPLETES): EdgeState.FINISHING,
    (EdgeState.WAITING, EdgeEvent.VERDICT_COMPLETES): EdgeState.FINISHING,
    # A resume of a completion that was already whole, or a service that drains, ends at once.
    (EdgeState.OPENING, EdgeEvent.FINISHED): EdgeState.DONE,
    (EdgeState.DRAFTING, EdgeEvent.FINISHED): EdgeState.DONE,
    (EdgeState.WAITING, EdgeEvent.FINISHED): EdgeState.DONE,
    (EdgeState.FINISHING, EdgeEvent.FINISHED): EdgeState.DONE,
}


class CloudState(Enum):
    LISTENING = auto()
    """The edge owes a draft."""
    READY = auto()
    """Drafts wait to be scored."""
    SCORING = auto()
    """A round is with the target; drafts that arrive meanwhile wait for the next."""
    DONE = auto()


class CloudEvent(Enum):
    DRAFT = auto()
    ROUND = auto()
    VERDICT_LEAVES_DRAFTS = auto()
    VERDICT_SETTLES_ALL = auto()
    FINISH = auto()


CLOUD_TRANSITIONS: dict[tuple[CloudState, CloudEvent], CloudState] = {
    (CloudState.LISTENING, CloudEvent.DRAFT): CloudState.READY,
    (CloudState.READY, CloudEvent.DRAFT): CloudState.READY,
    (CloudState.SCORING, CloudEvent.DRAFT): CloudState.SCORING,
    (CloudState.READY, CloudEvent.ROUND): CloudState.SCORING,
    (CloudState.SCORING, CloudEvent.VERDICT_LEAVES_DRAFTS): CloudState.READY,
    (CloudState.SCORING, CloudEvent.VERDICT_SETTLES_ALL): CloudState.LISTENING,
    (CloudState.LISTENING, CloudEvent.FINISH): CloudState.DONE,
    (CloudState.READY, CloudEvent.FINISH): CloudState.DONE,
    (CloudState.SCORING, CloudEvent.FINISH): CloudState.DONE,
}


@dataclass(frozen=True, slots=True)
class Commit:
    """What a verdict adds to the text, and whether drafts in flight were voided by it."""

    start: int
    token_ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    rolled_back: bool


_NOTHING = Commit(0, (), (), False)


class EdgeSession:
    """The edge's end. `committed` only ever grows by what `receive_verdict` returns."""

    def __init__(self, committed: Sequence[int] = ()) -> None:
        self.state = EdgeState.IDLE
        self.epoch = 0
        self.committed = list(committed)
        self.finished: Finished | None = None
        self._in_flight: deque[Draft] = deque()
        self._opened: Opened | None = None

    @property
    def position(self) -> int:
        """Where the next draft starts: after everything committed or in flight."""
        return len(self.committed) + self.num_in_flight

    @property
    def num_in_flight(self) -> int:
        """Draft tokens sent and not yet answered."""
        return sum(len(draft.token_ids) for draft in self._in_flight)

    def send_open(self) -> None:
        self._move(EdgeEvent.SEND_OPEN)

    def receive_opened(self, opened: Opened) -> None:
        self._move(EdgeEvent.OPENED)
        self._opened = opened

    def send_draft(self, token_ids: Sequence[int], *, more: bool) -> Draft:
        """Make the next draft message. An empty one asks for the target's own token.

        Raises:
            UnexpectedMessage: the edge must wait, or an empty draft promises more.
        """
        if more and not token_ids:
            raise UnexpectedMessage("an empty draft cannot promise more: it asks for the target's token")
        start = self.position
        self._move(EdgeEvent.SEND_DRAFT if more else EdgeEvent.SEND_LAST_DRAFT)
        draft = Draft(self.epoch, start, tuple(token_ids), more)
        self._in_flight.append(draft)
        return draft

    def receive_verdict(self, verdict: Verdict) -> Commit:
        """Commit what the target stands for. An exact repeat of an earlier verdict adds nothing.

        Raises:
            UnexpectedMessage: the verdict answers something else than the oldest drafts in flight.
        """
        if self._repeats(verdict):
            return _NOTHING
        if self.state not in (EdgeState.DRAFTING, EdgeState.WAITING) or verdict.start != len(self.committed):
            raise UnexpectedMessage(
                f"verdict for position {verdict.start} in state {self.state.name}"
                f" with {len(self.committed)} tokens committed"
            )
        answered, last_is_answered = self._answered_tokens(verdict)
        accepted = answered[: verdict.num_accepted]
        rejected = verdict.num_accepted < verdict.num_scored and verdict.next_token is not None
        self._check_epoch(verdict, rejected)

        tokens = (*accepted, *([] if verdict.next_token is None else [verdict.next_token]))
        origins = (Origin.ACCEPTED,) * len(accepted)
        if verdict.next_token is not None:
            origins += (Origin.CORRECTION if rejected else Origin.BONUS,)
        commit = Commit(verdict.start, tokens, origins, rolled_back=rejected)
        self.committed += tokens
        self.epoch = verdict.epoch
        if rejected:
            self._in_flight.clear()
        self._move(self._verdict_event(verdict, last_is_answered))
        return commit

    def receive_finished(self, finished: Finished) -> None:
        self._move(EdgeEvent.FINISHED)
        self._in_flight.clear()
        self.finished = finished

    def _move(self, event: EdgeEvent) -> None:
        try:
            self.state = EDGE_TRANSITIONS[self.state, event]
        except KeyError:
            raise UnexpectedMessage(f"{event.name} is not legal in state {self.state.name}") from None

    def _repeats(self, verdict: Verdict) -> bool:
        """A verdict can only arrive again when all that it committed already stands."""
        if verdict.start >= len(self.committed) or verdict.epoch > self.epoch:
            return False
        end = verdict.start + verdict.num_accepted + (verdict.next_token is not None)
        if end > len(self.committed):
            return False
        return verdict.next_token is None or self.committed[end - 1] == verdict.next_token

    def _answered_tokens(self, verdict: Verdict) -> tuple[list[int], bool]:
        """Take the answered drafts out of flight: their tokens, and whether the last one is among them."""
        tokens: list[int] = []
        takes_bonus = verdict.next_token is not None and verdict.num_accepted == verdict.num_scored
        last: Draft | None = None
        while self._in_flight:
            whole = len(tokens) == verdict.num_scored
            if whole and not (takes_bonus and not self._in_flight[0].token_ids):
                break
            last = self._in_flight.popleft()
            tokens += last.token_ids
        if last is None or len(tokens) != verdict.num_scored or verdict.num_accepted > verdict.num_scored:
            raise UnexpectedMessage(
                f"verdict accepts {verdict.num_accepted} of {verdict.num_scored} tokens,"
                " which is not a whole number of drafts in flight"
            )
        if takes_bonus and last.more:
            raise UnexpectedMessage("a bonus token after a draft that promised more")
        return tokens, not last.more

    def _check_epoch(self, verdict: Verdict, rejected: bool) -> None:
        expected = self.epoch + 1 if rejected else self.epoch
        if verdict.epoch != expected:
            raise UnexpectedMessage(f"verdict of epoch {verdict.epoch}, expected {expected}")

    def _verdict_event(self, verdict: Verdict, last_is_answered: bool) -> EdgeEvent:
        assert self._opened is not None
        ended = bool(self.committed) and self.committed[-1] in self._opened.end_token_ids
        cut_short = verdict.next_token is None and (
            verdict.num_accepted < verdict.num_scored or last_is_answered
        )
        if ended or cut_short or len(self.committed) >= self._opened.max_tokens:
            return EdgeEvent.VERDICT_COMPLETES
        return EdgeEvent.VERDICT_LEAVES_DRAFTS if self._in_flight else EdgeEvent.VERDICT_SETTLES_ALL


MAX_ROUND_TOKENS = 64
"""Draft tokens of one round, and so of one draft: what a pass of the target can hold beside others."""


class Admission(Enum):
    ADMITTED = auto()
    REPEATED = auto()
    """The same draft once more: ignored."""
    VOID = auto()
    """Of an older epoch, or after the end: dropped unscored."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of the target: score `token_ids`, and one position more where a bonus is due."""

    start: int
    token_ids: tuple[int, ...]
    num_answered: int
    """Draft tokens that the verdict answers; more than scored where an end or the limit cuts the rest off."""
    last: bool
    """The edge waits for this round: no draft follows it."""
    bonus: bool

    @property
    def num_positions(self) -> int:
        """Target tokens that `CloudSession.judge` needs."""
        return len(self.token_ids) + self.bonus


class CloudSession:
    """The cloud's end. Drafts that wait together are scored in one round and answered by one verdict."""

    def __init__(
        self,
        *,
        committed: Sequence[int],
        max_tokens: int,
        max_draft_tokens: int,
        end_token_ids: frozenset[int],
        legal_token_ids: Container[int],
        policy: Policy = Policy.LOSSLESS,
        rollback_threshold: float | None = None,
    ) -> None:
        """
        Args:
            committed: what a resumed completion already holds.
            max_tokens: completion tokens at most, committed ones included.
            max_draft_tokens: per draft message.
            legal_token_ids: ids that a draft may propose.
            rollback_threshold: nats, of policy `bild`.
        """
        self.state = CloudState.LISTENING
        self.epoch = 0
        self.committed = list(committed)
        self.finish_reason: FinishReason | None = None
        self.num_rounds = 0
        self._max_tokens = max_tokens
        self._max_draft_tokens = max_draft_tokens
        self._end_token_ids = end_token_ids
        self._legal_token_ids = legal_token_ids
        self._policy = policy
        self._rollback_threshold = rollback_threshold
        self._waiting: deque[Draft] = deque()
        self._admitted: dict[int, Draft] = {}
        self._expected_start = len(self.committed)
        self._edge_waits = False
        self._finish_if_complete()

    @property
    def done(self) -> bool:
        return self.state is CloudState.DONE

    def receive(self, draft: Draft) -> Admission:
        """Take a draft in, or say why it does not count.

        Raises:
            FutureEpoch: the edge claims an epoch that no verdict announced.
            InvalidDraft: wrong start, too long, an unknown token id, or a promise broken.
        """
        if self.state is CloudState.DONE or draft.epoch < self.epoch:
            return Admission.VOID
        if draft.epoch > self.epoch:
            raise FutureEpoch(f"draft of epoch {draft.epoch}, but the stream is in epoch {self.epoch}")
        if self._admitted.get(draft.start) == draft:
            return Admission.REPEATED
        self._check(draft)
        self._move(CloudEvent.DRAFT)
        self._admitted[draft.start] = draft
        self._waiting.append(draft)
        self._expected_start += len(draft.token_ids)
        self._edge_waits = not draft.more
        return Admission.ADMITTED

    def next_round(self) -> Round | None:
        """Coalesce what waits, up to MAX_ROUND_TOKENS, into one round; None while nothing waits."""
        if self.state is not CloudState.READY:
            return None
        self._move(CloudEvent.ROUND)
        drafted: list[int] = []
        last = False
        while self._waiting and len(drafted) + len(self._waiting[0].token_ids) <= MAX_ROUND_TOKENS:
            draft = self._waiting.popleft()
            drafted += draft.token_ids
            last = not draft.more
        start = len(self.committed)
        scored = self._worth_scoring(drafted, room=self._max_tokens - start)
        bonus = last and len(scored) == len(drafted) and self._may_continue(start, scored)
        return Round(start, tuple(scored), len(drafted), last, bonus)

    @property
    def needs_logprobs(self) -> bool:
        """Whether `judge` asks how likely the draft tokens are."""
        return self._policy is Policy.BILD

    @property
    def needs_judgements(self) -> bool:
        """Whether `judge` asks what the target's judge head says of the draft tokens."""
        return self._policy is Policy.JUDGE

    def judge(
        self,
        round_: Round,
        target_ids: Sequence[int],
        timings: Timings = NO_TIMINGS,
        *,
        logprobs: Float | None = None,
        acceptable: Bool | None = None,
    ) -> Verdict:
        """Decide a round.

        Args:
            target_ids: [round_.num_positions], the target's token at each position (`sampling.draw`); under
                `lossless` they may end after the first that differs from the draft.
            logprobs: [len(round_.token_ids)], nats, the target's own of the draft tokens, before any sampling
                setting; where the session `needs_logprobs`.
            acceptable: [len(round_.token_ids)], what the judge head says; where it `needs_judgements`.
        """
        self.num_rounds += 1
        accepted = self._num_standing(round_, target_ids, logprobs, acceptable)
        rejected = accepted < len(round_.token_ids)
        next_token = int(target_ids[accepted]) if rejected or round_.bonus else None
        self.committed += round_.token_ids[:accepted]
        if next_token is not None:
            self.committed.append(next_token)
        if rejected:
            self.epoch += 1
            self._waiting.clear()
        if next_token is not None:
            self._expected_start = len(self.committed)
        if rejected or round_.last:
            self._edge_waits = False
        self._move(CloudEvent.VERDICT_LEAVES_DRAFTS if self._waiting else CloudEvent.VERDICT_SETTLES_ALL)
        self._finish_if_complete()
        return Verdict(self.epoch, round_.start, round_.num_answered, accepted, next_token, timings)

    def _num_standing(
        self, round_: Round, target_ids: Sequence[int], logprobs: Float | None, acceptable: Bool | None
    ) -> int:
        if self._policy is Policy.BILD:
            assert logprobs is not None, "policy bild judges by log-probabilities"
            assert self._rollback_threshold is not None, "and by a threshold"
            return num_tolerated(round_.token_ids, target_ids, logprobs, self._rollback_threshold)
        if self._policy is Policy.JUDGE:
            assert acceptable is not None, "policy judge judges by the target's head"
            # No later token could mend an answer that ends too early: only the target ends it.
            ends = np.array([token in self._end_token_ids for token in round_.token_ids], np.bool_)
            return num_judged(round_.token_ids, target_ids, acceptable & ~ends)
        return num_accepted(round_.token_ids, target_ids)

    def append(self, target_ids: Sequence[int]) -> tuple[int, ...]:
        """Commit tokens that the target made on its own (mode `cloud`): as many as ends and limits allow."""
        room = self._max_tokens - len(self.committed)
        kept = self._worth_scoring(target_ids, room)
        self.committed += kept
        self._finish_if_complete()
        return tuple(kept)

    def finish(self, reason: FinishReason) -> None:
        """End the stream early, for example to drain."""
        self._move(CloudEvent.FINISH)
        self.finish_reason = reason
        self._waiting.clear()

    def _move(self, event: CloudEvent) -> None:
        try:
            self.state = CLOUD_TRANSITIONS[self.state, event]
        except KeyError:
            raise UnexpectedMessage(f"{event.name} is not legal in state {self.state.name}") from None

    def _check(self, draft: Draft) -> None:
        if self._edge_waits:
            raise InvalidDraft(f"draft at {draft.start} follows one that said it was the last")
        if draft.start != self._expected_start or draft.start >= self._max_tokens:
            raise InvalidDraft(
                f"draft starts at {draft.start}, expected {self._expected_start}"
                f" of {self._max_tokens} at most"
            )
        if not draft.token_ids and draft.more:
            raise InvalidDraft("an empty draft cannot promise more: it asks for the target's token")
        if len(draft.token_ids) > self._max_draft_tokens:
            raise InvalidDraft(
                f"draft of {len(draft.token_ids)} tokens, at most {self._max_draft_tokens} are taken"
            )
        for token in draft.token_ids:
            if token not in self._legal_token_ids:
                raise InvalidDraft(f"token id {token} is not in the target's vocabulary")

    def _worth_scoring(self, token_ids: Sequence[int], room: int) -> list[int]:
        """Cut after the first end of text and at the limit: what comes later can never be committed."""
        kept = list(token_ids[:room])
        for i, token in enumerate(kept):
            if token in self._end_token_ids:
                return kept[: i + 1]
        return kept

    def _may_continue(self, start: int, scored: Sequence[int]) -> bool:
        ended = bool(scored) and scored[-1] in self._end_token_ids
        return not ended and start + len(scored) < self._max_tokens

    def _finish_if_complete(self) -> None:
        if self.committed and self.committed[-1] in self._end_token_ids:
            self.finish(FinishReason.STOP)
        elif len(self.committed) >= self._max_tokens:
            self.finish(FinishReason.LENGTH)
