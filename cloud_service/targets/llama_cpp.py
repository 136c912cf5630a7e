"""A target on llama.cpp, in this process: one context, one thread, every stream in the same batches."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cloud_service.fairness import TokenCounters
from cloud_service.scheduling import PassCost, is_step, plan
from cloud_service.targets.base import GenerateOptions, Scores
from shared.errors import CloudFailed, CloudOverloaded, DuetError
from shared.judge import JudgeHead
from shared.llama import DecodeAborted, Extension, LlamaContext, LlamaModel
from shared.llama.shaper import LogitsShaper
from shared.llama.slots import Slots
from shared.messages import Message, Timings
from shared.sampling import Sampling, draw, logprobs_from_logits, rows_from_logits
from shared.shaping import EVERY_SHAPE, NO_SHAPING, Shaping

log = logging.getLogger("duet.target")

ScoresSink = Callable[[Scores], "list[int] | None"]
"""Takes the scores of a finished job, in the engine's thread; returns tokens to go on with, or None."""


@dataclass(eq=False, slots=True)
class _Job:
    """Bring one slot to `token_ids` and hand out the rows of the last `num_rows` of them."""

    slot: int
    tenant: str | None
    token_ids: list[int]
    num_rows: int
    width: int
    sequence: LlamaCppSequence
    deliver: ScoresSink
    fail: Callable[[DuetError], None]
    proposed: Sequence[int] = ()
    num_judged: int = 0
    shaper: LogitsShaper | None = None
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    cancelled: bool = False


class LlamaCppTarget:
    """Implements `base.Target`. All llama.cpp calls happen in one thread of its own."""

    engine = "llama-cpp"
    verification = "rounds"
    shapes = EVERY_SHAPE

    def __init__(self, model: LlamaModel, context: LlamaContext, judge_head: JudgeHead | None = None) -> None:
        self.name = model.name
        self.context_tokens = context.context_tokens
        self.vocabulary = model.vocabulary
        self.end_token_ids = model.end_token_ids
        self.judge_head = judge_head
        self._model = model
        self._context = context
        self.max_streams = len(context.cached)
        self._slots = Slots(range(self.max_streams), max_waiting=0)
        self._tenants: list[str | None] = [None] * self.max_streams
        """Whose text each slot holds. Written by the engine's thread, which changes the text itself."""
        self._jobs: list[_Job] = []
        self._running: list[_Job] = []
        self._wake = threading.Condition()
        self._closing = False
        self._cost = PassCost()
        self._counters = TokenCounters()
        self._thread = threading.Thread(target=self._run, name="duet-llama", daemon=True)
        self._thread.start()

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    @property
    def num_jobs(self) -> int:
        """Jobs that wait or run: 0 when every stream has ended."""
        return len(self._jobs)

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._model.render_chat(messages)

    def piece(self, token_id: int) -> bytes:
        return self._model.piece(token_id)

    def draws(self, sampling: Sampling, *, drafts: bool) -> bool:
        return False

    @asynccontextmanager
    async def sequence(
        self,
        token_ids: Sequence[int],
        *,
        tenant: str | None = None,
        expected_tokens: int = 0,
        own_draw: Sampling | None = None,
    ) -> AsyncIterator[LlamaCppSequence]:
        own = [slot for slot, owner in enumerate(self._tenants) if owner == tenant]
        turn = self._slots.enter(token_ids, reusable=own)
        if turn is None or turn.slot is None:
            raise CloudOverloaded("all slots are taken; try again later")
        try:
            yield LlamaCppSequence(self, turn.slot, tenant)
        finally:
            self._slots.leave(turn, self._context.cached[turn.slot])

    async def warm_up(self) -> None:
        pass

    async def failed(self) -> None:
        await asyncio.Event().wait()  # the engine is this process

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._context.abort()
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._context.close()
        self._model.close()

    def shaper(self, shaping: Shaping, num_prompt_tokens: int) -> LogitsShaper:
        return LogitsShaper(self._model, shaping, num_prompt_tokens)

    def submit(self, job: _Job) -> None:
        with self._wake:
            if self._closing:
                raise CloudFailed("the target is shut down")
            self._jobs.append(job)
            self._wake.notify()

    def cancel(self, job: _Job) -> None:
        """Forget a job; a pass that works for nobody else is stopped at once."""
        with self._wake:
            job.cancelled = True
            if job in self._jobs:
                self._jobs.remove(job)
            if self._running and all(running.cancelled for running in self._running):
                self._context.abort()

    # Below: the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                self._running = []
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if self._closing:
                    jobs, self._jobs = self._jobs, []
                    break
                self._context.clear_abort()
                batch = self._next_batch()
                self._running = [job for job, _ in batch]
            try:
                self._pass(batch)
            except DecodeAborted:
                continue
            except Exception as error:
                log.exception("a pass of the target failed")
                self._fail(self._running, error)
        self._fail(jobs, CloudFailed("the target was shut down"))

    def _next_batch(self) -> list[tuple[_Job, Extension]]:
        self._jobs.sort(key=lambda job: job.submitted)
        self._counters.active(job.tenant for job in self._jobs)
        self._jobs = [self._jobs[i] for i in self._counters.order([job.tenant for job in self._jobs])]
        remaining = []
        for job in self._jobs:
            if self._tenants[job.slot] != job.tenant:
                self._context.rewind(job.slot, 0)
                self._tenants[job.slot] = job.tenant
            kept = self._context.align(job.slot, job.token_ids[: len(job.token_ids) - job.num_rows])
            remaining.append(len(job.token_ids) - kept)
        num_rows = [job.num_rows for job in self._jobs]
        # Where hidden states are read, each token of the pass takes a row.
        judges = any(job.num_judged for job in self._jobs)
        max_tokens = self._context.max_rows if judges else self._context.max_batch_tokens
        steps = [left for left, rows in zip(remaining, num_rows, strict=True) if is_step(left, rows)]
        taken = plan(
            remaining,
            num_rows,
            [job.tenant for job in self._jobs],
            max_batch_tokens=min(max_tokens, self._context.max_batch_tokens),
            max_rows=self._context.max_rows,
            prefill_tokens=self._cost.prefill_tokens(sum(steps)),
        )
        batch = []
        for job, left, count in zip(self._jobs, remaining, taken, strict=True):
            if count:
                first = len(job.token_ids) - left
                read = job.num_rows if count == left else 0
                extension = Extension(
                    job.slot,
                    job.token_ids[first : first + count],
                    read,
                    wants_hidden=bool(read and job.num_judged),
                )
                batch.append((job, extension))
        return batch

    def _pass(self, batch: list[tuple[_Job, Extension]]) -> None:
        began = time.perf_counter()
        for job, _ in batch:
            job.started = job.started or began
        rows = self._context.decode([extension for _, extension in batch])
        ended = time.perf_counter()
        self._cost.observe(sum(len(extension.token_ids) for _, extension in batch), ended - began)
        for i, ((job, extension), logits) in enumerate(zip(batch, rows, strict=True)):
            job.sequence.num_computed_tokens += len(extension.token_ids)
            self._counters.serve(job.tenant, len(extension.token_ids))
            if extension.num_rows and not job.cancelled:
                try:
                    hidden = self._context.hidden_states(i) if extension.wants_hidden else None
                    self._deliver(job, logits, hidden, ended)
                except (ValueError, DuetError) as error:
                    # The logits of one stream are no distribution, or its text is not of its grammar.
                    log.warning("a stream failed: %s", error)
                    self._fail([job], error)

    def _deliver(
        self,
        job: _Job,
        logits: Sequence[NDArray[np.float32]],
        hidden: NDArray[np.float32] | None,
        now: float,
    ) -> None:
        assert job.started is not None
        timings = Timings(
            queue_us=int((job.started - job.submitted) * 1e6), verify_us=int((now - job.started) * 1e6)
        )
        if job.shaper is not None:
            job.shaper.shape(logits[0], job.token_ids)
        rows = rows_from_logits(logits, job.width)
        scores = Scores(rows, timings, logprobs_from_logits(logits, job.proposed))
        if hidden is not None:
            assert self.judge_head is not None, "nobody is judged without a head"
            scores = replace(scores, acceptable=self.judge_head.acceptable(hidden[-job.num_judged :]))
        more = job.deliver(scores)
        with self._wake:
            if more is None:
                with suppress(ValueError):  # cancelled meanwhile
                    self._jobs.remove(job)
            else:
                job.token_ids += more
                job.submitted, job.started = now, None

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        reason = error if isinstance(error, DuetError) else CloudFailed(f"the target failed: {error}")
        with self._wake:
            self._jobs = [job for job in self._jobs if job not in jobs]
        for job in jobs:
            job.fail(reason)


