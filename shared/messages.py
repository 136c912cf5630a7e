"""The messages of a stream, as both ends' state machines see them; `protos.wire` carries them.

Fields are those of `protos/duet/v1/speculation.proto`, where each is explained.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shared.sampling import Sampling
from shared.shaping import NO_SHAPING, Shaping


class FinishReason(str, Enum):
    STOP = "stop"
    """The target ended its text, or a stop string was met."""
    LENGTH = "length"
    """max_tokens or the context is used up."""
    DRAIN = "drain"
    """The service is leaving; resume elsewhere."""


class Policy(str, Enum):
    """How the target verifies drafts; see `shared.policies`."""

    LOSSLESS = "lossless"
    """Tokens that are the target's own stand."""
    BILD = "bild"
    """Tokens that the target finds likely enough stand."""
    JUDGE = "judge"
    """Tokens that a linear head on the target's hidden states finds right stand."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """`prompt` is a chat, or token ids that are used as they stand."""

    prompt: tuple[Message, ...] | tuple[int, ...]
    sampling: Sampling
    seed: int
    committed: tuple[int, ...] = ()
    policy: Policy = Policy.LOSSLESS
    rollback_threshold: float | None = None
    """Nats, > 0, under `bild`; None leaves it to the service."""
    max_tokens: int | None = None
    predicted_length: int | None = None
    shaping: Shaping = NO_SHAPING
    """Of a text that the model writes alone; a stream of drafts takes none."""
    any_noise: bool = False
    """Nobody asked for the seed's own text: any of the same distribution will do."""

    @property
    def messages(self) -> list[Message]:
        """The chat; empty where token ids are given."""
        return [part for part in self.prompt if isinstance(part, Message)]

    @property
    def token_ids(self) -> list[int]:
        """Those given as they stand; empty where it is a chat."""
        return [part for part in self.prompt if isinstance(part, int)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    model: str
    prompt_token_ids: tuple[int, ...]
    end_token_ids: frozenset[int]
    sampling: Sampling
    max_tokens: int
    max_draft_tokens: int
    vocabulary_sha256: str
    shaping: Shaping = NO_SHAPING
    policy: Policy = Policy.LOSSLESS
    rollback_threshold: float | None = None
    """Nats; None unless the policy is `bild`."""
    own_noise: bool = False
    """Tokens are drawn by noise of the service's own, which the seed does not repeat."""


@dataclass(frozen=True, slots=True)
class Draft:
    epoch: int
    start: int
    token_ids: tuple[int, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Timings:
    queue_us: int = 0
    verify_us: int = 0


NO_TIMINGS = Timings()


@dataclass(frozen=True, slots=True)
class Verdict:
    epoch: int
    start: int
    num_scored: int
    num_accepted: int
    next_token: int | None
    timings: Timings = NO_TIMINGS
    stream_instead: bool = False
    """Drafts cost the target more than they gain it: better to go on as its own stream."""


@dataclass(frozen=True, slots=True)
class Tokens:
    start: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    rounds: int
    target_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    usage: Usage
