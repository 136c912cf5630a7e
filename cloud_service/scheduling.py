"""Which tokens of which streams go into the next pass of the target. Pure: counts in, counts out.

Continuous batching (Yu et al. 2022, Orca, OSDI '22): every pass takes the steps of all streams that
wait, and fills up with chunks of prompts (Agrawal et al. 2023, Sarathi, arXiv:2308.16369), as many tokens
as keep the streams that are being written within a stated stretch of their own pace.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from cloud_service.fairness import shares

STEP_TOKENS = 16
"""Work of at most this many tokens counts as a step even where not all of it is read."""

PROMPT_CHUNK = 64
"""Prompt tokens of a pass without steps. Fixed, not fitted to the machine's speed: on quantised models
the chunks leave traces in the last digits, and a stream alone shall get the same text every time."""


_MOST_SURPRISE = 3.0
"""How many times the predicted cost of a pass is believed at once; a lasting change takes a few passes."""


def plan(
    remaining: Sequence[int],
    num_rows: Sequence[int],
    tenants: Sequence[Hashable],
    *,
    max_batch_tokens: int,
    max_rows: int,
    prefill_tokens: int,
) -> list[int]:
    """Decide how many tokens of each stream go into the next pass.

    Args:
        remaining: [num_streams], tokens that each stream still has to evaluate, most urgent first.
        num_rows: [num_streams], how many of the last of them are read, which must come out of one pass.
        tenants: [num_streams], whose stream it is.
        max_batch_tokens: of the whole pass.
        max_rows: read in the whole pass.
        prefill_tokens: of prompts in this pass; tenants share it equally, and so do the prompts of each, so
            that a short prompt does not wait for a long one, nor anybody's for the many of somebody else.
    Returns:
        [num_streams] tokens, 0 for a stream that waits. A step is taken whole or not at all.

    >>> plan([1, 5, 300, 40], [1, 5, 1, 1], "aaaa", max_batch_tokens=64, max_rows=64, prefill_tokens=32)
    [1, 5, 16, 16]
    """
    taken = [0] * len(remaining)
    prompts = [i for i, count in enumerate(remaining) if not is_step(count, num_rows[i])]
    # Steps that keep coming must not shut out a prompt that goes before all of them.
    reserved = 1 if prompts[:1] == [0] else 0
    room = max_batch_tokens - reserved
    rows_left = max_rows
    for i, count in enumerate(remaining):
        if is_step(count, num_rows[i]) and count <= room and num_rows[i] <= rows_left:
            taken[i] = count
            room -= count
            rows_left -= num_rows[i]
    room = min(room + reserved, prefill_tokens)
    given = shares(room, [remaining[i] for i in prompts], [tenants[i] for i in prompts])
    for i, count in zip(prompts, given, strict=True):
        taken[i] = count
        if taken[i] == remaining[i] and num_rows[i] <= rows_left:
            rows_left -= num_rows[i]
        else:
            taken[i] = min(taken[i], remaining[i] - num_rows[i])
    return taken


def is_step(remaining: int, num_rows: int) -> bool:
    """Whether a stream's work is a token or a draft, and not a prompt."""
    return remaining <= max(STEP_TOKENS, num_rows)


class PassCost:
    """Learns what a pass costs, seconds = base + per_token * tokens, and sizes prompt chunks by it."""

    def __init__(self, *, stretch: float = 2.0, keep: float = 0.95) -> None:
        """
        Args:
            stretch: a pass with steps in it may take this many times what it would without prompts.
            keep: what the weight of a pass shrinks by with each later one.
        """
        self._stretch = stretch
        self._keep = keep
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Decayed least squares over (tokens, seconds). A stall of the machine is not taken at its word."""
        if (expected := self.predict(num_tokens)) > 0.0:
            seconds = min(seconds, _MOST_SURPRISE * expected)
        keep = self._keep
        self._n = keep * self._n + 1
        self._x = keep * self._x + num_tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + num_tokens * num_tokens
        self._xy = keep * self._xy + num_tokens * seconds

    def predict(self, num_tokens: int) -> float:
        """Seconds of a pass; 0 before anything was seen."""
        base, per_token = self._fit()
        return base + per_token * num_tokens

    @property
    def per_token(self) -> float | None:
        """Seconds that each further token makes a pass longer; None before passes differed enough to tell."""
        told = self._n and self._spread > (_TELLING_SPREAD * self._x) ** 2
        return self._fit()[1] if told else None

    def prefill_tokens(self, num_step_tokens: int) -> int:
        """How many prompt tokens a pass may take beside its steps; at least one, so that prompts progress."""
        if not num_step_tokens:
            return PROMPT_CHUNK
        _, per_token = self._fit()
        if per_token <= 0.0:
            return STEP_TOKENS
        return max(1, int((self._stretch - 1.0) * self.predict(num_step_tokens) / per_token))

    @property
    def _varied(self) -> bool:
        """Whether passes of different lengths were seen."""
        return self._spread > 1e-9 * max(1.0, self._xx)

    @property
    def _spread(self) -> float:
        return self._n * self._xx - self._x * self._x

    def _fit(self) -> tuple[float, float]:
        if not self._varied:
            return 0.0, self._y / self._x if self._x else 0.0
        per_token = max(0.0, (self._n * self._xy - self._x * self._y) / self._spread)
        return max(0.0, (self._y - per_token * self._x) / self._n), per_token


_TELLING_SPREAD = 0.25
"""Standard deviation of passes' tokens, by their mean, from which on they tell what a token costs."""
