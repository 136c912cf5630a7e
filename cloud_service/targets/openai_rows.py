"""Reads rows out of the JSON that vLLM's HTTP service answers; pure, so that it is tested on literal JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = list[tuple[int, float]]
"""Token ids and log-probabilities of one position."""

_IMPOSSIBLE = -9999.0
"""What vLLM writes for minus infinity, which JSON does not have."""


def prompt_rows(answer: Mapping[str, Any], num_rows: int) -> list[Row]:
    """The last rows of the prompt, of either endpoint.

    Raises:
        ValueError: there are fewer.
    """
    flat = answer.get("prompt_logprobs") or answer["choices"][0].get("prompt_logprobs") or []
    rows = flat[1:][-num_rows:]  # the first stands for the prompt's first token and is empty
    if len(rows) < num_rows:
        raise ValueError("rows of the prompt are missing")
    return [[(int(token), entry["logprob"]) for token, entry in row.items()] for row in rows]


def next_row(answer: Mapping[str, Any]) -> Row:
    """The row of the one generated token, of either endpoint."""
    logprobs = answer["choices"][0]["logprobs"]
    if "content" in logprobs:  # /inference/v1/generate
        return [(entry["token_id"], entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]]
    return [
        (int(token.removeprefix("token_id:")), logprob)
        for token, logprob in logprobs["top_logprobs"][0].items()
    ]


def own_logprobs(rows: Sequence[Row], token_ids: Sequence[int]) -> NDArray[np.float64]:
    """[num_rows] log-probabilities of the text's own tokens, which vLLM puts into each row of a prompt.

    A token that is not in its row gets -inf.
    """
    own = np.array(
        [dict(row).get(token, -np.inf) for row, token in zip(rows, token_ids, strict=True)], np.float64
    )
    return np.where(own <= _IMPOSSIBLE, -np.inf, np.minimum(own, 0.0))


def as_arrays(rows: Iterable[Row]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probabilities, each [num_rows, k], best first.

    A row holds the text's own token beside the likeliest ones, so that rows differ in length; the
    shortest gives k.
    """
    ordered = [sorted(row, key=lambda entry: (-entry[1], entry[0])) for row in rows]
    k = min(map(len, ordered))
    ids = np.array([[token for token, _ in row[:k]] for row in ordered], np.int64)
    logprobs = np.array([[logprob for _, logprob in row[:k]] for row in ordered], np.float64)
    return ids, np.where(logprobs <= _IMPOSSIBLE, -np.inf, logprobs)


def cached_tokens(answer: Mapping[str, Any]) -> int | None:
    """How many tokens of the prompt came from the cache; None where the service does not say."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details")
    return None if details is None else int(details.get("cached_tokens") or 0)


def new_tokens(event: Mapping[str, Any]) -> Sequence[int]:
    """Token ids of one event of a stream, of either endpoint.

    Raises:
        ValueError: the event reports a failure.
    """
    if "error" in event:
        raise ValueError(error_text(event))
    [choice] = event["choices"] or [{}]
    if choice.get("finish_reason") in ("abort", "error"):
        raise ValueError("the request was given up")
    return choice.get("token_ids") or ()


def error_text(answer: Any) -> str:
    """What an error answer says, as one line."""
    said = answer.get("error", answer) if isinstance(answer, dict) else answer
    said = said.get("message", said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:300]
