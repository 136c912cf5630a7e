"""The edge model behind an async door: llama.cpp works in one thread, and a cancel stops it at once."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from shared.config import EdgeConfig
from shared.errors import EdgeOverloaded, ModelUnsupported
from shared.llama import DecodeAborted, LlamaContext, LlamaModel
from shared.llama.context import common_prefix
from shared.llama.slots import Slots, Turn
from shared.messages import Message

Result = TypeVar("Result")

PROBE_SEQUENCES = 4
"""Continuations of one question that a batch may hold beside it, for the router's probes."""
_PROBE_CELLS = 256
"""Room in the cache for them; the question's own cells are shared."""


READ_TOKENS = 128
"""Of a prompt that are read before another request gets its turn."""


class _Job:
    """Work in the model's thread; set under the model's lock."""

    cancelled = False


class _Worker:
    """The thread that llama.cpp works in, for all requests. Theirs take turns, job by job."""

    def __init__(self, context: LlamaContext) -> None:
        self._context = context
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duet-edge-model")
        self._lock = threading.Lock()
        self._running: _Job | None = None

    async def run(self, work: Callable[[], Result]) -> Result:
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
                    self._context.clear_abort()

        submitted = self._thread.submit(run)
        future = asyncio.wrap_future(submitted)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not submitted.cancel():  # it has begun
                with self._lock:
                    job.cancelled = True
                    if self._running is job:  # and nobody else's work is stopped
                        self._context.abort()
                with suppress(DecodeAborted, asyncio.CancelledError):
                    await future
            raise

    def close(self) -> None:
        self._thread.shutdown()


class EdgeModel:
    """A loaded model as one request sees it: its text is in one sequence, the KV cache reused by longest
    common prefix. `enter` gives each of several requests a sequence of its own.

    In mode `auto` further sequences branch off from it, for the router's probes.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        *,
        can_draft: bool = True,
        slots: Sequence[int] = (0,),
        max_waiting: int = 0,
    ) -> None:
        """
        Args:
            can_draft: whether rejected tokens can be rolled back. Mode `auto` does without: probes branch
                off, and an answer that the edge makes alone only grows.
            slots: sequences for requests, the first of them without `enter`.
            max_waiting: requests that may wait for one.
        """
        self.model = model
        self.context = context
        self.can_draft = can_draft
        self.sequence = slots[0]
        self._slots = Slots(slots, max_waiting)
        self._worker = _Worker(context)

    @classmethod
    async def load(cls, path: Path, name: str, config: EdgeConfig, *, num_slots: int = 1) -> EdgeModel:
        """Load model and context in a thread. Raises ModelError.

        Args:
            num_slots: requests that use the model at once; each has a KV cache.
        """
        return await asyncio.to_thread(cls._load, path, name, config, num_slots)

    @classmethod
    def _load(cls, path: Path, name: str, config: EdgeConfig, num_slots: int) -> EdgeModel:
        model = LlamaModel(path, name, gpu_layers=config.gpu_layers)
        routes = config.mode == "auto"
        probes = PROBE_SEQUENCES if routes else 0

        def opened(rollback_tokens: int, can_draft: bool) -> EdgeModel:
            context = LlamaContext(
                model,
                num_sequences=num_slots + probes,
                context_tokens=config.context_tokens,
                cache_tokens=num_slots * config.context_tokens + _PROBE_CELLS if routes else None,
                rollback_tokens=rollback_tokens,
                max_rows=1,
                threads=config.threads,
            )
            # The sequences after the first are the probes'.
            slots = (0, *range(1 + probes, num_slots + probes))
            return cls(model, context, can_draft=can_draft, slots=slots, max_waiting=config.max_waiting)

        if config.mode not in ("auto", "speculate"):
            return opened(0, can_draft=False)
        try:
            return opened(config.pace.max_unverified_tokens + 1, can_draft=True)
        except ModelUnsupported:
            if not routes:
                raise
            return opened(0, can_draft=False)

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    @property
    def num_waiting(self) -> int:
        return self._slots.num_waiting

    def enter(self, token_ids: Sequence[int]) -> Turn:
        """A place in line for a request, or a slot at once. Whoever enters must `leave`.

        Args:
            token_ids: what the text begins with.
        Raises:
            EdgeOverloaded: the line is full.
        """
        turn = self._slots.enter(token_ids)
        if turn is None:
            raise EdgeOverloaded(
                f"the edge model is busy and {self._slots.num_waiting} requests wait already; try again later"
            )
        return turn

    def leave(self, turn: Turn) -> None:
        """Give slot or place back; no work of the request may be under way."""
        self._slots.leave(turn, [] if turn.slot is None else self.context.cached[turn.slot])

    def in_slot(self, turn: Turn) -> EdgeModel:
        """The model for whoever holds the slot."""
        assert turn.slot is not None
        held = copy.copy(self)
        held.sequence = turn.slot
        return held

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run model work in the model's thread. When cancelled, the decode in it ends before this returns."""
        return await self._worker.run(work)

    def prompt_ids(self, prompt: Sequence[Message] | Sequence[int]) -> list[int]:
        """A chat in the model's own template and tokens; token ids as they stand."""
        messages = [part for part in prompt if isinstance(part, Message)]
        return self.model.render_chat(messages) if messages else [p for p in prompt if isinstance(p, int)]

    async def read(self, token_ids: Sequence[int]) -> None:
        """Evaluate all but the last few tokens, in steps; other requests get their turn between them."""
        ids = list(token_ids)

        def step() -> None:
            kept = self.context.align(self.sequence, ids)
            self.context.extend(self.sequence, ids[kept : kept + READ_TOKENS], 0)

        while len(ids) - common_prefix(self.context.cached[self.sequence], ids) > READ_TOKENS:
            await self.run(step)

    async def read_beginning(self, token_ids: Sequence[int]) -> None:
        """Evaluate a text's first tokens, as many as one turn takes; a KV cache with them is left alone."""
        ids = list(token_ids[:READ_TOKENS])

        def read() -> None:
            if common_prefix(self.context.cached[self.sequence], ids) < len(ids):
                kept = self.context.align(self.sequence, ids)
                self.context.extend(self.sequence, ids[kept:], 0)

        await self.run(read)

    async def close(self) -> None:
        await self.run(self.context.close)
        self._worker.close()
        self.model.close()
