"""The engine's side of resident sessions: a vLLM scheduler that verifies drafts which come from outside.

vLLM loads it in the engine's process (`scheduler_cls`), where a session is a request that stays between its
rounds. A draft arrives as a control request, becomes the request's speculative tokens, and the engine's
own rejection verifies it in one step. A session without a draft is parked: out of the batch and without
one of the engine's slots, its blocks kept. A session that is parked for too long, or whose blocks another
one needs, gives them up; its next draft computes its text again, as far as the prompt cache lost it.

Nothing here looks at parked sessions one by one: the work of a step is that of the sessions in it.

There are two of it, as vLLM has two: one that ends a step before it schedules the next, and one that
schedules ahead (`vllm_worker`), where a step's sessions are left out of the next one.

vLLM's scheduler is no public interface. `vllm_resident.TESTED_VERSIONS` says which ones this was tried
on, and a test at the service's start decides.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from cloud_service.targets.resident_rounds import PendingRound, most_in_a_step

DRAFT = "duet_draft"
"""Key of a session's `extra_args`: its first draft, a list of token ids."""
DRAFTS = "duet_drafts"
"""Key of a control request's `extra_args`: of each [request id, length of the text before it, token ids]."""
PARKED_S = "duet_parked_s"
"""Key of the engine's `additional_config`: seconds that a parked session keeps its blocks."""
NUM_GROUPS = "duet_num_groups"
"""Likewise: into how many steps many sessions are divided (`resident_rounds.most_in_a_step`)."""

_HELD = 1 << 62
"""As the step from which on a request may be scheduled: not before its present step has ended."""


class NothingProposed:
    """A proposer that proposes nothing: with it the engine expects speculative tokens (`custom_class`)."""

    def __init__(self, vllm_config: Any) -> None:
        if current_platform.is_cpu():
            # vLLM 0.32's own lose their result where that is no int64 (temperatures, top-k and top-p of
            # drafts are then what lay in that memory before), and fail where a step has no drafts.
            rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens
            rejection_sampler.apply_top_k_top_p = _apply_top_k_top_p

    def load_model(self, *args: Any, **kwargs: Any) -> None: ...

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]


def _expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value once for each of its draft tokens.

    Args:
        x: [batch_size]
        cu_num_tokens: [batch_size], draft tokens of the requests up to and with each.
        replace_from, replace_to: a value to read as another.
    Returns:
        [num_tokens]
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts)


def _apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    return apply_top_k_top_p(logits, k, p) if len(logits) else logits


@dataclass(slots=True, eq=False)
class _Session:
    request: Request
    round: PendingRound | None
    """The draft that waits or is being verified; None while parked."""
    parked_at: float = 0.0


