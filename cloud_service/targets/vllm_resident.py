"""The service's side of resident sessions: a stream whose text stays in the engine between its rounds.

A round of `vllm.VllmSequence` is a request of its own, which costs the engine a millisecond of set-up and
computes part of a cache block again. Here one request lives as long as the stream, and each draft is handed
to it as its own speculative tokens (`vllm_scheduler`), so that a round costs one step of the draft's length.

The engine verifies by itself, so all that comes back is which tokens stand: the draft's own up to the first
that the target does not want, and the target's in its place. A sampled draft is verified by the engine's
rejection sampling (Leviathan et al. 2023, arXiv:2211.17192), the draft a distribution of one token, so that
the text is exact in distribution, by noise of the engine's. What needs more (a draw with a seed's noise, the
probability of a token that is no argmax) goes round by round, in the same engine.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
import vllm
from packaging.version import Version
from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreEventType, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError

from cloud_service.draft_value import DraftValue, StreamRounds
from cloud_service.targets.base import GenerateOptions, Scores, TargetSequence, drawn_by_vllm
from cloud_service.targets.resident_rounds import PendingRound, graph_sizes, most_in_a_step
from cloud_service.targets.vllm_rows import join
from cloud_service.targets.vllm_scheduler import (
    DRAFT,
    DRAFTS,
    NUM_GROUPS,
    PARKED_S,
    AheadScheduler,
    NothingProposed,
    RemoteDraftScheduler,
)
from shared.errors import CloudError, CloudFailed, CloudUnavailable
from shared.messages import Timings
from shared.sampling import MAX_TOP_K, Sampling, settled_rows

TESTED_VERSIONS = frozenset({"0.25.1", "0.32.0"})
"""Of vLLM. Its schedulers and proposers are no public interface, so that others take the other scheme."""

MAX_STEP_DRAFT_TOKENS = 16
"""What a session verifies in one step of the engine; a longer draft takes several."""

DIED = "the engine of the service has died; resume on another replica, or try again once it is back"

TESTED_AHEAD = frozenset({"0.25.1"})
"""Likewise, of which the worker too was tried (`look_ahead`)."""

DEFAULT_PARKED_S = 30.0
"""How long a session without a draft keeps its blocks."""


AHEAD_GROUPS = 3
"""Groups of many sessions in an engine that schedules ahead."""

MEASURED_STREAMS = 64
"""Up to how many streams at once sessions in the engine were measured to yield more than plain streams do, on
one H200, a 7B, no step ahead (docs/benchmarks.md): 2.99x at 1, 2.20x at 16, 1.06x at 64, 0.71x at 128."""
MEASURED_AHEAD = 128
"""Likewise of an engine that schedules ahead: 2.79x at 1, 2.04x at 16, 1.33x at 64, 1.04x at 128."""


def measured_streams() -> int:
    """`MEASURED_STREAMS` of an engine as it would be here."""
    return MEASURED_AHEAD if _may_look_ahead() else MEASURED_STREAMS


def graph_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of vLLM's engine by which it has CUDA graphs for the steps of its sessions; none without CUDA.

    Args:
        options: that are set already: how many streams and tokens a step may have.
    """
    if not current_platform.is_cuda():
        return {}
    sizes = graph_sizes(
        options.get("max_num_seqs", measured_streams()),
        MAX_STEP_DRAFT_TOKENS + 1,
        options.get("max_num_batched_tokens"),
        any_size=_may_look_ahead(),
    )
    # Drafts differ in length, so that only graphs of mixed steps cover them.
    return {"compilation_config": {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": sizes}}


def engine_options(*, parked_s: float = DEFAULT_PARKED_S, num_groups: int | None = None) -> dict[str, Any]:
    """Options of vLLM's engine that make room for resident sessions.

    Args:
        parked_s: seconds that a session without a draft keeps its blocks.
        num_groups: steps into which many sessions are divided; by default as many as the engine gains by.
    """
    return {
        "scheduler_cls": _name(RemoteDraftScheduler),
        "speculative_config": {
            "method": "custom_class",
            "model": _name(NothingProposed),
            "num_speculative_tokens": MAX_STEP_DRAFT_TOKENS,
        },
        "additional_config": {PARKED_S: parked_s, NUM_GROUPS: num_groups},
    }


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def makes_room(config: Any) -> bool:
    """Whether an engine of these settings takes sessions."""
    return PARKED_S in config.additional_config


def look_ahead(config: VllmConfig) -> None:
    """Have the engine schedule a step while it computes the one before, where it can do so with sessions.

    Args:
        config: with `engine_options`, by which vLLM would choose its V1 runner and no step ahead.
    """
    able = (
        _may_look_ahead()
        and config.parallel_config.world_size == 1
        and not config.model_config.is_moe
        and not _Ahead._get_v2_model_runner_unsupported_features(config)
    )
    groups = config.additional_config[NUM_GROUPS]
    config.additional_config[NUM_GROUPS] = groups or (AHEAD_GROUPS if able else 1)
    if able:
        config.__class__ = _Ahead
        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = _name(AheadScheduler)
        config.parallel_config.worker_cls = _WORKER


def _may_look_ahead() -> bool:
    """Whether GPU and vLLM are such that it can be, of some models."""
    tested = Version(vllm.__version__).public in TESTED_AHEAD
    return current_platform.is_cuda() and tested and envs.VLLM_USE_V2_MODEL_RUNNER is not False


_WORKER = "cloud_service.targets.vllm_worker.RemoteDraftWorker"
"""By name: the engine's process loads it, and the service need not load vLLM's runner."""


class _Ahead(VllmConfig):  # type: ignore[misc, unused-ignore]
    """vLLM's settings, of an engine with the V2 runner and a step ahead. By itself vLLM refuses both to
    speculation that it does not know."""

    @property
    def use_v2_model_runner(self) -> bool:
        return True

    def _get_v2_model_runner_unsupported_features(self) -> list[str]:
        found = VllmConfig._get_v2_model_runner_unsupported_features(self)
        return [feature for feature in found if not feature.startswith("speculative method")]

    def __post_init__(self) -> None:
        # vLLM's engine process does this once more.
        self.scheduler_config.async_scheduling = False
        super().__post_init__()
        self.scheduler_config.async_scheduling = True


class ResidentSessions:
    """The sessions of one engine.

    Their drafts and answers go past vLLM's own bookkeeping of requests in this process, which costs more than
    all else that a round does here. Drafts go to the engine together, since each message costs it something:
    where it ends a step before it schedules the next, those that come meanwhile wait for that end, and their
    sessions then share its steps; where it schedules ahead, they wait for a millisecond, and are in the step
    behind the present one.
    """

    def __init__(self, llm: Any, padding: frozenset[int]) -> None:
        """
        Args:
            llm: the engine, started with `engine_options`.
            padding: ids that stand for nothing, which the engine does not know.
        """
        self.padding = padding
        self.num_evicted = 0
        """How often a session gave up its blocks."""
        self.value = DraftValue()
        """What drafts gain and cost here."""
        self._idle = True
        self._step_began = 0.0
        """When the engine began its step, or got something to do after it had nothing."""
        self._llm = llm
        self._core = llm.engine_core
        self._context_tokens = int(llm.vllm_config.model_config.max_model_len)
        self._ahead: bool = llm.vllm_config.scheduler_config.async_scheduling
        self._num_groups: int = llm.vllm_config.additional_config[NUM_GROUPS]
        self._ids = itertools.count()
        self._sessions: dict[str, Session] = {}
        self._verifying: set[str] = set()
        """Sessions whose draft the engine has."""
        self._drafts: list[tuple[str, int, list[int]]] = []
        """Those that wait: the session, tokens of its text before the draft, and the draft."""
        self._sending: set[asyncio.Task[None]] = set()
        self._next_outputs = self._core.get_output_async
        self._core.get_output_async = self._outputs_of_others

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, text: Sequence[int], draft: Sequence[int], cache_salt: str | None, own_draw: Sampling | None
    ) -> Session:
        """Begin a session with its first draft, for `Session.verdict`; greedy without `own_draw`."""
        self._llm._run_output_handler()  # reads what the engine says; vLLM begins it with the first request
        session = Session(f"session-{next(self._ids)}", text)
        session.begin(draft)
        self._sessions[session.name] = session
        self._verifying.add(session.name)
        params = SamplingParams(
            **(drawn_by_vllm(own_draw) if own_draw else {"temperature": 0.0}),
            max_tokens=self._context_tokens - len(text),
            ignore_eos=True,
            detokenize=False,
            extra_args={DRAFT: list(draft)},
        )
        self._send(session.name, text, params, cache_salt)
        return session

    def verify(self, session: Session, draft: Sequence[int]) -> None:
        """Hand over a session's next draft, for `Session.verdict`."""
        start = session.begin(draft)
        self._drafts.append((session.name, start, list(draft)))
        loop = asyncio.get_running_loop()
        if not self._verifying or len(self._drafts) == self._enough():
            loop.call_soon(self._flush)
        elif self._ahead and len(self._drafts) == 1:
            loop.call_later(_GATHER_S, self._flush)

    def close(self, session: Session) -> None:
        """Take a session out of the engine."""
        if self._sessions.pop(session.name, None) is not None:
            self._do(self._core.abort_requests_async([session.name]))
            self._verifying.discard(session.name)
            self._flush()

    def _enough(self) -> int:
        """Drafts that wait for no others: where all sessions share a step, all; else most of a group's."""
        most = most_in_a_step(len(self), self._num_groups)
        return most // 2 if most < len(self) else most

    def _flush(self) -> None:
        drafts = [draft for draft in self._drafts if draft[0] in self._sessions]
        self._drafts.clear()
        if drafts:
            self._verifying.update(name for name, _, _ in drafts)
            control = SamplingParams(max_tokens=1)
            control.extra_args = {DRAFTS: drafts}  # past vLLM's look at each token of arguments from users
            self._send(f"drafts-{next(self._ids)}", [0], control, None)

    def _send(self, name: str, text: Sequence[int], params: SamplingParams, cache_salt: str | None) -> None:
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(text),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=cache_salt,
            data_parallel_rank=None,
        )
        self._do(self._core.add_request_async(request))

        if self._idle:
            self._idle, self._step_began = False, time.monotonic()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        async def done() -> None:
            with suppress(EngineDeadError):  # whoever waits for an answer learns it
                await work

        task = asyncio.create_task(done())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _outputs_of_others(self) -> Any:
        """In place of the engine client's `get_output_async`: sessions get what is theirs, vLLM the rest."""
        try:
            outputs = await self._next_outputs()
        except EngineDeadError:
            for session in self._sessions.values():
                session.fail(CloudUnavailable(DIED))
            raise
        if not self._sessions:  # plain streams alone have thousands of outputs a second
            self._idle = True
            return outputs
        self._learn(outputs.outputs)
        others = []
        for output in outputs.outputs:
            if (known := self._sessions.get(output.request_id)) is None:
                others.append(output)
                continue
            known.receive(output)
            events = [event.type for event in output.events or ()]
            self.num_evicted += events.count(EngineCoreEventType.PREEMPTED)
            if output.finished:
                del self._sessions[known.name]
            if known.settled:
                self._verifying.discard(known.name)
        self._idle = not self._verifying and all(output.finished for output in others)
        if self._drafts:
            # Behind the streams that were answered just now, whose next drafts may follow at once.
            asyncio.get_running_loop().call_soon(self._flush)
        outputs.outputs = others
        return outputs

    def _learn(self, outputs: Sequence[Any]) -> None:
        """Take what a step cost, unless it read prompts or told of none."""
        now = time.monotonic()
        if outputs and not self._idle and all(output.prefill_stats is None for output in outputs):
            num_made = sum(len(output.new_token_ids) for output in outputs)
            sessions = [self._sessions.get(output.request_id) for output in outputs]
            num_tokens = sum(1 if known is None else known.num_step_tokens for known in sessions)
            self.value.observe(num_tokens, num_made, now - self._step_began)
        self._step_began = now


