"""The worker of an engine that schedules a step while it computes the one before, with drafts from outside.

vLLM's V2 runner keeps each request's text, and the draft to verify next, on the GPU, so that a step can begin
without the outcome of the last one. Drafts of vLLM's own speculation are there already; ours come with the
step (`vllm_scheduler.AheadScheduler`) and are put there before its inputs are made.

vLLM loads this in the engine's process (`worker_cls`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm.v1.worker.gpu.model_runner as runners
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker


class NothingProposed:
    """A speculator that proposes nothing, with what the runner asks of any."""

    supports_mm_inputs = False
    draft_logits = None
    """A draft's token is taken as certain, so that its rejection is exact in distribution."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self.model = torch.nn.Module()
        most = (vllm_config.scheduler_config.max_num_seqs, vllm_config.num_speculative_tokens)
        self._nothing = torch.zeros(most, dtype=torch.int64, device=device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None: ...

    def capture(self, attn_states: Any) -> None: ...

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._nothing[: input_batch.num_reqs]


class RemoteDraftRunner(GPUModelRunner):  # type: ignore[misc, unused-ignore]
    """vLLM's V2 runner, which verifies the drafts that a step brings."""

    def prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if drafts := scheduler_output.scheduled_spec_decode_tokens:
            put(self.req_states.draft_tokens, self.req_states.req_id_to_index, drafts)
        return super().prepare_inputs(scheduler_output, *args, **kwargs)


def put(draft_tokens: torch.Tensor, slots: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> None:
    """Write drafts to where the runner reads them.

    Args:
        draft_tokens: [num_slots, max_draft_tokens]
        slots: row of each request.
        drafts: of requests, no longer than a row.
    """
    width = draft_tokens.shape[1]
    rows = torch.tensor(
        [[slots[name], *draft, *[0] * (width - len(draft))] for name, draft in drafts.items()]
    )
    rows = rows.to(draft_tokens.device, non_blocking=True)
    draft_tokens[rows[:, 0]] = rows[:, 1:]


class RemoteDraftWorker(Worker):  # type: ignore[misc, unused-ignore]
    """vLLM's worker of a GPU, with that runner. Its process serves no other engine."""

    def init_device(self) -> None:
        runners.init_speculator = NothingProposed
        runners.GPUModelRunner = RemoteDraftRunner
        super().init_device()
