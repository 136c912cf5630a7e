"""Hidden states of vLLM's last layer for the draft tokens of a round, and a judge head's products with them.

vLLM offers three ways to them:

- Its own extraction of hidden states writes files, which a round would have to wait for and to find.
- A registered subclass of the model, one for each architecture, sees rows without the requests that they
  belong to, and its pass runs inside graphs, where nothing can be kept.
- A worker extension (`worker_extension_cls`) is mixed into the worker of any device, and `collective_rpc`
  calls its methods. Between a step's pass and its sampling, outside of any graph, the worker's runner has the
  hidden states after the final norm, and knows whose they are. This is the way taken here.

The extension is a public interface of vLLM; the runner is not, so that only known versions are taken, and
rows are tried out at the start (`fault`). Rounds only: a session that stays in the engine (`vllm_resident`)
ends its rows with the first rejection. The head is applied in the worker: of each draft token one number
travels.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from packaging.version import Version

from shared.errors import CloudError

log = logging.getLogger("duet.target")

KNOWN_VERSIONS = frozenset({"0.25.1", "0.32.0"})
"""Of vLLM. Run was 0.32.0 on a CPU, its V1 runner; of 0.25.1 and of the V2 runners the sources were read."""

Hidden = NDArray[np.float32]

_JUDGED = re.compile(r"(duet-\d+-judged-(\d+))(-\w+)?")
"""What `request_name` makes; vLLM appends characters of its own."""
_MOST_KEPT = 4096
"""Requests; more than the service has at once. Those of streams that were cancelled are never asked for."""


def why_not(options: Mapping[str, Any]) -> str | None:
    """What stands against hidden states: the installed vLLM, the operator's options, or nothing."""
    version = Version(vllm.__version__).public
    if version not in KNOWN_VERSIONS:
        return f"hidden states were never taken out of vLLM {version}"
    if "worker_extension_cls" in options:
        return "--engine.worker-extension-cls is set"
    if options.get("data_parallel_size", 1) > 1:
        return "--engine.data-parallel-size is above 1, and only the first engine can be asked"
    return None


def engine_options() -> dict[str, Any]:
    """Options of vLLM's engine under which hidden states can be kept."""
    return {"worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}"}


def request_name(number: int, num_judged: int) -> str:
    """Name of a request of which the last rows are kept."""
    return f"duet-{number}-judged-{num_judged}"


class HiddenRows:
    """What one engine, started with `engine_options`, keeps of hidden states."""

    def __init__(self, llm: Any, hidden_size: int) -> None:
        self.size = hidden_size
        """Numbers of a hidden state."""
        self._llm = llm
        self._width = hidden_size

    async def keep(self, weight: NDArray[np.float64] | None) -> None:
        """Keep rows of the requests that are named for it from now on.

        Args:
            weight: [size], a row is its product with this; None keeps whole hidden states.
        """
        self._width = self.size if weight is None else 1
        await self._llm.collective_rpc("duet_keep_rows", args=(None if weight is None else weight.tolist(),))

    async def take(self, name: str, num_tokens: int, num_rows: int) -> Hidden | None:
        """Rows of the last tokens of a request that has ended, once; None where they were not all computed.

        Args:
            name: see `request_name`.
            num_tokens: of the request's text.
        Returns:
            [num_rows, size], or [num_rows, 1]
        """
        answers = await self._llm.collective_rpc("duet_take_rows", args=(name,))
        # All workers of a tensor-parallel group hold the same; of a pipeline, the last one does.
        kept = next((answer for answer in answers if answer is not None), None)
        if kept is None:
            return None
        end, raw = kept
        rows = np.frombuffer(raw, np.float32).reshape(-1, self._width)
        return rows[-num_rows:] if end == num_tokens and len(rows) >= num_rows else None


class ReadsHidden(Protocol):
    async def read(self, token_ids: Sequence[int], num_read: int) -> tuple[Any, Hidden]:
        """Rows and hidden states of the last tokens of a text."""
        ...


TEST_TOKENS = 8
_TEST_ROWS = 4
_TEST_DISTANCE = 0.1
"""Of two hidden states, by the length of one: kernels make less of the same token, other tokens more."""


