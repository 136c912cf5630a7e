"""Collects a run's rows: in this process, in several, or on a Ray cluster; one writer in every case."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import AsyncExitStack, aclosing, contextmanager
from math import ceil
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edge_agent.evaluation.plan import Examine, Plan, Unit
from edge_agent.evaluation.runs import Row, Run
from shared.errors import DuetError, InvalidSetting

Result = TypeVar("Result")

log = logging.getLogger("duet.eval")

CHUNK = 16
"""Units handed to a worker at once, or twice those that share passes: what is lost if it dies."""
LOG_EVERY_S = 30.0
"""Where no terminal shows a bar, a line says so often how far the run is."""


async def collect(run: Run, plan: Plan, units: Sequence[Unit], *, num_workers: int, ray: bool) -> None:
    """Make and append every row that the run lacks.

    Args:
        num_workers: models loaded side by side; 1 works in this process.
        ray: spread them over a Ray cluster (`RAY_ADDRESS`, else one started here).
    """
    todo = [unit for unit in units if unit.id not in run.done]
    if not todo:
        return
    size = min(max(CHUNK, 2 * plan.num_parallel), ceil(len(todo) / num_workers))
    chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
    with _progress(len(units), len(units) - len(todo)) as advance:
        if ray:
            rows = _by_ray(plan, chunks, num_workers)
        elif num_workers > 1:
            rows = _by_processes(plan, chunks, num_workers)
        else:
            rows = _here(plan, chunks)
        async with aclosing(rows):
            async for row in rows:
                run.append(row)
                advance()


async def _here(plan: Plan, chunks: Sequence[Sequence[Unit]]) -> AsyncGenerator[Row, None]:
    async with plan.open() as examine:
        for chunk in chunks:
            async with aclosing(examine(chunk)) as rows:
                async for row in rows:
                    yield row


class Worker:
    """A plan in a process of its own, opened with the first units."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._examine: Examine | None = None

    def rows(self, units: Sequence[Unit]) -> tuple[list[Row], DuetError | None]:
        """The rows, and what ended them early."""
        rows: list[Row] = []

        async def make() -> None:  # no method: Ray would run an actor that has an async one in its own loop
            if self._examine is None:
                self._examine = await self._stack.enter_async_context(self._plan.open())
            async with aclosing(self._examine(units)) as made:
                async for row in made:
                    rows.append(row)

        try:
            self._loop.run_until_complete(make())
        except DuetError as error:
            return rows, error
        return rows, None


_worker: Worker | None = None


def _start_worker(plan: Plan) -> None:
    global _worker
    _worker = Worker(plan)


def _rows_of_worker(units: Sequence[Unit]) -> tuple[list[Row], DuetError | None]:
    assert _worker is not None, "the pool started it"
    return _worker.rows(units)


async def _by_processes(
    plan: Plan, chunks: Sequence[Sequence[Unit]], num_workers: int
) -> AsyncGenerator[Row, None]:
    # Spawned, not forked: llama.cpp and gRPC have threads.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(plan,)
    )
    try:
        running = {pool.submit(_rows_of_worker, chunk) for chunk in chunks}
        failure: DuetError | None = None
        while running:
            done, running = await asyncio.to_thread(wait, running, return_when=FIRST_COMPLETED)
            for future in done:
                rows, error = future.result()
                for row in rows:
                    yield row
                failure = failure or error
            if failure is not None:  # no more is begun, but what the others are at is kept
                running = {future for future in running if not future.cancel()}
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def _by_ray(
    plan: Plan, chunks: Sequence[Sequence[Unit]], num_workers: int
) -> AsyncGenerator[Row, None]:
    try:
        import ray
    except ImportError:
        raise InvalidSetting("--ray needs Ray; run: pip install 'ray[default]'") from None
    # Unasked, Ray would join whatever cluster it finds traces of here, also one that is gone.
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    try:
        actor: Any = ray.remote(Worker)
        pool = ray.util.ActorPool([actor.remote(plan) for _ in range(num_workers)])
        results = pool.map_unordered(lambda worker, chunk: worker.rows.remote(chunk), chunks)
        async for rows, error in _in_thread(results):
            for row in rows:
                yield row
            if error is not None:
                raise error
    finally:
        ray.shutdown()


async def _in_thread(results: Iterator[Result]) -> AsyncIterator[Result]:
    while (result := await asyncio.to_thread(next, results, None)) is not None:
        yield result


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began = said = time.monotonic()
    made = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("questions", total=total, completed=done, rate="")

        def advance() -> None:
            nonlocal made, said
            made += 1
            now = time.monotonic()
            rate = made / (now - began)
            bars.update(task, advance=1, rate=f"{rate * 60:.1f} a minute")
            if not console.is_terminal and (now - said > LOG_EVERY_S or done + made == total):
                said = now
                left_s = (total - done - made) / rate
                console.print(
                    f"duet: {done + made} of {total}, {rate * 60:.1f} a minute, {left_s / 60:.0f} min left"
                )

        yield advance
