"""What a caller of the agent receives while a request is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.controller import Chosen
from shared.drafts import Source
from shared.messages import FinishReason, Policy
from shared.routing import Decision
from shared.session import Origin


@dataclass(frozen=True, slots=True)
class Token:
    """A committed token; what may be shown of its text follows as `Text`."""

    id: int
    piece: bytes
    """Its bytes; may be part of a character, or empty for a special token."""
    origin: Origin
    logprob: float | None = None
    """Nats, by the edge model, in mode `local`."""
    source: Source | None = None
    """Who proposed an accepted token."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know; one line."""

    message: str


@dataclass(frozen=True, slots=True)
class Text:
    """Committed text that will not be taken back."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Provisional:
    """The not yet verified text that now follows all `Text` so far, for views that can take text back.

    It replaces the provisional text shown before. A `Text` ends it too: those of a verdict are followed at
    once by what is provisional then.
    """

    text: str
    """Whole characters only; may be empty."""
    num_tokens: int
    """Unverified tokens; their text may be empty still, or cut at a stop string."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Other requests use the edge model; comes again when the position changes."""

    position: int
    """1 is next."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Who answers; comes first, and again where late evidence or a lost cloud changed it."""

    mode: str
    """`local`, `cloud`, `speculate` or `guide`."""
    decision: Decision | None = None
    """Of the router, in mode `auto`."""
    reason: str | None = None
    """Why the mode is not the one asked for."""


@dataclass(frozen=True, slots=True)
class Round:
    """A verdict."""

    num_drafted: int
    """Draft tokens that it answers."""
    num_accepted: int


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """How the speed controller got the target's answer, and what it knew in the end."""

    ways: tuple[Chosen, ...]
    """One after the other; a stream of drafts may have changed their length on its way."""
    measured: Mapping[str, object]
    """As `SpeedController.measured`."""
    explanation: tuple[str, ...]
    """For a person, a line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The whole result; the last event of a request."""

    answer: str
    mode: str
    """How it was made; in `auto`, the route."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    rounds: int
    """Verifications; 0 unless the mode is `speculate`."""
    target_passes: int
    """Passes of the target after it read the prompt: verifications, and tokens that it made on its own."""
    guidance_tokens: int
    """Tokens of the target that the edge went on from; 0 unless the mode is `guide`."""
    policy: Policy | None
    """Of verification, in force; None unless the mode is `speculate`."""
    acceptance_length: float | None
    """Committed tokens per round: accepted ones and the target's own, 1 to draft length + 1."""
    drafted_tokens: int
    accepted_tokens: int
    ttft_ms: float | None
    """Request sent to first token committed."""
    tpot_ms: float | None
    """(last token - first token) / (completion_tokens - 1)."""
    bytes_per_token: float | None
    """Serialised Drafts, Verdicts and Tokens per committed token, both directions, without framing."""
    seed: int | None
    """Of the noise; None where the cloud drew by noise of its own, which no seed repeats."""
    edge_model: str | None
    cloud_model: str | None
    tokens: tuple[Token, ...]
    decision: Decision | None = None
    """Of the router, in mode `auto`."""
    speed: SpeedReport | None = None
    """Where the speed controller chose the way."""
    reason: str | None = None
    """Why the mode is not the one asked for; None where the router chose."""


Event = Waiting | Notice | Routed | Token | Text | Provisional | Round | Answer
