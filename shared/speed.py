"""What speculation over a link can gain: formulas, numbers in and numbers out.

All times are seconds. Terms: draft length g, acceptance rate a, time per draft token t_d, time to verify g
tokens t_v, time of one target step t_t, round trip rtt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


def expected_acceptance_length(acceptance_rate: float, num_draft_tokens: int) -> float:
    """Tokens per round: Leviathan et al. 2023, arXiv:2211.17192, Eq. 1 (their alpha and gamma).

    Assumes independent acceptances at a rate in [0, 1] and a target token closing every round.

    >>> expected_acceptance_length(0.5, 2)
    1.75
    """
    return sum(acceptance_rate**i for i in range(num_draft_tokens + 1))


def stop_and_wait_tokens_per_s(
    acceptance_rate: float, num_draft_tokens: int, t_draft: float, t_verify: float, rtt: float
) -> float:
    """Tokens per second when the edge waits for each verdict: tau / (g t_d + t_v + rtt)."""
    tau = expected_acceptance_length(acceptance_rate, num_draft_tokens)
    return tau / (num_draft_tokens * t_draft + t_verify + rtt)


def break_even_rtt(
    acceptance_rate: float, num_draft_tokens: int, t_draft: float, t_verify: float, t_step: float
) -> float:
    """The round trip above which stop-and-wait loses to the target's own stream; negative if it always does.

    From tau t_t > g t_d + t_v + rtt, the stream itself paying the round trip only once.
    """
    tau = expected_acceptance_length(acceptance_rate, num_draft_tokens)
    return tau * t_step - num_draft_tokens * t_draft - t_verify


MAX_RUN = 64
"""Run lengths beyond this are treated alike (`Runs.tail`)."""


@dataclass(frozen=True, slots=True)
class Runs:
    """How long drafts last: N is the position of the first rejected token after a rollback, 1, 2, ...

    Not geometric: easy text runs long and hard text breaks at once, so the chance of a rejection falls
    along a run.
    """

    survival: tuple[float, ...]
    """[MAX_RUN + 1]; entry n is P(N > n): the first n draft tokens are all accepted. Entry 0 is 1."""
    tail: float
    """Chance of a rejection at each position past MAX_RUN, > 0."""
    ended: float = 0.0
    """Share of runs that the end of an answer cuts off: their last draft is, on average, half as long."""

    @classmethod
    def from_hazards(cls, hazards: Sequence[float], ended: float = 0.0) -> Runs:
        """
        Args:
            hazards: [MAX_RUN]; entry n is the chance that token n + 1 is rejected when those before it stand.
        """
        survival = tuple(accumulate((1.0 - h for h in hazards), mul, initial=1.0))
        return cls(survival, max(hazards[-1], 1e-3), ended)

    @property
    def mean(self) -> float:
        """E[N]: tokens that a run commits, the correction included."""
        return sum(self.survival[:-1]) + self.survival[-1] / self.tail

    def mean_groups(self, size: int) -> float:
        """E[ceil(N / size)]: how many groups of `size` tokens it takes to meet the rejection."""
        return sum(self.survival[0:MAX_RUN:size]) + self.survival[-1] / (self.tail * size)


def stop_and_wait_rate(
    runs: Runs, num_draft_tokens: int, t_draft: float, verify: Callable[[int], float], rtt: float
) -> float:
    """Tokens per second of stop-and-wait: tau / (g t_d + t_v + rtt) as in `stop_and_wait_tokens_per_s`.

    A round accepted whole gains g + 1 tokens, its bonus being the run's next one, so a run of N takes
    ceil(N / (g + 1)) rounds and tau = E[N] / E[ceil(N / (g + 1))]: Leviathan's tau where N is geometric.

    Args:
        verify: tokens in a pass -> seconds.
    """
    g = num_draft_tokens
    rounds_s = runs.mean_groups(g + 1) * (g * t_draft + verify(g) + rtt)
    return runs.mean / (rounds_s - runs.ended * _half(g, t_draft, verify))


def _half(num_draft_tokens: int, t_draft: float, verify: Callable[[int], float]) -> float:
    """Seconds that a draft half as long takes less."""
    half = (num_draft_tokens + 1) // 2
    return (num_draft_tokens - half) * t_draft + verify(num_draft_tokens) - verify(half)


def proactive_rate(
    runs: Runs,
    num_draft_tokens: int,
    window_tokens: int,
    t_draft: float,
    verify: Callable[[int], float],
    rtt: float,
) -> float:
    """Tokens per second when drafting goes on while verdicts travel: E[N] / E[T(N)].

    The cycle from one rollback to the next. At 0 the correction has reached the edge, which drafts on and
    on and sends every g tokens. The cloud scores all that waits, one pass after another. The cycle ends when
    the verdict on the rejected token N is back. All that was drafted after it is lost; this is the rollback
    penalty, and it is in T(N), since the next cycle starts from nothing: g t_d + t_v + rtt at least. The
    verdict finds the edge in the middle of a token, which costs t_d / 2 more, unless the edge waits by then.

    `_pipeline` is the schedule while everything is accepted, so E[T] is the sum over its drafts of the chance
    that N is decided with them, times when their verdict is back. Times are constant within a cycle.

    Args:
        verify: tokens in a pass -> seconds.
    """
    g = num_draft_tokens
    num_drafts = max(-(-MAX_RUN // g), 2)
    while num_drafts > 2 and runs.survival[(num_drafts - 1) * g] < 1e-3:
        num_drafts -= 1
    drafts = _pipeline(num_drafts, g, max(window_tokens // g, 1), t_draft, verify, rtt)
    expected, reach, newest = 0.0, 1.0, 0
    for draft in drafts:
        while newest + 1 < len(drafts) and drafts[newest + 1].sent <= draft.verdict:
            newest += 1
        waits = drafts[newest].closes and drafts[newest].sent + (g + 1) * t_draft <= draft.verdict
        before, reach = reach, runs.survival[min(draft.decides, MAX_RUN)]
        expected += (before - reach) * (draft.verdict + (0.0 if waits else t_draft / 2))
    # Past the last draft looked at, the pipeline goes on at its pace so far.
    first, last = drafts[0], drafts[-1]
    pace = (last.verdict - first.verdict) / (last.decides - first.decides)
    expected += reach * (last.verdict + pace / runs.tail)
    return runs.mean / (expected - runs.ended * _half(g, t_draft, verify))


@dataclass(slots=True)
class _InPipeline:
    """A draft, while all is accepted."""

    sent: float
    closes: bool
    """It fills the window: the edge waits, and the verdict brings the target's own token."""
    verdict: float = 0.0
    """When it is back."""
    decides: int = 0
    """Up to which position of the run."""


