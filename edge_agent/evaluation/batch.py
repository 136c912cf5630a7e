"""Answers of the edge model to many questions at once: a fixed number of sequences share each pass."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge_agent.edge_model import PROBE_SEQUENCES, EdgeModel
from shared.config import EdgeConfig
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.models import ResolvedModel
from shared.sampling import Sampling, draw, rows_from_logits

_PROBE_CELLS = 256
_ANSWER_CELLS = 1024
"""Room in the cache for an answer that runs beside others, its prompt included."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to be answered."""

    key: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model wrote."""

    text: str
    num_tokens: int
    """The end of the text included."""
    censored: bool
    """The limit came before the end."""
    logprobs: tuple[float, ...] = ()
    """Nats, of each token, before any sampling setting."""
    pieces: tuple[bytes, ...] = ()
    """Bytes of each token."""
    token_ids: tuple[int, ...] = ()


@dataclass
class _Running:
    job: Job
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def load_batch_edge(resolved: ResolvedModel, config: EdgeConfig, num_parallel: int) -> EdgeModel:
    """An edge model with room for probes of one question and answers to `num_parallel` others.

    Raises:
        ModelError: as `EdgeModel.load`.
    """
    model = LlamaModel(resolved.path, resolved.name, gpu_layers=config.gpu_layers)
    context = LlamaContext(
        model,
        num_sequences=1 + PROBE_SEQUENCES + num_parallel,
        context_tokens=config.context_tokens,
        cache_tokens=2 * config.context_tokens + _PROBE_CELLS + (num_parallel - 1) * _ANSWER_CELLS,
        rollback_tokens=0,
        threads=config.threads,
    )
    return EdgeModel(model, context)


def answer_all(edge: EdgeModel, jobs: Iterable[Job], on_done: Callable[[Job, Answered], None]) -> None:
    """Answer every job, several at once, each reported as soon as it ends. Use it in the model's thread.

    Each text is drawn by the rule and noise of every other mode (`sampling.draw`). How many run beside it
    does not change what is drawn, but for the kernels' rounding.
    """
    context, model = edge.context, edge.model
    free = list(range(1 + PROBE_SEQUENCES, len(context.cached)))
    cells = len(free) * _ANSWER_CELLS + context.context_tokens - _ANSWER_CELLS
    waiting = deque(jobs)
    running: dict[int, _Running] = {}

    def take(sequence: int, logits: NDArray[np.float32]) -> None:
        state = running[sequence]
        job = state.job
        rows = rows_from_logits([logits], job.sampling.row_width)
        token = int(draw(rows, job.sampling, job.seed, len(state.written))[0])
        state.written.append(token)
        state.logprobs.append(float(rows.logprobs[rows.token_ids == token][0]))
        ended = token in model.end_token_ids
        if ended or len(state.written) == _limit(job, context.context_tokens):
            pieces = tuple(map(model.piece, state.written))
            text = b"".join(pieces).decode("utf-8", "replace")
            del running[sequence]
            context.rewind(sequence, 0)
            free.append(sequence)
            answered = Answered(
                text, len(pieces), not ended, tuple(state.logprobs), pieces, tuple(state.written)
            )
            on_done(job, answered)

    def fits(job: Job) -> bool:
        taken = sum(_cells(r.job, context.context_tokens) for r in running.values())
        return not running or taken + _cells(job, context.context_tokens) <= cells

    try:
        while waiting or running:
            while waiting and free and fits(waiting[0]):
                job = waiting.popleft()
                sequence = free.pop()
                running[sequence] = _Running(job)
                take(sequence, context.extend(sequence, job.prompt_ids, 1)[0])
            if running:
                work = [Extension(s, [state.written[-1]], 1) for s, state in running.items()]
                for item, [logits] in zip(work, context.decode(work), strict=True):
                    take(item.sequence, logits)
    finally:
        for sequence in running:
            context.rewind(sequence, 0)


async def answers(edge: EdgeModel, jobs: Sequence[Job]) -> AsyncGenerator[tuple[Job, Answered], None]:
    """`answer_all` for async callers: answers in the order in which they end."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Queue[tuple[Job, Answered] | None] = asyncio.Queue()

    def report(job: Job, answered: Answered) -> None:
        loop.call_soon_threadsafe(ended.put_nowait, (job, answered))

    task = asyncio.create_task(edge.run(partial(answer_all, edge, jobs, report)))
    task.add_done_callback(lambda _: ended.put_nowait(None))
    try:
        while (answer := await ended.get()) is not None:
            yield answer
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _limit(job: Job, context_tokens: int) -> int:
    return max(1, min(job.max_tokens, context_tokens - len(job.prompt_ids)))


def _cells(job: Job, context_tokens: int) -> int:
    return len(job.prompt_ids) + _limit(job, context_tokens)
