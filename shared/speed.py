"""What speculation over a link can gain: formulas, numbers in and numbers out.

All times are seconds. Terms: draft length g, acceptance rate a, time per draft token t_d, time to verify g
tokens t_v, time of one target step t_t, round trip rtt.
"""

from __future__ import annotations


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
