"""Whether a draft token means the same bytes on the target.

Models of one family pad their tables differently (151,936 and 152,064 rows) and add special tokens
of their own. What counts is the ids that the edge can propose: padding and special tokens that only
one side has are masked; any text token that differs makes the pair incompatible.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from shared.errors import VocabularyMismatch


class TokenKind(IntEnum):
    PADDING = 0
    """A row of the table that no text stands behind."""
    TEXT = 1
    SPECIAL = 2


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, indexed by id."""

    name: str
    """The model's, for messages."""
    pieces: Sequence[bytes]
    kinds: Sequence[TokenKind]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of every token that is not padding: equal ones need no further comparison.

        The hash runs over (id as uint32, kind as uint8, length as uint32, bytes), little-endian,
        by ascending id.
        """
        entries = zip(self.kinds, self.pieces, strict=True)
        return hashlib.sha256(
            b"".join(
                struct.pack("<IBI", i, kind, len(piece)) + piece
                for i, (kind, piece) in enumerate(entries)
                if kind != TokenKind.PADDING
            )
        ).hexdigest()

    @cached_property
    def legal_ids(self) -> frozenset[int]:
        """Ids with a meaning."""
        return frozenset(i for i, kind in enumerate(self.kinds) if kind != TokenKind.PADDING)


def ids_to_mask(edge: Vocabulary, target: Vocabulary) -> frozenset[int]:
    """Find the edge's ids that it must never propose to this target.

    Raises:
        VocabularyMismatch: a text token of the edge means other bytes on the target; names both models.
    """
    if edge.sha256 == target.sha256:
        return frozenset()
    masked = set()
    for i, (kind, piece) in enumerate(zip(edge.kinds, edge.pieces, strict=True)):
        same = i < len(target.pieces) and target.kinds[i] == kind and target.pieces[i] == piece
        if kind == TokenKind.PADDING or same:
            continue
        if kind == TokenKind.TEXT:
            theirs = repr(target.pieces[i]) if i < len(target.pieces) else "nothing"
            raise VocabularyMismatch(
                f"{edge.name} and {target.name} do not share a vocabulary: token {i} is {piece!r} at the edge"
                f" and {theirs} in the cloud; choose models of one family, or use --mode cloud"
            )
        masked.add(i)
    return frozenset(masked)
