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

    @classmethod
    def from_hazards(cls, hazards: Sequence[float]) -> Runs:
        """
        Args:
            hazards: [MAX_RUN]; entry n is the chance that token n + 1 is rejected when those before it stand.
        """
        survival = tuple(accumulate((1.0 - h for h in hazards), mul, initial=1.0))
        return cls(survival, max(hazards[-1], 1e-3))

    @property
    def mean(self) -> float:
        """E[N]: tokens that a run commits, the correction included."""
        return sum(self.survival[:-1]) + self.survival[-1] / self.tail

    def mean_groups(self, size: int) -> float:
        """E[ceil(N / size)]: how many groups of `size` tokens it takes to meet the rejection."""
        return sum(self.survival[0:MAX_RUN:size]) + self.survival[-1] / (self.tail * size)


def stop_and_wait_rate(
    runs: Runs, num_draft_tokens: int, t_draft: float, t_verify: float, rtt: float
) -> float:
    """Tokens per second of stop-and-wait: tau / (g t_d + t_v + rtt) as in `stop_and_wait_tokens_per_s`.

    A round accepted whole gains g + 1 tokens, its bonus being the run's next one, so a run of N takes
    ceil(N / (g + 1)) rounds and tau = E[N] / E[ceil(N / (g + 1))]: Leviathan's tau where N is geometric.
    """
    tau = runs.mean / runs.mean_groups(num_draft_tokens + 1)
    return tau / (num_draft_tokens * t_draft + t_verify + rtt)


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
    on, sends every g tokens and stops only while `window_tokens` are in flight. The cloud scores all that
    waits, one pass after another. The rejected token N lies in draft j = ceil(N / g), and the cycle ends when
    the verdict of the pass with draft j is back: T(N) = V_j. All that was drafted after it is lost; this is
    the rollback penalty, and it is in V_j, since the next cycle starts from nothing: g t_d + t_v + rtt at
    least. A verdict finds the edge in the middle of a token, which costs t_d / 2 more, unless the window is
    full by then.

    V_j is the time of the pipeline while everything is accepted (`_pipeline`), so
    E[T] = sum over j of P(N in draft j) V_j. Times are taken as constant within a cycle.

    Args:
        verify: tokens in a pass -> seconds.
    """
    g = num_draft_tokens
    num_drafts = max(-(-MAX_RUN // g), 2)
    while num_drafts > 2 and runs.survival[(num_drafts - 1) * g] < 1e-3:
        num_drafts -= 1
    window = max(window_tokens // g, 1)
    sent, verdicts = _pipeline(num_drafts, g, window, t_draft, verify, rtt)
    for j in range(num_drafts):
        if sent[j] + (window - 1) * g * t_draft > verdicts[j]:
            verdicts[j] += t_draft / 2
    reach = [runs.survival[min(j * g, MAX_RUN)] for j in range(num_drafts + 1)]
    expected = sum((reach[j] - reach[j + 1]) * verdicts[j] for j in range(num_drafts))
    # Past the last draft looked at, the pipeline goes on at its pace so far.
    pace = (verdicts[-1] - verdicts[0]) / (num_drafts - 1)
    further = 1.0 / (1.0 - (1.0 - runs.tail) ** g)
    expected += reach[-1] * (verdicts[-1] + further * pace)
    return runs.mean / expected


def _pipeline(
    num_drafts: int, g: int, window: int, t_draft: float, verify: Callable[[int], float], rtt: float
) -> tuple[list[float], list[float]]:
    """When the edge sends each draft and when its verdict is back, while all are accepted.

    Args:
        window: drafts in flight at most.
    """
    sent: list[float] = []
    verdicts: list[float] = []
    cloud_free = 0.0
    while len(verdicts) < num_drafts:
        first = len(verdicts)
        begins = 0.0
        # What has arrived when the pass begins goes into it; a draft beyond the window is not sent yet.
        for j in range(first, min(first + window, num_drafts)):
            if j == len(sent):
                opened = verdicts[j - window] if j >= window else 0.0
                sent.append(max(sent[-1] if sent else 0.0, opened) + g * t_draft)
            arrives = sent[j] + rtt / 2
            if j == first:
                begins = max(arrives, cloud_free)
            elif arrives > begins or (j - first + 1) * g > MAX_RUN:
                break
        else:
            j = min(first + window, num_drafts)
        cloud_free = begins + verify((j - first) * g)
        verdicts += [cloud_free + rtt / 2] * (j - first)
    return sent, verdicts