class LlamaCppSequence:
    """Implements `base.TargetSequence` on one slot."""

    def __init__(self, target: LlamaCppTarget, slot: int, tenant: str | None) -> None:
        self._target = target
        self._slot = slot
        self._tenant = tenant
        self.num_computed_tokens = 0
        self.drafts_pay = True

    async def score(
        self,
        token_ids: Sequence[int],
        *,
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None = None,
        num_judged: int = 0,
    ) -> Scores:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Scores] = loop.create_future()

        def deliver(scores: Scores) -> None:
            loop.call_soon_threadsafe(_settle, done, scores)

        def fail(error: DuetError) -> None:
            loop.call_soon_threadsafe(_settle, done, error)

        job = _Job(
            self._slot,
            self._tenant,
            list(token_ids),
            num_rows,
            width,
            self,
            deliver,
            fail,
            proposed or (),
            num_judged,
        )
        self._target.submit(job)
        try:
            scores = await done
        finally:
            self._target.cancel(job)
        return scores

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[int | DuetError] = asyncio.Queue()
        text = list(token_ids)
        base = len(text) - options.start

        def deliver(scores: Scores) -> list[int] | None:
            position = len(job.token_ids) - base
            token = int(draw(scores.rows, options.sampling, options.seed, position)[0])
            loop.call_soon_threadsafe(made.put_nowait, token)
            last = position + 1 >= options.start + options.max_tokens or token in options.end_token_ids
            return None if last else [token]

        def fail(error: DuetError) -> None:
            loop.call_soon_threadsafe(made.put_nowait, error)

        shaper = None
        if options.shaping != NO_SHAPING:
            shaper = self._target.shaper(options.shaping, options.num_prompt_tokens)
        job = _Job(
            self._slot, self._tenant, text, 1, options.sampling.row_width, self, deliver, fail, shaper=shaper
        )
        self._target.submit(job)
        try:
            for _ in range(options.max_tokens):
                token = await made.get()
                if isinstance(token, DuetError):
                    raise token
                yield [token]
                if token in options.end_token_ids:
                    return
        finally:
            self._target.cancel(job)


def _settle(done: asyncio.Future[Scores], result: Scores | DuetError) -> None:
    if done.done():
        return
    if isinstance(result, DuetError):
        done.set_exception(result)
    else:
        done.set_result(result)
