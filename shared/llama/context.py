"""A llama.cpp context with several sequences: prefill, decode, score, roll back; many streams in one batch.

A sequence's KV cache always holds exactly `cached[sequence]`. Work is an `Extension`: tokens appended to
one sequence, with logits for its last positions only (a row of a 152k vocabulary is 600 KB, and nobody
reads the rest). Extensions of many sequences share one `llama_decode`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from shared.config import CacheType
from shared.errors import InvalidSetting, ModelUnsupported, OutOfMemory
from shared.llama.memory import check_cache_fits
from shared.llama.model import LlamaModel, engine_error, forget_engine_errors
from shared.vocab import TokenKind

try:
    import llama_cpp
except ImportError:  # LlamaModel says so, and no context exists without a model
    llama_cpp = None

_GGML_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
_DECODE_ABORTED = 2


class DecodeAborted(Exception):
    """`LlamaContext.abort` stopped a decode; the sequences in it are as they were before."""


@dataclass(frozen=True, slots=True)
class Extension:
    """Tokens appended to a sequence, and how many of the last get a row of logits."""

    sequence: int
    token_ids: Sequence[int]
    num_rows: int
    wants_hidden: bool = False
    """Whether the hidden states of those positions are read too: `LlamaContext.hidden_states`."""


class LlamaContext:
    """KV caches of up to `num_sequences` streams over one model. Not thread-safe, but for `abort`."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        num_sequences: int,
        context_tokens: int,
        rollback_tokens: int,
        max_batch_tokens: int = 512,
        max_rows: int = 128,
        threads: int | None = None,
        cache_type: CacheType = "f16",
        cache_tokens: int | None = None,
    ) -> None:
        """
        Args:
            context_tokens: per sequence.
            cache_tokens: of all sequences together, where they share prefixes (`copy_prefix`); unset
                has room for every sequence at its longest.
            rollback_tokens: how far `rewind` must reach back at least, for models with a recurrent state.
            max_batch_tokens: of one `decode`.
            max_rows: read from one `decode`; each takes 4 bytes a token of the vocabulary.
        Raises:
            InvalidSetting: the context is longer than the model was trained for.
            OutOfMemory: the caches do not fit.
            ModelUnsupported: the model cannot roll back.
        """
        if context_tokens > model.context_train:  # llama.cpp would only warn, and the text would decay
            raise InvalidSetting(
                f"context_tokens = {context_tokens} is longer than {model.name} was trained for;"
                f" set it to at most {model.context_train}"
            )
        cache_tokens = cache_tokens or num_sequences * context_tokens
        if model.gpu_layers == 0:
            check_cache_fits(
                model.name,
                num_sequences=num_sequences,
                context_tokens=cache_tokens // num_sequences,
                bytes_per_token=model.cache_bytes_per_token(cache_type),
                free_bytes=psutil.virtual_memory().available,
            )
        self.model = model
        self.context_tokens = context_tokens
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = max(max_rows, num_sequences)
        self.cached: list[list[int]] = [[] for _ in range(num_sequences)]
        self.num_decoded_tokens = 0
        """Tokens evaluated since the start: the cost of everything done here."""
        self.hidden_size = int(llama_cpp.llama_model_n_embd_out(model.handle))
        """Width of a hidden state."""
        self._abort_flag = ctypes.create_string_buffer(2)
        self._gives_hidden = False
        self._rows: list[range] = []
        """Where in the last batch the rows of each extension are."""

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cache_tokens
        params.n_batch = params.n_ubatch = max_batch_tokens
        params.n_outputs_max = self.max_rows
        params.n_seq_max = num_sequences
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE  # hidden states of single tokens
        self.num_threads = threads or _available_cores()
        params.n_threads = params.n_threads_batch = self.num_threads
        params.type_k = params.type_v = _GGML_TYPES[cache_type]
        if cache_type == "f32":
            # Flash attention rounds keys and values to f16, whatever type they are kept in.
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # One buffer for all sequences, so that streams at different lengths still share a batch.
        params.kv_unified = True
        # Sliding-window layers keep everything: a rollback may need what a window would have dropped.
        params.swa_full = True
        params.no_perf = True
        if model.has_recurrent_state:
            params.n_rs_seq = rollback_tokens
        forget_engine_errors()
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise OutOfMemory(
                f"no memory for {num_sequences} x {context_tokens} tokens of {model.name}: {engine_error()};"
                " choose fewer slots or a smaller context"
            )
        if model.has_recurrent_state and llama_cpp.llama_n_rs_seq(self._handle) < rollback_tokens:
            self.close()
            raise ModelUnsupported(
                f"{model.name} keeps a recurrent state that cannot be rolled back; choose a transformer model"
            )
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self._batch = llama_cpp.llama_batch_init(max_batch_tokens, 0, 1)
        self._install_abort()
        kinds = np.array(model.token_kinds)
        legal = np.flatnonzero(kinds != TokenKind.PADDING)
        self._num_ids = int(legal[-1]) + 1
        self._padding_inside = np.flatnonzero(kinds[: self._num_ids] == TokenKind.PADDING)

    def close(self) -> None:
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None
        if hasattr(self, "_batch"):
            llama_cpp.llama_batch_free(self._batch)
            del self._batch

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def align(self, sequence: int, token_ids: Sequence[int]) -> int:
        """Keep the longest common prefix of the cache and `token_ids`, drop the rest; returns its length."""
        kept = common_prefix(self.cached[sequence], list(token_ids))
        return self.rewind(sequence, kept)

    def rewind(self, sequence: int, num_tokens: int) -> int:
        """Shorten a cache to `num_tokens`; returns what is left, 0 where it cannot reach back so far."""
        cached = self.cached[sequence]
        if num_tokens >= len(cached):
            return len(cached)
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, num_tokens, -1):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            num_tokens = 0
        del cached[num_tokens:]
        return num_tokens

    def copy_prefix(self, source: int, destination: int, num_tokens: int) -> None:
        """Let `destination` start with the first `num_tokens` of `source`, whatever it held before.

        The two share the cache's cells, so that nothing is computed and next to no memory is taken.

        Raises:
            ValueError: `source` holds fewer tokens.
        """
        if num_tokens > len(self.cached[source]):
            raise ValueError(f"sequence {source} holds {len(self.cached[source])} tokens, not {num_tokens}")
        llama_cpp.llama_memory_seq_rm(self._memory, destination, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, destination, 0, num_tokens)
        self.cached[destination] = self.cached[source][:num_tokens]

    def decode(self, work: Sequence[Extension]) -> list[list[NDArray[np.float32]]]:
        """Evaluate extensions of several sequences in one pass over the weights.

        Args:
            work: at most one entry per sequence, `max_batch_tokens` tokens and `max_rows` rows in all. Where
                one wants hidden states, each token counts as a row.
        Returns:
            For each entry, `num_rows` rows of logits [vocabulary_size], -inf for padding ids. They are
            views into llama.cpp's buffer: read them before the next `decode`.
        Raises:
            DecodeAborted: `abort` was called; nothing was appended.
            OutOfMemory: the cache is full.
            ValueError: too much work for one batch, or none.
        """
        num_tokens, num_rows = sum(len(w.token_ids) for w in work), sum(w.num_rows for w in work)
        gives_hidden = any(w.wants_hidden for w in work)
        if gives_hidden:  # llama.cpp puts out every token then
            num_rows = num_tokens
        if num_tokens > self.max_batch_tokens or num_rows > self.max_rows:
            raise ValueError(
                f"{num_tokens} tokens and {num_rows} rows, but a batch holds"
                f" {self.max_batch_tokens} and {self.max_rows}"
            )
        if not num_tokens:
            raise ValueError("nothing to decode: without a token there is no row either")
        self._fill_batch(work)
        if gives_hidden is not self._gives_hidden:
            llama_cpp.llama_set_embeddings(self._handle, gives_hidden)
            self._gives_hidden = gives_hidden
        forget_engine_errors()
        status = llama_cpp.llama_decode(self._handle, self._batch)
        if status != 0:
            self._undo(work, status)
        self._rows = []
        end = 0
        for item in work:
            end += len(item.token_ids)
            self._rows.append(range(end - item.num_rows, end))
            self.cached[item.sequence] += item.token_ids
        self.num_decoded_tokens += end
        return [[self._row(i) for i in rows] for rows in self._rows]

    def hidden_states(self, index: int) -> NDArray[np.float32]:
        """What the model's last layer, normalised, holds at the rows of one entry of the last `decode`.

        Args:
            index: of an entry that `wants_hidden`.
        Returns:
            [num_rows, hidden_size], a copy.
        """
        pointers = (llama_cpp.llama_get_embeddings_ith(self._handle, i) for i in self._rows[index])
        states = [np.ctypeslib.as_array(pointer, shape=(self.hidden_size,)) for pointer in pointers]
        return np.array(states, np.float32).reshape(-1, self.hidden_size)

    def extend(self, sequence: int, token_ids: Sequence[int], num_rows: int) -> list[NDArray[np.float32]]:
        """`decode` for one sequence, in as many batches as it takes.

        Raises:
            ValueError: more rows than one batch holds.
        """
        head = max(0, len(token_ids) - max(num_rows, 1))
        for i in range(0, head, self.max_batch_tokens):
            self.decode([Extension(sequence, token_ids[i : min(i + self.max_batch_tokens, head)], 0)])
        return self.decode([Extension(sequence, token_ids[head:], num_rows)])[0]

    def abort(self) -> None:
        """Stop the decode that runs in another thread, and every later one until `clear_abort`."""
        self._abort_flag[0] = b"\1"

    def clear_abort(self) -> None:
        self._abort_flag[0] = b"\0"

    def _install_abort(self) -> None:
        """llama.cpp asks a C function before each graph node: strlen of a one-byte flag, so no Python."""
        libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
        strlen = ctypes.cast(libc.strlen, ctypes.c_void_p).value
        self._abort_callback = llama_cpp.ggml_abort_callback(strlen)
        llama_cpp.llama_set_abort_callback(
            self._handle, self._abort_callback, ctypes.cast(self._abort_flag, ctypes.c_void_p)
        )

    def _fill_batch(self, work: Sequence[Extension]) -> None:
        batch: Any = self._batch
        n = 0
        for item in work:
            position = len(self.cached[item.sequence])
            first_row = len(item.token_ids) - item.num_rows
            for i, token in enumerate(item.token_ids):
                batch.token[n] = token
                batch.pos[n] = position + i
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = item.sequence
                batch.logits[n] = i >= first_row
                n += 1
        batch.n_tokens = n
        # Without any row to compute, llama.cpp's repacked kernels crash (seen with Q4_K in 0.3.36).
        batch.logits[n - 1] = True

    def _undo(self, work: Sequence[Extension], status: int) -> None:
        for item in work:
            kept = len(self.cached[item.sequence])
            if not llama_cpp.llama_memory_seq_rm(self._memory, item.sequence, kept, -1):
                llama_cpp.llama_memory_seq_rm(self._memory, item.sequence, -1, -1)
                self.cached[item.sequence].clear()
        if status == _DECODE_ABORTED:
            raise DecodeAborted
        raise OutOfMemory(f"llama.cpp could not decode (status {status}): {engine_error()}")

    def _row(self, index: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self._handle, index)
        row = np.ctypeslib.as_array(pointer, shape=(self._num_ids,))
        row[self._padding_inside] = -np.inf
        return row


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
