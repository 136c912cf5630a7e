"""What the doctor finds out before it judges anything. No I/O: `edge_agent.doctor.gather` fills these in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from edge_agent.bench import DraftSpeed, Forecast, LinkSpeed
from edge_agent.replica import ReplicaStatus
from shared.config import EdgeConfig
from shared.routing import Decision


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """llama.cpp as it is installed."""

    version: str
    features: Mapping[str, bool]
    """What its CPU kernels were compiled for, and further switches, by llama.cpp's names."""
    offloads: bool
    """It was compiled for a GPU."""
    cpu_flags: frozenset[str]
    """What this CPU can do, by the kernel's names; empty where the system does not say."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The edge model's file."""

    name: str
    path: str | None
    """None where it is not there."""
    size_bytes: int
    """Of the file, or what is to be downloaded."""
    expected_sha256: str | None
    """None for a file that is not of the registry."""
    sha256: str | None
    error: str | None
    """Why it cannot be used, or loaded."""


class TlsFault(Enum):
    """Why a handshake failed."""

    EXPIRED = auto()
    NOT_YET_VALID = auto()
    OTHER_NAME = auto()
    """The certificate is not for the name that was asked."""
    UNKNOWN_AUTHORITY = auto()
    PLAIN_TEXT = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """A replica's encryption, looked at beside gRPC. Neither fault nor certificate: nobody answered."""

    address: str
    fault: TlsFault | None = None
    error: str | None = None
    """What OpenSSL says of the fault."""
    expires_in_s: float | None = None
    """Of the replica's certificate."""


@dataclass(frozen=True, slots=True)
class CloudFacts:
    """The service, as far as it answers."""

    address: str
    error: str | None
    replicas: tuple[ReplicaStatus, ...] = ()
    model: str | None = None
    target: str | None = None
    context_tokens: int = 0
    clock_ahead_s: float | None = None
    """Its clock minus this one; None where it does not say."""
    num_masked: int | None = None
    """Ids of the edge that the target does not know; None where the vocabularies were not compared."""
    vocabulary_error: str | None = None
    """Why they do not match."""


@dataclass(frozen=True, slots=True)
class Facts:
    settings: EdgeConfig
    python: tuple[int, int, int]
    system: str
    """Operating system and machine."""
    engine: EngineFacts | None
    """None where llama.cpp is not installed."""
    available_bytes: int
    """Memory that can be used without swapping, before the model was loaded."""
    model: ModelFacts
    cache_bytes: int | None
    """Of the edge's KV cache; None where the model was not loaded."""
    tls: tuple[TlsFacts, ...]
    """Of each replica; none where the connection is plain text."""
    cloud: CloudFacts | None
    """None where the settings ask no cloud."""
    unix_time: float
    calibration: str | None
    """What the router's calibration was fitted on; None without one."""
    threshold: float
    """Probability from which on `auto` asks the cloud."""
    easy: Decision
    """Of `auto`, for a question that the edge can answer."""
    hard: Decision
    """Of `auto`, for one that surely needs the cloud."""
    draft: DraftSpeed | None
    link: LinkSpeed | None
    measure_error: str | None
    forecast: tuple[Forecast, ...]
    """Of speculation, at `acceptance_rate`."""
    acceptance_rate: float
