"""Draft tokens as the edge sees them: who proposed each, and how sure of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Source(str, Enum):
    """Who proposed a draft token."""

    MODEL = "model"
    LOOKUP = "lookup"
    """Copied from the prompt or the answer so far."""
    RETRIEVAL = "retrieval"
    """Copied from a local store of documents and past answers."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A draft token."""

    token_id: int
    prob: float | None
    """The drafter's own probability of it before sampling settings; None where it has none."""
    source: Source
