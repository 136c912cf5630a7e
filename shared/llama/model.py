"""A GGUF model: its weights, its vocabulary, its chat template."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.config import CacheType
from shared.errors import InvalidRequest, ModelFileInvalid, ModelUnsupported
from shared.llama.memory import kv_cache_bytes
from shared.messages import Message
from shared.vocab import TokenKind, Vocabulary

try:
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
except ImportError:  # mapped to a line that says what to do when a model is loaded
    llama_cpp = None

log = logging.getLogger("duet.llama")

_DOCUMENT_END = "<|endoftext|>"
"""Ends a document in several families; their chat models may end an answer with it too."""

_GGML_ERROR = 4
_engine_errors: deque[str] = deque(maxlen=4)
_keep_alive: list[Any] = []


def _quiet_engine() -> None:
    """Send llama.cpp's own messages to logging, and keep its last errors for ours."""
    if _keep_alive:
        return

    def receive(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == _GGML_ERROR:
            _engine_errors.append(line)
        log.debug("%s", line)  # what fails is said by the error that we raise

    # CUDA faults where it starts under a log callback (seen with 0.3.36): let the devices start before.
    llama_cpp.llama_print_system_info()
    callback = llama_cpp.llama_log_callback(receive)
    _keep_alive.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def engine_error() -> str:
    """llama.cpp's first complaint since `forget_engine_errors`; those after it only follow from it."""
    return _engine_errors[0] if _engine_errors else "no reason given"


def forget_engine_errors() -> None:
    """Call before an attempt whose failure `engine_error` shall explain."""
    _engine_errors.clear()


class LlamaModel:
    """Weights and vocabulary of one GGUF file, memory-mapped; contexts are made from it."""

    def __init__(self, path: Path, name: str, *, gpu_layers: int = 0, mapped: bool = True) -> None:
        """
        Args:
            name: what people call the model.
            gpu_layers: layers kept on a GPU; -1 is all.
            mapped: map the file, which starts soonest. Otherwise read it, so that weights which
                llama.cpp rearranges for the CPU are not held twice.
        Raises:
            ModelFileInvalid: not a GGUF file, or llama.cpp cannot read it.
            ModelUnsupported: llama.cpp is not installed, or the model cannot generate text.
        """
        if llama_cpp is None:
            raise ModelUnsupported(
                "llama.cpp is not installed; run: pip install 'duet-llm[edge]' (or [cloud] for the service)"
            )
        _quiet_engine()
        self.name = name
        self.path = path
        self.gpu_layers = gpu_layers
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mapped else llama_cpp.LLAMA_LOAD_MODE_NONE
        # llama.cpp's AMX kernels fault on batches of three tokens and more (seen with 0.3.36, gcc 12).
        params.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()
        forget_engine_errors()
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ModelFileInvalid(f"{path} is not a model that llama.cpp can read: {engine_error()}")
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if not llama_cpp.llama_model_has_decoder(self.handle):
            raise ModelUnsupported(f"{name} does not generate text")
        # A vocabulary's longest token is far below this.
        self._piece_buffer = ctypes.create_string_buffer(4096)
        self._formatter = Jinja2ChatFormatter(
            template=self._chat_template(),
            eos_token=self._special_text(llama_cpp.llama_vocab_eos(self._vocab)),
            bos_token=self._special_text(llama_cpp.llama_vocab_bos(self._vocab)),
        )

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    @property
    def has_recurrent_state(self) -> bool:
        """Recurrent and hybrid models cannot drop part of their memory (llama.cpp issue 20039)."""
        return bool(
            llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle)
        )

    @property
    def context_train(self) -> int:
        """Positions that the model was trained for."""
        return int(llama_cpp.llama_model_n_ctx_train(self.handle))

    def cache_bytes_per_token(self, cache_type: CacheType) -> int:
        """What one position takes in a KV cache. All layers are taken to be like the first."""
        num_heads = max(1, llama_cpp.llama_model_n_head(self.handle))  # a recurrent layer has none
        head_size = llama_cpp.llama_model_n_embd(self.handle) // num_heads
        attention = f"{self._metadata('general.architecture')}.attention"
        return kv_cache_bytes(
            num_layers=llama_cpp.llama_model_n_layer(self.handle),
            num_kv_heads=llama_cpp.llama_model_n_head_kv(self.handle),
            key_length=int(self._metadata(f"{attention}.key_length") or head_size),
            value_length=int(self._metadata(f"{attention}.value_length") or head_size),
            cache_type=cache_type,
            num_tokens=1,
        )

    @cached_property
    def token_kinds(self) -> list[TokenKind]:
        """[vocab_size]"""
        kind_of_attr: dict[int, TokenKind] = {}
        kinds = []
        for token_id in range(self.vocab_size):
            attr = llama_cpp.llama_vocab_get_attr(self._vocab, token_id)
            if attr not in kind_of_attr:
                kind_of_attr[attr] = _kind(attr)
            kinds.append(kind_of_attr[attr])
        return kinds

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """[vocab_size] pieces and kinds. Takes a few hundred milliseconds for 152k tokens."""
        pieces = [
            b"" if kind is TokenKind.PADDING else self.piece(token_id, special=True)
            for token_id, kind in enumerate(self.token_kinds)
        ]
        return Vocabulary(self.name, pieces, self.token_kinds)

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """What ends an answer of this model.

        llama.cpp's own end set is wider: for Qwen2.5 it holds `</s>`, which HTML text contains.
        """
        ids = {llama_cpp.llama_vocab_eos(self._vocab), llama_cpp.llama_vocab_eot(self._vocab)}
        document_end = self.tokenize(_DOCUMENT_END)
        if len(document_end) == 1:
            ids.update(document_end)
        return frozenset(i for i in ids if i >= 0)

    @cached_property
    def engine_end_token_ids(self) -> frozenset[int]:
        """llama.cpp's own end set, which its grammars allow at the end of a text."""
        ends = llama_cpp.llama_vocab_is_eog
        return frozenset(token_id for token_id in range(self.vocab_size) if ends(self._vocab, token_id))

    def tokenize(self, text: str, *, add_special: bool = False, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: begin as the model wants a text to begin.
            special: text that looks like a special token is that token; otherwise it stays text.
        """
        raw = text.encode("utf-8")
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), add_special, special)
        if n < 0:
            raise InvalidRequest("the text could not be split into tokens")
        return list(buffer[:n])

    def piece(self, token_id: int, *, special: bool = False) -> bytes:
        """Bytes of one token; special tokens have none unless asked for."""
        n = llama_cpp.llama_token_to_piece(
            self._vocab, token_id, self._piece_buffer, len(self._piece_buffer), 0, special
        )
        return ctypes.string_at(self._piece_buffer, n)

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Apply the model's own chat template: token ids that end where the answer begins.

        Raises:
            InvalidRequest: the template refuses the messages, for example an unknown role.
        """
        raw = [{"role": message.role, "content": message.content} for message in messages]
        try:
            prompt = self._formatter(messages=raw).prompt  # type: ignore[arg-type, unused-ignore]
        except Exception as error:  # templates raise whatever they like
            raise InvalidRequest(f"{self.name}'s chat template refuses these messages: {error}") from None
        return self.tokenize(prompt)

    def _chat_template(self) -> str:
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        if not template:
            raise ModelUnsupported(f"{self.name} has no chat template; choose an instruction-tuned model")
        return template.decode("utf-8") if isinstance(template, bytes) else str(template)

    def _metadata(self, key: str) -> str:
        """One value of the GGUF header; empty where it has none."""
        buffer = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def _special_text(self, token_id: int) -> str:
        return self.piece(token_id, special=True).decode("utf-8", "replace") if token_id >= 0 else ""


def _kind(attr: int) -> TokenKind:
    if attr & llama_cpp.LLAMA_TOKEN_ATTR_UNUSED or attr == llama_cpp.LLAMA_TOKEN_ATTR_UNDEFINED:
        return TokenKind.PADDING
    if attr & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN):
        return TokenKind.SPECIAL
    return TokenKind.TEXT