def _pipeline(
    num_drafts: int, g: int, window: int, t_draft: float, verify: Callable[[int], float], rtt: float
) -> list[_InPipeline]:
    """What the edge sends and gets back while all is accepted, and the target's tokens are what it guesses.

    Args:
        num_drafts: at least.
        window: drafts in flight at most. Whether one fills it may hang on a fraction of a token's time, so a
            verdict frees its place only half a token later.
    """
    drafts: list[_InPipeline] = []
    num_judged = num_back = position = 0
    cloud_free = 0.0
    while num_judged < num_drafts:
        # What has arrived when the pass begins goes into it.
        end, begins = num_judged, 0.0
        while end == num_judged or not drafts[end - 1].closes:
            if end == len(drafts):
                sent = (drafts[-1].sent if drafts else 0.0) + g * t_draft
                if drafts and drafts[-1].closes:  # it has guessed the target's token, and drafted after it
                    sent = max(drafts[-1].verdict, sent + t_draft)
                    num_back = end
                while num_back < num_judged and drafts[num_back].verdict + t_draft / 2 <= sent:
                    num_back += 1
                drafts.append(_InPipeline(sent, closes=end + 1 - num_back >= window))
            arrives = drafts[end].sent + rtt / 2
            if end == num_judged:
                begins = max(arrives, cloud_free)
            elif arrives > begins or (end + 1 - num_judged) * g > MAX_RUN:
                break
            end += 1
        cloud_free = begins + verify((end - num_judged) * g)
        for draft in drafts[num_judged:end]:
            position += g + draft.closes
            draft.verdict, draft.decides = cloud_free + rtt / 2, position
        num_judged = end
    return drafts[:num_judged]