class Session:
    """A request that stays in the engine."""

    verdict: asyncio.Future[list[int]]
    """Of the draft in question: its own tokens up to the first that is not the target's, and one more."""

    def __init__(self, name: str, text: Sequence[int]) -> None:
        self.name = name
        self.text = list(text)
        """What the engine holds of it, up to the draft in question."""
        self.num_cached_tokens = 0
        """Of the text that it began with."""
        self._round = PendingRound(len(self.text), ())

    def begin(self, draft: Sequence[int]) -> int:
        """Begin a round; returns where its draft starts."""
        self._round = PendingRound(len(self.text), draft)
        self.verdict = asyncio.get_running_loop().create_future()
        return len(self.text)

    @property
    def num_step_tokens(self) -> int:
        """What the engine computes of it in a step."""
        return 1 + len(self._round.rest(MAX_STEP_DRAFT_TOKENS))

    @property
    def settled(self) -> bool:
        return self.verdict.done()

    def receive(self, output: Any) -> None:
        """Take what the engine made of it."""
        if output.prefill_stats is not None:
            self.num_cached_tokens = output.prefill_stats.num_cached_tokens
        self._round.receive(output.new_token_ids)
        if self._round.done and not self.settled:
            self.text += self._round.made
            self.verdict.set_result(self._round.made)
        elif output.finished:
            self.fail(CloudFailed("the engine gave a session up before it had verified its draft"))

    def fail(self, error: CloudError) -> None:
        if not self.settled:
            self.verdict.set_exception(error)
            self.verdict.exception()  # nobody may wait for it any more


