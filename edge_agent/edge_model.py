"""The edge model behind an async door: llama.cpp works in one thread, and a cancel stops it at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from shared.config import EdgeConfig
from shared.errors import ModelUnsupported
from shared.llama import DecodeAborted, LlamaContext, LlamaModel

Result = TypeVar("Result")

PROBE_SEQUENCES = 4
"""Continuations of one question that a batch may hold beside it, for the router's probes."""
_PROBE_CELLS = 256
"""Room in the cache for them; the question's own cells are shared."""


class _Job:
    """Work in the model's thread; set under the model's lock."""

    cancelled = False


class EdgeModel:
    """A loaded model whose sequence 0 holds the text, its KV cache reused by longest common prefix.

    In mode `auto` further sequences branch off from it, for the router's probes.
    """

    def __init__(self, model: LlamaModel, context: LlamaContext, *, can_draft: bool = True) -> None:
        """
        Args:
            can_draft: whether rejected tokens can be rolled back. Mode `auto` does without: probes branch
                off, and an answer that the edge makes alone only grows.
        """
        self.model = model
        self.context = context
        self.can_draft = can_draft
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duet-edge-model")
        self._lock = threading.Lock()
        self._running: _Job | None = None

    @classmethod
    async def load(cls, path: Path, name: str, config: EdgeConfig) -> EdgeModel:
        """Load model and context in a thread. Raises ModelError."""
        return await asyncio.to_thread(cls._load, path, name, config)

    @classmethod
    def _load(cls, path: Path, name: str, config: EdgeConfig) -> EdgeModel:
        model = LlamaModel(path, name, gpu_layers=config.gpu_layers)
        routes = config.mode == "auto"

        def context(rollback_tokens: int) -> LlamaContext:
            return LlamaContext(
                model,
                num_sequences=1 + PROBE_SEQUENCES if routes else 1,
                context_tokens=config.context_tokens,
                cache_tokens=config.context_tokens + _PROBE_CELLS if routes else None,
                rollback_tokens=rollback_tokens,
                max_rows=1,
                threads=config.threads,
            )

        if config.mode not in ("auto", "speculate"):
            return cls(model, context(0), can_draft=False)
        try:
            return cls(model, context(config.pace.max_unverified_tokens + 1))
        except ModelUnsupported:
            if not routes:
                raise
            return cls(model, context(0), can_draft=False)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run model work in the model's thread. When cancelled, the decode in it ends before this returns."""
        job = _Job()

        def run() -> Result:
            with self._lock:
                if job.cancelled:
                    raise DecodeAborted
                self._running = job
            try:
                return work()
            finally:
                with self._lock:
                    self._running = None
                    self.context.clear_abort()

        submitted = self._thread.submit(run)
        future = asyncio.wrap_future(submitted)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not submitted.cancel():  # it has begun
                with self._lock:
                    job.cancelled = True
                    if self._running is job:  # and nobody else's work is stopped
                        self.context.abort()
                with suppress(DecodeAborted, asyncio.CancelledError):
                    await future
            raise

    async def close(self) -> None:
        await self.run(self.context.close)
        self._thread.shutdown()
        self.model.close()
