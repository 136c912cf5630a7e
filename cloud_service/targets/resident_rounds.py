"""How a round of a resident session is followed through the tokens that the engine makes. Pure.

The engine may answer a draft in pieces: no more than its own number of speculative tokens at a time, and one
token unasked where it had to compute the text again. So both sides follow the text, not the count of
steps: a round is done once a token differs from the draft, or one came after all of it.
"""

from __future__ import annotations

from collections.abc import Sequence


class PendingRound:
    """A draft and how much of it the engine has answered.

    >>> round_ = PendingRound(start=10, draft=[5, 6, 7])
    >>> round_.receive([5])
    >>> round_.rest(limit=8), round_.done
    ([6, 7], False)
    >>> round_.receive([6, 9])
    >>> round_.made, round_.done
    ([5, 6, 9], True)
    """

    def __init__(self, start: int, draft: Sequence[int]) -> None:
        """
        Args:
            start: tokens of the text before the draft.
            draft: may be empty, which asks for one token.
        """
        self.start = start
        self.draft = list(draft)
        self.made: list[int] = []
        """The target's tokens so far: the draft's own, and at last one that is not or that follows it."""
        self.done = False

    @property
    def end(self) -> int:
        """Tokens of the text so far."""
        return self.start + len(self.made)

    def rest(self, limit: int) -> list[int]:
        """What of the draft is left to verify, `limit` tokens at most."""
        return self.draft[len(self.made) : len(self.made) + limit]

    def receive(self, token_ids: Sequence[int]) -> None:
        """Take tokens that follow the text so far."""
        before = len(self.made)
        self.made += token_ids
        agreed = self.draft[before : len(self.made)]
        self.done = len(self.made) > len(self.draft) or self.made[before:] != agreed
