"""What a mode yields while it makes an answer."""

from __future__ import annotations

from dataclasses import dataclass

from shared.controller import Chosen
from shared.events import Notice, Round, Token
from shared.messages import FinishReason, Opened, Policy
from shared.routing import Decision


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt is in: comes once, before any token."""

    num_prompt_tokens: int
    cloud_model: str | None
    policy: Policy | None = None
    """In force, in mode `speculate`."""
    opened: Opened | None = None
    """What the cloud said to the stream; None in mode `local`."""

    @property
    def own_noise(self) -> bool:
        """Whether no seed repeats what the cloud draws."""
        return self.opened is not None and self.opened.own_noise


@dataclass(frozen=True, slots=True)
class Drafted:
    """Every token that is drafted and neither verified nor rejected, after those committed so far."""

    pieces: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """The stream was lost, and goes on with the token that follows."""

    after_s: float
    """Since the loss."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Mode `auto`: the router's decision, and again where late evidence changed it."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Replaced:
    """Another mode than the one asked for, without the router."""

    mode: str
    reason: str


Step = Replaced | Prompted | Round | Token | Drafted | Resumed | FinishReason | Decided | Chosen | Notice
