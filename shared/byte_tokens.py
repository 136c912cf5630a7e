"""Tokens from bytes with nothing but a vocabulary: for a model whose tokenizer is on another machine.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) with a merge's rank read from the merged piece's
id, since vocabularies list their merges in the order learnt. What a tokenizer does before its merges (how
it splits text into words) is not known here, so a text's tokens may differ from the model's own now and
then; their bytes never do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from shared.vocab import TokenKind, Vocabulary

_NEVER = 2**62
_ESCAPED = re.compile("([\udc80-\udcff]+)")


class ByteTokenizer:
    """Splits bytes, whole characters or not, into text tokens, never into special ones."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._kinds = vocabulary.kinds
        self._id_of: dict[bytes, int] = {}
        for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True)):
            if kind is TokenKind.TEXT and piece:
                self._id_of.setdefault(piece, i)

    def encode(self, text: bytes) -> list[int]:
        """Token ids that stand for the bytes, up to the first byte that no token holds.

        >>> kinds = [TokenKind.TEXT] * 5
        >>> ByteTokenizer(Vocabulary("m", [b"a", b"b", b"ab", b"c", b"abc"], kinds)).encode(b"ababc")
        [2, 4]
        """
        parts = self._units(text)
        ranks = [self._rank(a, b) for a, b in pairwise(parts)]
        while ranks and (best := min(ranks)) < _NEVER:
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = self._rank(parts[i - 1], parts[i])
            if i < len(ranks):
                ranks[i] = self._rank(parts[i], parts[i + 1])
        return [self._id_of[part] for part in parts]

    def decode(self, token_ids: Sequence[int]) -> bytes:
        """The bytes that a user sees; special tokens have none."""
        return b"".join(self._pieces[t] for t in token_ids if self._kinds[t] is TokenKind.TEXT)

    def _units(self, text: bytes) -> list[bytes]:
        """Characters where they are tokens themselves, their bytes otherwise."""
        units: list[bytes] = []
        for character in text.decode("utf-8", "surrogateescape"):
            whole = character.encode("utf-8", "surrogateescape")
            for unit in [whole] if whole in self._id_of else [whole[i : i + 1] for i in range(len(whole))]:
                if unit not in self._id_of:
                    return units
                units.append(unit)
        return units

    def _rank(self, left: bytes, right: bytes) -> int:
        return self._id_of.get(left + right, _NEVER)


def valid_runs(text: bytes) -> list[str | bytes]:
    """Split bytes into runs of whole characters, as text, and the bytes between them that are none.

    >>> valid_runs("né".encode()[:-1] + b"x")
    ['n', b'\\xc3', 'x']
    """
    runs: list[str | bytes] = []
    for i, run in enumerate(_ESCAPED.split(text.decode("utf-8", "surrogateescape"))):
        if run:
            runs.append(run.encode("utf-8", "surrogateescape") if i % 2 else run)
    return runs
