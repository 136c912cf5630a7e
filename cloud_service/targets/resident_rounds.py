"""How a round of a resident session is followed through the tokens that the engine makes, and which steps of
the engine to have ready for it. Pure.

The engine may answer a draft in pieces: no more than its own number of speculative tokens at a time, and one
token unasked where it had to compute the text again. So both sides follow the text, not the count of
steps: a round is done once a token differs from the draft, or one came after all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_GRAPH_TOKENS = 2048
"""Of the longest step with a CUDA graph of its own. The GPU computes on longer ones for so long that kernels
launched one by one do not keep it waiting."""


TOGETHER = 32
"""Sessions up to which all whose drafts are there share a step."""


def most_in_a_step(num_sessions: int, num_groups: int) -> int:
    """Drafts that one step verifies at most.

    Once there are many, steps of a third of the sessions take a GPU little more than a third of what one of
    all takes. In an engine that schedules ahead, one third is verified and the next waits behind it, while
    the service takes the verdicts of the last and sends its next drafts: the GPU waits for nothing.

    Args:
        num_sessions: in all.
        num_groups: into which many are divided.

    >>> most_in_a_step(32, 3), most_in_a_step(65, 3), most_in_a_step(65, 1)
    (32, 22, 65)
    """
    return num_sessions if num_sessions <= TOGETHER else -(-num_sessions // num_groups)


def graph_sizes(
    num_streams: int, step_tokens: int, max_batched_tokens: int | None = None, *, any_size: bool = False
) -> list[int]:
    """Tokens of the steps to capture as CUDA graphs, for so many streams that each verify a draft in one.

    A step is padded to the next of them: by less than a stream's tokens while streams are few, and by an
    eighth at most beyond. vLLM's own go to 512 tokens, which 57 streams with drafts of 8 exceed.

    Args:
        num_streams: in one step.
        step_tokens: of a stream in a step at most.
        max_batched_tokens: of a step, where the operator says how many.
        any_size: whether the runner takes sizes as they are. vLLM's V1 runner rounds them to multiples of
            `step_tokens`, for steps in which all streams verify equally much.
    Returns:
        Ascending; at least one.

    >>> graph_sizes(12, 17)
    [17, 34, 51, 68, 85, 102, 119, 136, 153, 170, 187, 204]
    >>> graph_sizes(9, 17, any_size=True)
    [1, 2, 4, 8, 9, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 153]
    """
    most = min(num_streams * step_tokens, MAX_GRAPH_TOKENS, max_batched_tokens or MAX_GRAPH_TOKENS)
    if not any_size:
        most = max(1, most // step_tokens) * step_tokens
    unit = _UNIT if any_size else step_tokens
    sizes = [unit]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] + max(1, sizes[-1] // unit // 8) * unit))
    if any_size:  # plain steps: of few streams, and of all
        sizes = [size for size in (1, 2, 4, num_streams, *sizes) if size <= most]
    return sorted(set(sizes))


_UNIT = 8
"""Tokens between the smallest graphs where any size will do."""


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
