"""What the target holds while it reads answers: hidden states, its own tokens, log-probabilities.

One safetensors file an answer, named by what was read, so that reading goes on where it was broken off and
corrected labels cost no second reading.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cloud_service.tensor_file import read_tensors
from shared.errors import InvalidSetting
from shared.labelled_answers import LabelledAnswer
from shared.llama import Extension, LlamaContext
from shared.messages import Message
from shared.sampling import logprobs_from_logits

_CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """An answer as the target reads it."""

    token_ids: NDArray[np.int32]
    """[num_tokens]"""
    own_ids: NDArray[np.int32]
    """[num_tokens], the likeliest token to the target at each position."""
    logprobs: NDArray[np.float32]
    """[num_tokens], nats, of the answer's tokens."""
    ends: NDArray[np.int32]
    """[num_tokens], bytes of the answer up to the end of each token."""
    hidden: NDArray[np.float16]
    """[num_tokens, hidden_size], the target's last hidden state at each token of the answer."""


def keep(
    reads: Callable[[LabelledAnswer], ReadAnswer], answer: LabelledAnswer, folder: Path, sha256: str
) -> bool:
    """Read an answer into its file; False where that is there.

    Args:
        sha256: of the target that reads.
    """
    path = states_path(folder, sha256, answer)
    if path.exists():
        return False
    read = reads(answer)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file({name: getattr(read, name) for name in ReadAnswer.__slots__}, partial)
    partial.replace(path)
    return True


class LlamaReader:
    """Reads answers with llama.cpp; a question's prompt is computed once for its answers in a row."""

    def __init__(self, context: LlamaContext, max_tokens: int) -> None:
        """
        Args:
            max_tokens: of an answer; what comes later is left out.
        """
        self._context = context
        self._max_tokens = max_tokens

    def read(self, answer: LabelledAnswer) -> ReadAnswer:
        context, model = self._context, self._context.model
        prompt = model.render_chat([Message("user", answer.question)])
        room = min(self._max_tokens, context.context_tokens - len(prompt))
        token_ids = model.tokenize(answer.answer, special=False)[: max(room, 0)]
        kept = context.align(0, prompt[:-1])
        if unread := prompt[kept:-1]:
            context.extend(0, unread, 0)
        text = [prompt[-1], *token_ids]
        own, logprobs, hidden = [], [], []
        for i in range(0, len(text), _CHUNK_TOKENS):
            chunk = text[i : i + _CHUNK_TOKENS]
            [logits] = context.decode([Extension(0, chunk, len(chunk), wants_hidden=True)])
            own += [int(row.argmax()) for row in logits]
            logprobs += [*logprobs_from_logits(logits, text[i + 1 : i + 1 + len(chunk)])]
            hidden += [*context.hidden_states(0)]
        sizes = [len(model.piece(token)) for token in token_ids]
        return ReadAnswer(
            token_ids=np.array(token_ids, np.int32),
            own_ids=np.array(own[:-1], np.int32),
            logprobs=np.array(logprobs, np.float32),
            ends=np.cumsum(sizes, dtype=np.int32),
            hidden=np.array(hidden[1:], np.float16).reshape(len(token_ids), context.hidden_size),
        )


def states_path(folder: Path, sha256: str, answer: LabelledAnswer) -> Path:
    digest = hashlib.sha256("\0".join((sha256, answer.question, answer.answer)).encode()).hexdigest()
    return folder / f"{digest[:32]}.safetensors"


def load_states(
    folder: Path, sha256: str, answers: list[LabelledAnswer]
) -> Iterator[tuple[LabelledAnswer, ReadAnswer]]:
    """Those of the answers that were read.

    Raises:
        InvalidSetting: a file cannot be read.
    """
    for answer in answers:
        path = states_path(folder, sha256, answer)
        if not path.exists():
            continue
        _, tensors = read_tensors(path, str(path), "remove it and collect again")
        try:
            read = ReadAnswer(**tensors)
        except TypeError as error:
            raise InvalidSetting(f"{path} cannot be read: {error}; remove it and collect again") from None
        yield answer, read