class ResidentSequence:
    """Implements `base.TargetSequence`."""

    def __init__(
        self,
        sessions: ResidentSessions,
        rounds: TargetSequence,
        cache_salt: str | None,
        own_draw: Sampling | None = None,
    ) -> None:
        """
        Args:
            rounds: the same stream by the other scheme, for what the engine does not verify by itself.
            own_draw: what the engine draws tokens from; None where they are greedy, or a seed's.
        """
        self._own_draw = own_draw
        self._sessions = sessions
        self._rounds = rounds
        self._cache_salt = cache_salt
        self._session: Session | None = None
        self._judged = False
        """Whether drafts of the stream are put to a judge head, which takes rows behind a rejection."""
        self.num_computed_tokens = 0
        self._own_rounds = StreamRounds()

    async def score(
        self,
        token_ids: Sequence[int],
        *,
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None = None,
        num_judged: int = 0,
    ) -> Scores:
        """See `base.TargetSequence`. The engine's own rows end with the first that is not the draft's."""
        self._judged = self._judged or num_judged > 0
        if self._judged or proposed is not None or (width > 1 and self._own_draw is None):
            return await self._by_rounds(token_ids, num_rows, width, proposed, num_judged)
        began = time.perf_counter()
        start = len(token_ids) - (num_rows - 1)
        made = await self._verify(list(token_ids[:start]), token_ids[start:])
        legal = list(itertools.takewhile(lambda token: token not in self._sessions.padding, made))
        rows = settled_rows(legal, width)
        if len(legal) < len(made):
            # Nobody's token: the other scheme chooses without it, from there on.
            await self.aclose()
            others = await self._by_rounds(token_ids, num_rows - len(legal), width, None, 0)
            rows = join(rows, others.rows)
        return Scores(rows, Timings(verify_us=int(1e6 * (time.perf_counter() - began))), _NONE)

    async def _verify(self, text: list[int], draft: Sequence[int]) -> list[int]:
        began = time.monotonic()
        session = self._session
        opens = session is None or session.text != text
        if session is None or opens:
            await self.aclose()
            session = self._session = self._sessions.open(text, draft, self._cache_salt, self._own_draw)
        else:
            self._sessions.verify(session, draft)
        try:
            made = await session.verdict
        except BaseException:  # a cancel too: nobody knows what the engine holds now
            await self.aclose()
            raise
        self.num_computed_tokens += len(draft) + (len(text) - session.num_cached_tokens if opens else 1)
        if not opens:  # which reads a prompt, and tells nothing of rounds
            now = time.monotonic()
            self._own_rounds.add(len(draft), len(made), now - began, now)
        return made

    @property
    def drafts_pay(self) -> bool:
        return self._sessions.value.pays(self._own_rounds)

    async def _by_rounds(
        self,
        token_ids: Sequence[int],
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None,
        num_judged: int,
    ) -> Scores:
        before = self._rounds.num_computed_tokens
        scores = await self._rounds.score(
            token_ids, num_rows=num_rows, width=width, proposed=proposed, num_judged=num_judged
        )
        self.num_computed_tokens += self._rounds.num_computed_tokens - before
        return scores

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        before = self.num_computed_tokens
        async with aclosing(self._rounds.generate(token_ids, options)) as made:
            async for new in made:
                self.num_computed_tokens = before + self._rounds.num_computed_tokens
                yield new

    async def aclose(self) -> None:
        """Take the session out of the engine, if there is one."""
        if (session := self._session) is not None:
            self._session = None
            self._sessions.close(session)


