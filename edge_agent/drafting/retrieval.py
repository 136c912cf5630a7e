"""Retrieval: copy from documents, where the longest end of the text stands in them.

The datastore of REST (He et al. 2023, arXiv:2311.08252), a suffix array, with one difference: suffixes are
sorted by their first `DEPTH` tokens only, as longer contexts are not asked for. What is stored is `store`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.drafting.copying import NOTHING, Copy

DEPTH = 16
"""Tokens by which suffixes are sorted; a power of two."""
MIN_MATCH = 2
_MAX_OCCURRENCES = 256
"""Of one context, this many at most vote for what follows."""
_SEPARATOR = 2**31 - 1
"""Stands between documents, so that nothing is copied across; no vocabulary is so large."""

Tokens = NDArray[np.int64]


class SuffixIndex:
    """Fixed documents, searched by the end of a growing text."""

    def __init__(self, documents: Sequence[Sequence[int] | Tokens]) -> None:
        parts: list[Tokens] = []
        for document in documents:
            parts += [np.asarray(document, np.int64), np.array([_SEPARATOR])]
        self._tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        self._order = _sorted_suffixes(self._tokens)

    def __len__(self) -> int:
        """Tokens, separators not counted."""
        return int(np.count_nonzero(self._tokens != _SEPARATOR))

    def copy(self, text_ids: Sequence[int], num_tokens: int) -> Copy:
        """The most frequent continuation of the longest end of the text that a document holds.

        Token by token the commonest is taken, among the occurrences that agree with those taken before;
        of equally common ones the lowest id.

        >>> index = SuffixIndex([[1, 2, 3, 4], [1, 2, 3, 5], [9, 1, 2, 3, 5]])
        >>> index.copy([8, 1, 2], 2)
        Copy(token_ids=(3, 5), match_length=2)
        """
        low = high = length = 0
        shortest, longest = MIN_MATCH, min(DEPTH, len(text_ids))
        while shortest <= longest:  # where a context stands, every shorter end of it stands too
            middle = (shortest + longest) // 2
            found = self._range(text_ids[len(text_ids) - middle :])
            if found[0] < found[1]:
                (low, high), length, shortest = found, middle, middle + 1
            else:
                longest = middle - 1
        if length == 0:
            return NOTHING
        step = -(-(high - low) // _MAX_OCCURRENCES)
        at = self._order[low:high:step] + length
        copied = self._commonest(at, num_tokens)
        return Copy(copied, length) if copied else NOTHING

    def _range(self, context: Sequence[int]) -> tuple[int, int]:
        """The suffixes that begin with a context, as a range of the order."""
        return self._bisect(context, after=False), self._bisect(context, after=True)

    def _bisect(self, context: Sequence[int], *, after: bool) -> int:
        wanted = list(context)
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            begin = self._order[middle]
            here = self._tokens[begin : begin + len(wanted)].tolist()
            if here < wanted or (after and here == wanted):
                low = middle + 1
            else:
                high = middle
        return low

    def _commonest(self, at: Tokens, num_tokens: int) -> tuple[int, ...]:
        copied: list[int] = []
        while len(copied) < num_tokens:
            following = self._tokens[at]
            following, at = following[following != _SEPARATOR], at[following != _SEPARATOR]
            if not len(following):
                break
            votes = Counter(following.tolist())
            token = min(votes, key=lambda t: (-votes[t], t))
            copied.append(token)
            at = at[following == token] + 1
        return tuple(copied)


def _sorted_suffixes(tokens: Tokens) -> Tokens:
    """Positions of `tokens`, sorted by the DEPTH tokens from there on.

    Prefix doubling (Manber and Myers 1993, doi:10.1137/0222058), stopped at DEPTH.
    """
    if not len(tokens):
        return np.zeros(0, np.int64)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64) + 1
    width = 1
    while width < DEPTH:
        beyond = np.zeros_like(rank)
        beyond[:-width] = rank[width:]
        pairs = rank * (len(tokens) + 2) + beyond
        rank = np.unique(pairs, return_inverse=True)[1].astype(np.int64) + 1
        width *= 2
    return np.argsort(rank, kind="stable")
