"""Prompt lookup: copy from the prompt and the answer so far.

The reference copying of LLMA (Yang et al. 2023, arXiv:2304.04487) with the text itself as the reference:
the longest n-gram at the text's end that stood there before is found, and what followed it is proposed.
Quotes, edits, summaries and code repeat themselves; on other text nothing matches and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.drafting.copying import NOTHING, Copy

MIN_NGRAM = 2
MAX_NGRAM = 6
"""Longer matches are measured, but not sought: their last MAX_NGRAM tokens find them."""
_MEASURED = 32
"""No match counts as longer than this."""


class LookupCopier:
    """Remembers where each n-gram of a text was seen last, while the text grows and is cut back.

    The time is proportional to the tokens that were added or dropped since the last call, but for the
    comparison that finds them.
    """

    def __init__(self, *, min_ngram: int = MIN_NGRAM, max_ngram: int = MAX_NGRAM) -> None:
        """
        Raises:
            ValueError: unless 1 <= min_ngram <= max_ngram.
        """
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-grams of {min_ngram} to {max_ngram} tokens do not exist")
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._text: list[int] = []
        self._next_of: dict[tuple[int, ...], int] = {}
        """n-gram -> position of the token after its latest occurrence."""
        self._undo: list[list[tuple[tuple[int, ...], int | None]]] = []
        """For each token, the entries that it changed, and what they were."""

    def copy(self, text_ids: Sequence[int], num_tokens: int) -> Copy:
        """What followed the text's longest known end last time; beyond the text's end it repeats itself.

        >>> LookupCopier().copy([1, 2, 3, 4, 9, 1, 2], 3)
        Copy(token_ids=(3, 4, 9), match_length=2)
        >>> LookupCopier().copy([7, 8, 7, 8], 5).token_ids
        (7, 8, 7, 8, 7)
        """
        self._follow(text_ids)
        for size in self._sizes:
            if size > len(self._text):
                continue
            found = self._next_of.get(tuple(self._text[-size:]))
            if found is not None:
                period = len(self._text) - found
                copied = tuple(self._text[found + i % period] for i in range(num_tokens))
                return Copy(copied, self._match_length(found)) if copied else NOTHING
        return NOTHING

    def _match_length(self, found: int) -> int:
        """How far back the text before `found` equals the text's end."""
        text, length = self._text, 0
        while length < min(found, _MEASURED) and text[found - 1 - length] == text[-1 - length]:
            length += 1
        return length

    def _follow(self, text_ids: Sequence[int]) -> None:
        kept = _common_prefix(self._text, text_ids)
        while len(self._text) > kept:
            self._text.pop()
            for ngram, before in reversed(self._undo.pop()):
                if before is None:
                    del self._next_of[ngram]
                else:
                    self._next_of[ngram] = before
        for token in text_ids[kept:]:
            self._append(token)

    def _append(self, token: int) -> None:
        """The n-grams that end right before the token now have something that follows them."""
        end = len(self._text)
        changed = []
        for size in self._sizes:
            if size <= end:
                ngram = tuple(self._text[end - size :])
                changed.append((ngram, self._next_of.get(ngram)))
                self._next_of[ngram] = end
        self._undo.append(changed)
        self._text.append(token)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
