"""What a target on vLLM holds while it reads answers, read by the engine that will judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal

from cloud_service.judging.states import ReadAnswer
from cloud_service.targets import vllm_judge
from cloud_service.targets.hf_text import HfText
from cloud_service.targets.vllm import VllmSequence, VllmTarget, load_reader
from shared.errors import ModelUnsupported
from shared.labelled_answers import LabelledAnswer
from shared.messages import Message


class VllmReader:
    """Reads answers with vLLM, one after the other."""

    def __init__(self, target: VllmTarget, text: HfText, portal: BlockingPortal, max_tokens: int) -> None:
        """
        Args:
            target, text: see `load_reader`.
            portal: to where the engine's answers are waited for.
            max_tokens: of an answer; what comes later is left out.
        """
        self._target = target
        self._text = text
        self._portal = portal
        self._max_tokens = max_tokens
        self._sequence = VllmSequence(target, None)

    def read(self, answer: LabelledAnswer) -> ReadAnswer:
        return self._portal.call(self._read, answer)

    async def begin(self) -> None:
        """Raises ModelUnsupported where the engine shows no hidden states."""
        await self._target.hidden.keep(None)
        text = sorted(self._target.vocabulary.legal_ids)[: vllm_judge.TEST_TOKENS]
        if (fault := await vllm_judge.fault(self._sequence, text)) is not None:
            raise ModelUnsupported(f"{self._target.name} cannot be read with vLLM: {fault}")

    async def _read(self, answer: LabelledAnswer) -> ReadAnswer:
        target = self._target
        prompt = target.render_chat([Message("user", answer.question)])
        # vLLM makes a token of every request, for which the context must have room.
        room = min(self._max_tokens, target.context_tokens - 1 - len(prompt))
        token_ids = self._text.tokenize(answer.answer)[: max(room, 0)]
        if not token_ids:
            return _nothing_read(target.hidden.size)
        scores, hidden = await self._sequence.read([*prompt, *token_ids], len(token_ids))
        return ReadAnswer(
            token_ids=np.array(token_ids, np.int32),
            own_ids=scores.rows.token_ids[:-1, 0].astype(np.int32),
            logprobs=scores.logprobs.astype(np.float32),
            ends=np.cumsum([len(target.piece(token)) for token in token_ids], dtype=np.int32),
            hidden=hidden.astype(np.float16),
        )


def _nothing_read(hidden_size: int) -> ReadAnswer:
    ids = np.empty(0, np.int32)
    return ReadAnswer(ids, ids, np.empty(0, np.float32), ids, np.empty((0, hidden_size), np.float16))


@contextmanager
def vllm_reader(folder: str, name: str, options: Mapping[str, Any], max_tokens: int) -> Iterator[VllmReader]:
    """Start vLLM to read answers, and end it afterwards; takes half a minute and more.

    Raises:
        InvalidSetting, ModelError: see `load_reader` and `VllmReader.begin`.
    """
    target, text = load_reader(folder, name, options)
    with start_blocking_portal() as portal:
        try:
            reader = VllmReader(target, text, portal, max_tokens)
            portal.call(reader.begin)
            yield reader
        finally:
            portal.call(target.close)