_NONE = np.empty(0)

_GATHER_S = 1e-3
"""For how long drafts wait for others before they go to an engine that is at work and schedules ahead."""

_TEST_TOKENS = 6
_TEST_NATS = 0.5
"""How much less likely than the argmax a token may be that the other kind of pass preferred."""


async def fault(sessions: ResidentSessions, rounds: TargetSequence, prompt: Sequence[int]) -> str | None:
    """Try sessions out on a short text: what is wrong with them in this engine, or None.

    The text that a session makes against a wrong draft, and again against a right one, must be the greedy one
    by the rows of the other scheme, up to what kernels for one token and for several differ by.
    """
    try:
        wrong = [prompt[0]] * _TEST_TOKENS
        made: list[int] = []
        async with aclosing(ResidentSequence(sessions, rounds, None)) as sequence:
            while len(made) < _TEST_TOKENS:
                made += await sequence._verify([*prompt, *made], wrong[: len(made)])
        async with aclosing(ResidentSequence(sessions, rounds, None)) as sequence:
            again = await sequence._verify(list(prompt), made[:-1])
        for text in (made, again):
            scores = await rounds.score(
                [*prompt, *text[:-1]], num_rows=len(text), width=MAX_TOP_K, proposed=text
            )
            if (scores.rows.logprobs[:, 0] - scores.logprobs > _TEST_NATS).any():
                return f"a session made {text}, which is not the model's greedy text"
    except CloudError as error:
        return str(error)
    return None
