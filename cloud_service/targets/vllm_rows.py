"""Reads rows out of vLLM's answers; pure, so that it is tested without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.sampling import Float, Rows, logprobs_in_rows


class FlatLogprobs(Protocol):
    """`vllm.logprobs.FlatLogprobs`: per position the text's own token, then the k likeliest, best first."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def asked_width(width: int, vocab_size: int) -> int:
    """How many tokens to ask for, so that `width` are left without padding and with equal ones in order.

    Where several tokens are equally likely at the edge of what is asked, the engine chooses among them at
    random; the spare ones make sure that the lowest ids are there.
    """
    return min(width + max(4, width // 4), vocab_size)


def num_prompt_rows(num_positions: int, num_tokens: int, num_cached_tokens: int) -> int:
    """How many rows at the end of a prompt are real.

    The row of token j comes from the pass over token j - 1, so there is none up to `num_cached_tokens`:
    vLLM's V1 runner leaves garbage there and its V2 runner nothing.

    Args:
        num_positions: entries that the engine returned; the first stands for the prompt's first token and
            is empty.
        num_tokens: length of the prompt.
    """
    return min(num_positions - 1, num_tokens - 1 - num_cached_tokens)


def last_rows(flat: FlatLogprobs, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids and log-probabilities, each [num_rows, k], of the last positions."""
    if not num_rows:
        raise ValueError("there is nothing to read")
    first = flat.start_indices[-num_rows]
    ids = np.array(flat.token_ids[first:], np.int64).reshape(num_rows, -1)
    logprobs = np.array(flat.logprobs[first:], np.float64).reshape(num_rows, -1)
    return ids[:, 1:], logprobs[:, 1:]


def own_logprobs(flat: FlatLogprobs, num_rows: int) -> Float:
    """[num_rows] log-probabilities, at the last positions, of the text's own token.

    Raises:
        ValueError: a NaN.
    """
    own = np.array([flat.logprobs[start] for start in flat.start_indices[-num_rows:]], np.float64)
    if np.isnan(own).any():
        raise ValueError("the model gave a NaN")
    return np.minimum(own, 0.0)


def best_rows(
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float64],
    *,
    width: int,
    padding: NDArray[np.bool_],
) -> Rows:
    """Put rows in order: best first, equal ones by ascending id, padding last with no probability.

    Args:
        ids, logprobs: [num_rows, k], k >= width unless the vocabulary is smaller.
        padding: [vocabulary_size], true where an id has no meaning.
    Raises:
        ValueError: a NaN, or a row of padding alone.
    """
    if np.isnan(logprobs).any():
        raise ValueError("the model gave a NaN")
    logprobs = np.where(padding[ids], -np.inf, logprobs)
    order = np.lexsort((ids, -logprobs), axis=1)[:, :width]
    best = np.take_along_axis(logprobs, order, axis=1)
    if not np.isfinite(best[:, 0]).all():
        raise ValueError("the model likes nothing but padding")
    return Rows(np.take_along_axis(ids, order, axis=1), best)


def logprobs_of(proposed: Sequence[int], rows: Rows, own: Float) -> Float:
    """[len(proposed)] log-probabilities of the proposed tokens, nats.

    Args:
        rows: [num_rows, k] of the last tokens of a text, where proposed token i is judged by row i.
        own: log-probabilities of the text's own tokens by the last rows but one. Where there is none, a
            token is looked for in its row, and one outside it gets -inf.
    """
    logprobs = logprobs_in_rows(rows, proposed)
    first = len(rows) - 1 - len(own)
    told = own[: len(logprobs) - first] if len(logprobs) > first else own[:0]
    logprobs[first : first + len(told)] = told
    return logprobs


class KnownRows:
    """The rows of a stream's last round, by how much of the text each follows.

    A round whose context is whole blocks that are all cached gets no row for its first draft token; that
    row was the last one of the round before.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._rows: Rows | None = None

    def remember(self, text: Sequence[int], rows: Rows) -> None:
        """Keep the rows that follow each of the last `len(rows)` tokens of the text."""
        self._text, self._rows = list(text), rows

    def leading(self, text: Sequence[int], num_rows: int, count: int) -> Rows | None:
        """The first `count` of the rows that follow the last `num_rows` tokens of the text, or None."""
        rows = self._rows
        if rows is None:
            return None
        first, last = len(text) - num_rows + 1, len(text) - num_rows + count
        known_from = len(self._text) - len(rows) + 1
        if first < known_from or last > len(self._text) or list(text[:last]) != self._text[:last]:
            return None
        chosen = slice(first - known_from, first - known_from + count)
        return Rows(rows.token_ids[chosen], rows.logprobs[chosen])


def join(first: Rows, second: Rows) -> Rows:
    return Rows(
        np.concatenate([first.token_ids, second.token_ids]), np.concatenate([first.logprobs, second.logprobs])
    )
