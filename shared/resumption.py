"""What becomes of a stream that broke: whether it can go on, where, and what the edge does meanwhile."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from shared.errors import (
    CloudError,
    CloudFailed,
    CloudOverloaded,
    CloudUnavailable,
    DuetError,
    QuotaExceeded,
    StreamExpired,
    VerifyTimeout,
)
from shared.messages import Open, Opened


class OnOutage(str, Enum):
    """What an answer does while no replica of the cloud can be reached."""

    WAIT = "wait"
    """Nothing, until the cloud is back or the patience ends; then it fails, and what is committed stands."""
    CONTINUE = "continue"
    """The edge model writes on; its tokens are provisional until the target has verified them."""
    STOP = "stop"
    """It fails at once, unless another replica takes the stream."""


def is_resumable(error: DuetError) -> bool:
    """Whether the same stream may do better at another time or another replica."""
    return isinstance(
        error,
        CloudUnavailable | CloudOverloaded | CloudFailed | VerifyTimeout | QuotaExceeded | StreamExpired,
    )


def shows_absence(error: CloudError) -> bool:
    """Whether the error speaks against the replica, and not only against this request."""
    return isinstance(error, CloudUnavailable | VerifyTimeout)


def to_resume(request: Open, opened: Opened, committed: tuple[int, ...]) -> Open:
    """The request that carries a stream on: what is in force is asked for, so that no default moves it.

    Args:
        opened: what the stream was told when it first began.
        committed: all completion tokens that verdicts have committed.
    """
    return replace(
        request,
        committed=committed,
        sampling=opened.sampling,
        policy=opened.policy,
        rollback_threshold=opened.rollback_threshold,
        max_tokens=opened.max_tokens,
    )


def carries_on(first: Opened, again: Opened) -> bool:
    """Whether a replica would write the same text: the same model reads the same prompt by the same rules."""
    return replace(again, max_draft_tokens=first.max_draft_tokens) == first
