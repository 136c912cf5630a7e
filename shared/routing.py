"""The decision who answers: estimates and circumstances in, a route and its reasons out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Route(str, Enum):
    LOCAL = "local"
    SPECULATE = "speculate"
    CLOUD = "cloud"
    GUIDE = "guide"


@dataclass(frozen=True, slots=True)
class Link:
    """The way to the cloud."""

    up: bool
    rtt_s: float | None = None
    """A small request's round trip; None where it is not up."""
    detail: str = ""
    """Why it is not up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user allows."""

    threshold: float
    """In [0, 1]: the cloud is asked when it is needed with at least this probability."""
    slow_rtt_s: float = math.inf
    """A longer round trip gets the cloud's own stream; infinity leaves that to the speed controller."""
    price_per_1k_tokens: float = 0.0
    """Of the cloud's completion tokens, >= 0, in any currency."""
    max_price: float | None = None
    """Of one answer, in the same currency; None is any."""
    guidance_tokens: int = 128
    """Of the target, where it only begins the answer; >= 1."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    route: Route
    p_cloud: float
    """Probability that the cloud is needed, in [0, 1]."""
    predicted_tokens: int
    """Length of the answer."""
    reasons: tuple[str, ...]
    probes: Mapping[str, Any] = field(default_factory=dict)
    """What each probe said, by name."""


SHORT_ANSWER_TOKENS = 4
"""An answer no longer than one draft has nothing to speculate on."""


def decide(
    *,
    p_cloud: float,
    predicted_tokens: int,
    link: Link,
    private: str | None,
    fits_edge: bool,
    can_draft: bool,
    limits: Limits,
) -> Decision:
    """Choose the route; the first rule that applies wins.

    1. A private prompt stays on the device, whatever else holds.
    2. Without a link the edge answers.
    3. A prompt longer than the edge's context needs the cloud, whose own stream it gets.
    4. An answer whose expected price is above the budget is made by the edge; where the cloud is needed and
       the budget is enough for the beginning, the target begins it.
    5. Below the threshold the edge answers.
    6. Otherwise the answer is the target's: by speculation, or by its own stream where the edge cannot draft
       or speculation would lose (a link slower than allowed, an answer that is too short). Among the ways
       of the route `speculate` the speed controller chooses, the cloud's own stream included.

    Only this function may choose `local`, which is another model's answer; what makes the target's
    answer fast is decided elsewhere too.

    Args:
        p_cloud: in [0, 1].
        private: why the prompt must not leave the device; None where it may.
        fits_edge: whether prompt and an answer fit the edge's context.
        can_draft: whether the edge model can roll back the drafts that the target rejects.
    """

    def to(route: Route, *reasons: str) -> Decision:
        return Decision(route=route, p_cloud=p_cloud, predicted_tokens=predicted_tokens, reasons=reasons)

    if private is not None:
        return to(Route.LOCAL, f"private: {private}; it stays on this device")
    if not link.up:
        return to(Route.LOCAL, f"no cloud: {link.detail}")
    if not fits_edge:
        return to(Route.CLOUD, "the prompt is longer than the edge's context")
    likely = f"the cloud is needed with probability {p_cloud:.2f}"
    needed = f"{likely}, at or above the threshold {limits.threshold:.2f}"
    price = predicted_tokens * limits.price_per_1k_tokens / 1000
    if limits.max_price is not None and price > limits.max_price:
        over = f"the cloud's answer would cost about {price:.3g}, over the budget of {limits.max_price:g}"
        guidance = limits.guidance_tokens * limits.price_per_1k_tokens / 1000
        if p_cloud < limits.threshold or guidance > limits.max_price:
            return to(Route.LOCAL, over)
        begun = f"the target begins with {limits.guidance_tokens} tokens, for {guidance:.3g} at most"
        return to(Route.GUIDE, needed, over, begun)
    if p_cloud < limits.threshold:
        return to(Route.LOCAL, f"{likely}, below the threshold {limits.threshold:.2f}")
    if not can_draft:
        return to(Route.CLOUD, needed, "the edge model cannot roll back drafts: it keeps a recurrent state")
    if link.rtt_s is not None and link.rtt_s > limits.slow_rtt_s:
        slow = f"{1e3 * link.rtt_s:.0f} ms round trip, more than {1e3 * limits.slow_rtt_s:.0f}"
        return to(Route.CLOUD, needed, f"the link is slow ({slow}): speculation would lose")
    if predicted_tokens <= SHORT_ANSWER_TOKENS:
        return to(Route.CLOUD, needed, f"about {predicted_tokens} tokens are too few to speculate on")
    return to(Route.SPECULATE, needed)


WATCH_TOKENS = 8
"""Late evidence looks at this many last tokens; a watched answer is shown this far behind."""


class DoubtWatch:
    """Late evidence: is the edge sure of what it is writing?

    Doubt is a geometric mean of the last `WATCH_TOKENS` tokens' probabilities below a threshold, or of all
    tokens of an answer that ended sooner.
    """

    def __init__(self, threshold: float) -> None:
        """
        Args:
            threshold: probability in [0, 1]; 0 never doubts.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self._threshold = threshold
        self._logprobs: list[float] = []

    def doubts(self, logprob: float) -> bool:
        """Take the next token's log-probability, nats; True once there is reason for doubt."""
        self._logprobs = [*self._logprobs, logprob][-WATCH_TOKENS:]
        return len(self._logprobs) == WATCH_TOKENS and self.doubts_at_end()

    def doubts_at_end(self) -> bool:
        return bool(self._logprobs) and math.exp(sum(self._logprobs) / len(self._logprobs)) < self._threshold