class RemoteDraftScheduler(Scheduler):  # type: ignore[misc, unused-ignore]
    """vLLM's own scheduler, with sessions whose speculative tokens come from outside."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.running: list[Request]
        self._parked_s: float = vllm_config.additional_config[PARKED_S]
        self._num_groups: int = vllm_config.additional_config[NUM_GROUPS]
        self._sessions: dict[str, _Session] = {}
        self._parked: OrderedDict[str, _Session] = OrderedDict()
        """By request id, those that hold blocks and wait for a draft; parked longest first."""
        self._ready: deque[_Session] = deque()
        """Have a draft and their blocks, and go into the batch as slots allow."""
        self._refused: list[Request] = []
        # With it vLLM does not lengthen a prompt whose last token alone is new by tokens that nobody drafted.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_evict

    # What comes in.

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        asked = (params.extra_args if params else None) or {}
        if DRAFTS in asked:
            for request_id, start, draft in asked[DRAFTS]:
                self._receive(request_id, start, draft)
            return
        if DRAFT in asked:
            round_ = PendingRound(request.num_tokens, asked[DRAFT])
            self._sessions[request.request_id] = _Session(request, round_)
        super().add_request(request)

    def _receive(self, request_id: str, start: int, draft: list[int]) -> None:
        session = self._sessions.get(request_id)
        if session is None:
            return  # has ended, which its last output said
        request = session.request
        fits = start + len(draft) < self.max_model_len
        if session.round is not None or start != request.num_tokens or not fits:
            self._refused.append(request)
            self.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
            return
        session.round = PendingRound(start, draft)
        if self._parked.pop(request_id, None):
            self._ready.append(session)
        else:  # evicted: vLLM resumes it as one that it preempted itself
            self.waiting.add_request(request)

    # A step.

    def get_num_unfinished_requests(self) -> int:
        # What is parked is in no queue, so that the engine sleeps while all sessions are.
        return int(super().get_num_unfinished_requests()) + len(self._ready)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._evict_those_parked_too_long()
        self._begin_rounds()
        return super().schedule(*args, **kwargs)

    def _begin_rounds(self) -> None:
        # One slot is left to new prompts, which sessions could otherwise shut out.
        slots = self.max_num_running_reqs - len(self.running) - bool(self.waiting)
        slots = min(slots, most_in_a_step(len(self._sessions), self._num_groups))
        while self._ready and slots > 0:
            session = self._ready.popleft()
            if session.request.is_finished():
                continue
            self._propose(session)
            self.running.append(session.request)
            slots -= 1

    def _propose(self, session: _Session) -> None:
        assert session.round is not None
        session.request.spec_token_ids = session.round.rest(self.num_spec_tokens)
        session.request.next_decode_eligible_step = 0

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Drafts come from outside alone."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        now = time.monotonic()
        done = set()
        for request_id in scheduler_output.num_scheduled_tokens:
            if (session := self._sessions.get(request_id)) is None:
                continue  # of a plain stream, or ended
            request, round_ = session.request, session.round
            assert round_ is not None
            if not (made := request.all_token_ids[round_.end :]):
                continue  # its text is not computed yet
            round_.receive(made)
            preempted = request.status is RequestStatus.PREEMPTED  # meanwhile, by a step ahead
            if round_.done and preempted:
                session.round = None
                self.waiting.remove_request(request)
            elif round_.done:
                session.round, session.parked_at = None, now
                self._parked[request_id] = session
                done.add(request)
            elif not preempted:
                self._propose(session)
        self.running = remove_all(self.running, done)
        for request in self._refused:
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        self._refused.clear()
        return outputs

    # Blocks.

    def _allocate_or_evict(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the cache's `allocate_slots`: parked sessions give way before any running one does."""
        while (blocks := self._allocate_slots(*args, **kwargs)) is None and self._parked:
            self._evict_oldest()
        return blocks

    def _evict_those_parked_too_long(self) -> None:
        horizon = time.monotonic() - self._parked_s
        while self._parked and next(iter(self._parked.values())).parked_at < horizon:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        _, session = self._parked.popitem(last=False)
        self._preempt_request(session.request, time.monotonic())
        self.waiting.remove_request(session.request)  # it waits for a draft, not for a slot

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._sessions.pop(request.request_id, None) is not None:
            self._parked.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class AheadScheduler(RemoteDraftScheduler, AsyncScheduler):  # type: ignore[misc, unused-ignore]
    """Of an engine that schedules a step while it computes the one before, by vLLM's V2 runner.

    A session that is in a step waits for its outcome, on which its next draft depends; a plain stream is in
    every step. The runner keeps parked sessions too, in as many slots as requests may run, so that the oldest
    gives way to a prompt that finds none.
    """

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        full = len(self.running) + self._num_aside >= self.max_num_running_reqs
        if full and self.waiting and self._parked:
            self._evict_oldest()
        return super().schedule(*args, **kwargs)

    def _begin_rounds(self) -> None:
        super()._begin_rounds()
        # By its count of these vLLM leaves slots to requests that are not running.
        self.num_waiting_for_streaming_input = self._num_aside

    @property
    def _num_aside(self) -> int:
        return len(self._parked) + len(self._ready)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        self.num_waiting_for_streaming_input = 0
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            request.spec_token_ids = []  # vLLM's placeholders for drafts of a model beside its own
            if request_id in self._sessions:
                request.next_decode_eligible_step = 0 if request.is_prefill_chunk else _HELD