async def fault(sequence: ReadsHidden, text: Sequence[int]) -> str | None:
    """Try hidden states out on a short text: what is wrong with them in this engine, or None.

    Of two texts in one batch, which end differently, the rows before that must be equal, and no others.

    Args:
        text: `TEST_TOKENS`, all different. Whole hidden states must be kept.
    """
    other = [*text[:-1], text[0], text[1]]
    try:
        (_, first), (_, second) = await asyncio.gather(
            sequence.read(text, _TEST_ROWS), sequence.read(other, _TEST_ROWS + 1)
        )
    except CloudError as error:
        return str(error)
    distances = np.linalg.norm(first - second[:-1], axis=1) / np.linalg.norm(first, axis=1)
    if not (distances[:-1] < _TEST_DISTANCE).all():  # written so that NaN fails too
        return "a token's hidden state changes with the token after it"
    if not distances[-1] > _TEST_DISTANCE:
        return "a token's hidden state does not change with the token"
    return None


# Below: the engine's process.


class WorkerExtension:
    """Mixed into vLLM's worker; its methods are called by `collective_rpc`."""

    model_runner: Any
    _duet_keeper: RowKeeper

    def duet_keep_rows(self, weight: Sequence[float] | None) -> None:
        if "_duet_keeper" not in vars(self):
            self._duet_keeper = RowKeeper(self.model_runner)
        self._duet_keeper.weight = (
            None if weight is None else torch.tensor(weight, device=self.model_runner.device)
        )

    def duet_take_rows(self, name: str) -> tuple[int, bytes] | None:
        """The position after the last row, and the rows in float32."""
        return self._duet_keeper.take(name)


class RowKeeper:
    """Keeps the last rows of the requests that are named for it, from step to step of a runner."""

    weight: torch.Tensor | None = None
    """[hidden_size], float32, what a row is multiplied with."""

    def __init__(self, runner: Any) -> None:
        self._rows: dict[str, tuple[int, torch.Tensor]] = {}
        """By name: the position after the last row, and the rows."""
        self._runner = runner
        self._sample_tokens = runner.sample_tokens
        runner.sample_tokens = self._keep_then_sample

    def take(self, name: str) -> tuple[int, bytes] | None:
        if (kept := self._rows.pop(name, None)) is None:
            return None
        end, rows = kept
        return end, rows.cpu().numpy().tobytes()

    def _keep_then_sample(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._keep_rows(self._runner.execute_model_state)
        except Exception:  # judging stops, and the engine goes on
            log.exception("hidden states are kept no more")
            self._runner.sample_tokens = self._sample_tokens
        return self._sample_tokens(*args, **kwargs)

    def _keep_rows(self, state: Any) -> None:
        # None in a step without tokens, and in all but the last worker of a pipeline.
        if state is None or state.hidden_states is None:
            return
        for request_id, start, first, count in _requests(self._runner, state):
            if named := _JUDGED.fullmatch(request_id):
                self._keep(named[1], int(named[2]), start, state.hidden_states[first : first + count])

    def _keep(self, name: str, num_rows: int, start: int, hidden: torch.Tensor) -> None:
        """Take what a step computed of a request.

        Args:
            start: position of the first row; after a preemption it may be one that was there before.
            hidden: [num_tokens, hidden_size]
        """
        end = start + len(hidden)
        rows = hidden[-num_rows:].to(torch.float32, copy=True)  # a graph writes the next step over it
        if self.weight is not None:
            rows = (rows * self.weight).sum(dim=1, keepdim=True)
        before = self._rows.pop(name, None)
        if before is not None and before[0] == end - len(rows):
            rows = torch.cat((before[1], rows))[-num_rows:]
        self._rows[name] = end, rows
        if len(self._rows) > _MOST_KEPT:
            del self._rows[next(iter(self._rows))]


def _requests(runner: Any, state: Any) -> Iterator[tuple[str, int, int, int]]:
    """Of each request of a step: its id, the position of its first token, that token's row, and how many."""
    if hasattr(state, "input_batch"):  # the V2 runner
        batch = state.input_batch
        columns = batch.num_computed_tokens_np, batch.query_start_loc_np[:-1], batch.num_scheduled_tokens
        for request_id, *numbers in zip(batch.req_ids, *columns, strict=False):
            start, first, count = map(int, numbers)
            yield request_id, start, first, count
        return
    for request_id, count in state.scheduler_output.num_scheduled_tokens.items():
        first = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
        yield request_id, runner.requests[request_id].num_computed_tokens, first, count
