"""What `benchmarks.capacity` puts into the engine's process: forced acceptance, and clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.async_utils import AsyncOutput

from cloud_service.targets.vllm_scheduler import AheadScheduler, RemoteDraftScheduler

PREPARATION = ("_update_states", "_prepare_inputs", "add_requests", "update_requests", "prepare_inputs")
"""A runner's work in Python before its model runs: of V1 the first two, of V2 the others."""
WATCHED = ("execute_model", "sample_tokens", "_model_forward", "_sample", "_bookkeeping_sync", "sample")
"""Of a runner, by `--explain`: some within others, and with what they wait for."""
WAIT = "wait for the GPU"

_spent: dict[str, float] = {}
"""Seconds of the engine's thread by what it did, in this process."""
_calls: Counter[str] = Counter()


def _timed(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            _spent[what] = _spent.get(what, 0.0) + time.perf_counter() - began
            _calls[what] += 1

    return timed


def _timed_scheduler(scheduler: type) -> type:
    """With clocks on what it does for a step; vLLM finds it by its name in this module."""
    clocks = {"add_request": "intake", "schedule": "schedule", "update_from_output": "update"}
    timed = {name: _timed(what, getattr(scheduler, name)) for name, what in clocks.items()}
    return type(f"Timed{scheduler.__name__}", (scheduler,), timed)


TimedRemoteDraftScheduler = _timed_scheduler(RemoteDraftScheduler)
TimedAheadScheduler = _timed_scheduler(AheadScheduler)


class ForcedAcceptance:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    model_runner: Any

    def accept(self, rates: list[float]) -> None:
        """From now on draft token i is accepted with probability rates[i], if those before it were."""
        sampler = self.model_runner.rejection_sampler
        sampler.synthetic_conditional_rates = torch.tensor(
            rates, dtype=torch.float32, device=self.model_runner.device
        )

    def time_preparation(self) -> None:
        """Measure what of a step's work in Python is the runner's, before the model runs."""
        for name in PREPARATION:
            self._time(name, "prepare")

    def watch_steps(self) -> None:
        """Measure what a step waits for besides, the GPU's part included."""
        for name in WATCHED:
            self._time(name, name)
        AsyncOutput.get_output = _timed(WAIT, AsyncOutput.get_output)

    def _time(self, name: str, what: str) -> None:
        if (work := getattr(self.model_runner, name, None)) is not None:
            setattr(self.model_runner, name, _timed(what, work))

    def spent(self) -> dict[str, float]:
        """Seconds so far; without the scheduler's where the worker has a process of its own."""
        return {what: seconds for what, seconds in _spent.items() if what not in (*WATCHED, WAIT)}

    def steps(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds so far, of everything that is measured."""
        return {what: (_calls[what], seconds) for what, seconds in _spent.items()}
