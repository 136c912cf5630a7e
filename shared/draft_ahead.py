"""Drafting past what is verified: what to propose next, what to send, what a verdict leaves standing. Pure.

    committed | in flight (sent) | unsent
              `------ proposals, all unverified ------'

Stop-and-wait sends one draft and proposes nothing until its verdict is in. Proactive drafting goes on: drafts
that promise more follow each other until the window is full or the drafter stops, and the last of them says
that the edge waits. Meanwhile the edge drafts what may come after the target's own next token: where its
first guess is that token, the rest still stands and can be sent at once.

The window fills only as `more` turns false, so the promise of `Draft.more` is always kept, and an edge
with nothing left to propose has always sent a last draft: the cloud owes it a token, and nobody waits
in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.drafts import Proposal
from shared.messages import Draft, Opened, Verdict
from shared.session import Commit, EdgeSession, EdgeState
from shared.stopping import AcceptanceEstimate, AnyOf, Following, StopRule, SurvivalBelow, TopProbBelow


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much is drafted before the edge waits."""

    max_draft_tokens: int
    """Per draft, >= 1; what survived a verdict may make one longer."""
    max_in_flight_tokens: int | None = None
    """The window: draft tokens sent and not verified, >= 1. None is stop-and-wait."""
    fallback_threshold: float = 0.0
    """As in `TopProbBelow`."""
    acceptance_threshold: float = 0.0
    """As in `SurvivalBelow`."""

    def __post_init__(self) -> None:
        if self.max_draft_tokens < 1:
            raise ValueError(f"a draft must hold 1 token or more, got {self.max_draft_tokens}")
        if self.max_in_flight_tokens is not None and self.max_in_flight_tokens < 1:
            raise ValueError(f"the window must hold 1 token or more, got {self.max_in_flight_tokens}")

    @property
    def proactive(self) -> bool:
        return self.max_in_flight_tokens is not None

    @property
    def max_unverified_tokens(self) -> int:
        """How far a drafter may be ahead of what is committed, and may have to go back."""
        ahead = 0 if self.max_in_flight_tokens is None else self.max_in_flight_tokens + 1
        return ahead + self.max_draft_tokens


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a drafter should propose next."""

    text_ids: tuple[int, ...]
    """Prompt, committed and unverified tokens."""
    start: int
    """Completion position of the first proposed token."""
    num_tokens: int
    """At most, >= 1."""
    stop: StopRule
    revision: int
    """Of the text; `DraftAhead.add` drops what continues one that is gone."""


class DraftAhead:
    """The edge's unverified proposals, beside the `EdgeSession` that it sends them through."""

    def __init__(self, session: EdgeSession, opened: Opened, pace: Pace) -> None:
        """
        Args:
            session: opened, and from now on only used through this object to draft and to receive verdicts.
            pace: may be changed at any time (`pace`).
        """
        self.estimate = AcceptanceEstimate()
        self.proposals: list[Proposal] = []
        """All unverified ones; the first `session.num_in_flight` are sent."""
        self._session = session
        self._opened = opened
        self.pace = pace
        self._revision = 0
        self._stopped = False
        """The drafter has nothing to propose at the end of the text as it is."""

    @property
    def position(self) -> int:
        """Where the next proposal goes."""
        return len(self._session.committed) + len(self.proposals)

    def wanted(self, at_most: int) -> Wanted | None:
        """What to propose next; None while there is enough, or nothing more could count.

        Args:
            at_most: tokens.
        """
        state = self._session.state
        if self._stopped or state not in (EdgeState.DRAFTING, EdgeState.WAITING):
            return None
        if state is EdgeState.WAITING and not self.pace.proactive:
            return None
        # One more while the edge waits: the guess at the target's own token, which is never sent.
        enough = self._draft_tokens + (state is EdgeState.WAITING)
        num_unsent = len(self.proposals) - self._session.num_in_flight
        num_tokens = min(at_most, enough - num_unsent, self._last_position - self.position)
        if num_tokens < 1:
            return None
        text = (*self._opened.prompt_token_ids, *self._session.committed, *self._proposed_ids())
        stop = Following(
            tuple(proposal.prob for proposal in self.proposals),
            AnyOf(
                (
                    TopProbBelow(self.pace.fallback_threshold),
                    SurvivalBelow(self.pace.acceptance_threshold, self.estimate),
                )
            ),
        )
        return Wanted(text, self.position, num_tokens, stop, self._revision)

    def add(self, wanted: Wanted, proposals: Sequence[Proposal]) -> None:
        """Take what a drafter proposed, as far as it still continues the text."""
        if wanted.revision != self._revision:
            return
        # The target's own token may have come meanwhile, where the first of these was a guess at it.
        known = self._session.committed[wanted.start :] if not self.proposals else []
        if known:
            if [proposal.token_id for proposal in proposals[: len(known)]] == known:
                self._append(proposals[len(known) :])
            return
        self._append(proposals)
        fewer = len(proposals) < wanted.num_tokens
        self._stopped = self._stopped or (fewer and (not proposals or not self.pace.proactive))

    def begin_with(self, proposals: Sequence[Proposal]) -> None:
        """Start from tokens that were made before the stream was opened."""
        self._append(proposals)

    def next_draft(self) -> Draft | None:
        """The draft to send now; None while the edge waits, or should propose more first."""
        session, window = self._session, self.pace.max_in_flight_tokens
        if session.state is not EdgeState.DRAFTING:
            return None
        room = self._last_position - session.position
        free = room if window is None else window - session.num_in_flight
        limit = max(0, min(self._opened.max_draft_tokens, room, free))
        unsent = self._proposed_ids()[session.num_in_flight :]
        draft = unsent[:limit]
        if len(draft) < min(self._draft_tokens, limit) and not self._stopped:
            return None
        dry = self._stopped and len(draft) == len(unsent)
        more = self.pace.proactive and not dry and len(draft) < min(room, free)
        return session.send_draft(draft, more=more)

    def receive(self, verdict: Verdict) -> Commit:
        """Commit what the target stands for, and keep the proposals that still continue the text.

        Raises:
            UnexpectedMessage: as `EdgeSession.receive_verdict`.
        """
        commit = self._session.receive_verdict(verdict)
        if not commit.token_ids:
            return commit  # a repeat, or the end
        judged = self.proposals[: verdict.num_accepted + commit.rolled_back]
        self.estimate = self.estimate.updated(
            [(proposal.prob, i < verdict.num_accepted) for i, proposal in enumerate(judged)]
        )
        ahead = [] if commit.rolled_back else self.proposals[verdict.num_scored :]
        if verdict.next_token is not None:
            guessed = bool(ahead) and ahead[0].token_id == verdict.next_token
            if commit.rolled_back or (ahead and not guessed):
                self._revision += 1
            ahead = ahead[1:] if guessed else []
            self._stopped = False
        self.proposals = []
        self._append(ahead)
        return commit

    @property
    def _last_position(self) -> int:
        """The completion's last position is never drafted: the target's own token closes it."""
        return self._opened.max_tokens - 1

    @property
    def _draft_tokens(self) -> int:
        """How many make a draft worth sending."""
        limits = (
            self.pace.max_draft_tokens,
            self._opened.max_draft_tokens,
            self.pace.max_in_flight_tokens,
        )
        return min(limit for limit in limits if limit is not None)

    def _append(self, proposals: Sequence[Proposal]) -> None:
        self.proposals += proposals
        if self.proposals and self.proposals[-1].token_id in self._opened.end_token_ids:
            self._stopped = True

    def _proposed_ids(self) -> list[int]:
        return [proposal.token_id for proposal in self.proposals]
