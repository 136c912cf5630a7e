"""What one tenant of a service may have. Pure: settings and seconds in, decisions out."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import InvalidSetting

Count = Annotated[int, Ge(1)]
Seconds = Annotated[float, Gt(0.0), Field(allow_inf_nan=False)]


class Limits(BaseModel):
    """Unset ones are no limits, but for the times, which have defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    streams: Count | None = None
    """At once."""
    tokens_per_minute: Count | None = None
    """Of prompts, and tokens that the target scored or made."""
    context_tokens: Count | None = None
    """Prompt and completion of one stream."""
    max_draft_tokens: Count | None = None
    """Of one draft."""
    message_bytes: Count | None = None
    """Of one message from the edge."""
    idle_s: Seconds = 120.0
    """Without a message from the edge while the service waits for one."""
    reading_s: Seconds = 10.0
    """Until the edge takes a message off the link."""
    total_s: Seconds = 3600.0
    """Of one stream."""

    def replaced_by(self, other: Limits) -> Limits:
        """What `other` sets goes; the rest stays."""
        return self.model_copy(update={name: getattr(other, name) for name in other.model_fields_set})

    def narrowed_by(self, other: Limits) -> Limits:
        """The tighter of both.

        >>> Limits(streams=4).narrowed_by(Limits(streams=9, context_tokens=512)).context_tokens
        512
        """
        mine = {name: getattr(self, name) for name in Limits.model_fields}
        tighter = {
            name: value
            for name in other.model_fields_set
            if (value := getattr(other, name)) is not None and (mine[name] is None or value < mine[name])
        }
        return self.model_copy(update=tighter)


def smallest(limit: int | None, *others: int) -> int:
    """The least of what is set."""
    return min(others) if limit is None else min(limit, *others)


class Phase(Enum):
    """What a stream waits for."""

    EDGE = "edge"
    """A message of the edge."""
    TARGET = "target"
    """A place, or the target's work."""
    READER = "reader"
    """That the edge takes a message off the link."""


class Overdue(NamedTuple):
    """A stream that took too long."""

    limit: str
    """By its name in `Limits`."""
    why: str


def overdue(limits: Limits, phase: Phase, *, in_phase_s: float, in_all_s: float) -> Overdue | None:
    """Why a stream is to be cut off, if it is.

    >>> overdue(Limits(idle_s=5), Phase.EDGE, in_phase_s=6, in_all_s=9)
    Overdue(limit='idle_s', why='the edge was silent for 5 s')
    """
    if in_all_s > limits.total_s:
        return Overdue("total_s", f"the stream took longer than {limits.total_s:g} s")
    if phase is Phase.EDGE and in_phase_s > limits.idle_s:
        return Overdue("idle_s", f"the edge was silent for {limits.idle_s:g} s")
    if phase is Phase.READER and in_phase_s > limits.reading_s:
        return Overdue("reading_s", f"the edge did not read for {limits.reading_s:g} s")
    return None


def retry_after_s(previous: int, current: int, into_minute_s: float, limit: int) -> float:
    """Seconds until a tenant is below its tokens per minute again; 0 where it is.

    The minute before counts by the share of it that still lies within the last 60 s, as if its tokens had
    come evenly, so two counts per tenant are all that is kept.

    Args:
        previous, current: tokens of the last and of this minute.
        into_minute_s: [0, 60) of this minute.
        limit: tokens per minute, >= 1.

    >>> retry_after_s(0, 100, 15.0, 100)
    45.0
    >>> retry_after_s(100, 0, 0.0, 50)
    30.0
    """
    used = previous * (1.0 - into_minute_s / 60.0) + current
    if used < limit:
        return 0.0
    if current < limit:
        return 60.0 * (1.0 - (limit - current) / previous) - into_minute_s
    return 60.0 - into_minute_s + 60.0 * (1.0 - limit / current)


def limits_from(texts: dict[str, Any]) -> Limits:
    """Check limits that somebody typed, by name.

    Raises:
        InvalidSetting: names the limit.
    """
    for name in texts:
        if name not in Limits.model_fields:
            raise InvalidSetting(f"there is no limit {name!r}; known are {', '.join(Limits.model_fields)}")
    try:
        return Limits(**texts)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidSetting(
            f"{first['loc'][0]} = {first['input']} cannot be used: {first['msg'].lower()}"
        ) from None
