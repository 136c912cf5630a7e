"""Applies a `Shaping` to a llama.cpp model's logits, its grammar by llama.cpp's own engine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequest
from shared.llama.model import LlamaModel
from shared.shaping import Shaping, shape_logits

try:
    import llama_cpp
    from llama_cpp.llama_grammar import json_schema_to_gbnf
except ImportError:  # LlamaModel says so
    llama_cpp = None


class LogitsShaper:
    """Shapes the logits of one completion, position after position. Use it in the model's thread."""

    def __init__(self, model: LlamaModel, shaping: Shaping, num_prompt_tokens: int) -> None:
        """Raises InvalidRequest: the grammar or the schema cannot be read."""
        self._shaping = shaping
        self._num_prompt = num_prompt_tokens
        grammar = _gbnf(shaping)
        self._grammar = None if grammar is None else _Grammar(model, grammar)

    def shape(self, logits: NDArray[np.float32], text_ids: Sequence[int]) -> None:
        """Change the logits of the token that follows the text.

        Args:
            logits: [vocabulary_size], changed in place.
            text_ids: prompt and completion so far; that of the call before, or longer.
        """
        completion = text_ids[self._num_prompt :]
        shape_logits(
            logits, self._shaping, prompt_ids=text_ids[: self._num_prompt], completion_ids=completion
        )
        if self._grammar is not None:
            self._grammar.mask(logits, completion)


class _Grammar:
    """A grammar's state, which follows the completion."""

    def __init__(self, model: LlamaModel, gbnf: str) -> None:
        self._sampler = llama_cpp.llama_sampler_init_grammar(
            llama_cpp.llama_model_get_vocab(model.handle), gbnf.encode("utf-8"), b"root"
        )
        if not self._sampler:
            raise InvalidRequest("grammar cannot be read by llama.cpp: it needs GBNF rules and a root")
        # llama.cpp would end the text with more tokens than the chat does.
        self._no_ends = np.array(sorted(model.engine_end_token_ids - model.end_token_ids), np.int64)
        self._num_taken = 0

    def mask(self, logits: NDArray[np.float32], completion: Sequence[int]) -> None:
        """Rule out what the grammar does not allow next. Raises InvalidRequest: the completion breaks it."""
        for token in completion[self._num_taken :]:
            if not self._allowed(np.array([token])).size:  # which llama.cpp would not survive
                raise InvalidRequest("the committed tokens are not what the grammar allows")
            llama_cpp.llama_sampler_accept(self._sampler, token)
        self._num_taken = len(completion)
        logits[self._no_ends] = -np.inf
        # Most of the vocabulary is never looked at: only where none of the likeliest may follow.
        for count in (_LIKELIEST, len(logits)):
            ids = np.arange(len(logits)) if count >= len(logits) else np.argpartition(logits, -count)[-count:]
            allowed = self._allowed(ids[logits[ids] > -np.inf])
            if allowed.size:
                break
        kept = logits[allowed].copy()
        logits[:] = -np.inf
        logits[allowed] = kept

    def _allowed(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        entries = (llama_cpp.llama_token_data * len(ids))()
        view: Any = np.ctypeslib.as_array(entries)
        view["id"] = ids
        view["logit"] = 0.0
        array = llama_cpp.llama_token_data_array(data=entries, size=len(ids), selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        allowed: NDArray[np.int64] = ids[view["logit"] == 0.0]
        return allowed

    def __del__(self) -> None:
        if self._sampler:
            llama_cpp.llama_sampler_free(self._sampler)


_LIKELIEST = 256


def _gbnf(shaping: Shaping) -> str | None:
    if shaping.json_schema is None:
        return shaping.grammar
    try:
        return str(json_schema_to_gbnf(shaping.json_schema))
    except Exception as error:  # it raises whatever a schema makes it stumble over
        reason = str(error) or type(error).__name__
        raise InvalidRequest(f"json_schema cannot be turned into a grammar: {reason}") from None
