"""Drafts copied from text that is there already: where the last words stood before, what came next.

Pure: the text in, a copy out. `lookup` copies from the text itself, `retrieval` from a store.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Copy:
    """A continuation that was found, and how much of the text's end it was found by."""

    token_ids: tuple[int, ...]
    match_length: int
    """Tokens at the end of the text that also stand before what was copied; 0 where nothing was found."""


NOTHING = Copy((), 0)


class Copier(Protocol):
    def copy(self, text_ids: Sequence[int], num_tokens: int) -> Copy:
        """Find up to `num_tokens` that may follow the text."""


def cut(
    token_ids: Sequence[int], *, end_token_ids: Collection[int], masked_ids: Collection[int]
) -> tuple[int, ...]:
    """Keep what can be a draft: up to the first end of text, that included, and before any masked id.

    >>> cut([1, 2, 9, 3], end_token_ids={9}, masked_ids=())
    (1, 2, 9)
    >>> cut([1, 2, 9, 3], end_token_ids=(), masked_ids={2})
    (1,)
    """
    kept: list[int] = []
    for token in token_ids:
        if token in masked_ids:
            break
        kept.append(token)
        if token in end_token_ids:
            break
    return tuple(kept)
