"""A target on vLLM, in this process. A round is one request of the engine, which batches them all, or
a step of a request that stays there (`vllm_resident`), where stream and engine allow it.

With `vllm_resident`, `vllm_scheduler` and `vllm_judge` the one module that imports vLLM. Its engine runs in a
process of its own, which imports this module too, for `SeededNoise`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import vllm
from packaging.version import Version
from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from cloud_service.targets import vllm_judge as judging
from cloud_service.targets import vllm_resident as resident
from cloud_service.targets.base import (
    GenerateOptions,
    Scores,
    TargetSequence,
    TextSide,
    drawn_by_vllm,
    generate_by_rounds,
    shaped_sampling,
    stream_then_rounds,
    vllm_draws,
)
from cloud_service.targets.hf_text import HfText
from cloud_service.targets.vllm_judge import Hidden
from cloud_service.targets.vllm_rows import (
    KnownRows,
    asked_width,
    best_rows,
    join,
    last_rows,
    logprobs_of,
    num_prompt_rows,
    own_logprobs,
)
from shared.errors import CloudFailed, CloudUnavailable, InvalidSetting, ModelUnsupported, OutOfMemory
from shared.judge import JudgeHead
from shared.messages import Message, Timings
from shared.models import folder_sha256
from shared.sampling import MAX_TOP_K, Float, Rows, Sampling, draw
from shared.shaping import NO_SHAPING, PENALTIES
from shared.vocab import TokenKind

log = logging.getLogger("duet.target")

_WATCH_S = 0.2
_AGEING_TOKENS_PER_S = 16
"""Tokens of prediction that a second of waiting makes up for in the engine's own queue."""
MEASURED_ROUND_STREAMS = 8
"""Up to how many streams at once rounds of their own yield more than plain streams do. Measured on one H100
with a 7B (docs/benchmarks.md) were 2.27x at 1 and 0.90x at 16; this is between, where they suggest 1.2x."""
_CPU_BLOCK_TOKENS = 32
"""The least that vLLM's CPU backend takes: a round computes its new tokens and up to one block."""


def load_target(
    model: str,
    name: str,
    options: Mapping[str, Any],
    verification: Literal["auto", "resident", "rounds"] = "auto",
    judge_head: JudgeHead | None = None,
) -> VllmTarget:
    """Start vLLM on a model. Takes half a minute and more.

    Args:
        model: a Hugging Face folder or the id of a repository.
        name: what people call the model.
        options: fields of vLLM's `AsyncEngineArgs`; they win over our defaults, not over what
            verification needs.
        verification: how drafts are verified where the engine can do it by itself; "auto" is "resident" where
            it can be and was measured to pay.
        judge_head: what judges drafts under policy `judge`, where the engine can show hidden states; one
            for this very folder.
    Raises:
        InvalidSetting: an option that vLLM does not know, "resident" where it cannot be, or a head of another
            model.
        ModelFileInvalid, ModelUnsupported, OutOfMemory: it does not start.
    """
    obstacle = None if verification == "rounds" else why_not_resident(options)
    if obstacle is not None and verification == "resident":
        raise InvalidSetting(f"{obstacle}, so that --verification resident cannot be; choose auto or rounds")
    if verification == "auto" and obstacle is None:
        obstacle = why_resident_may_lose(options)
    if obstacle is not None:
        log.warning("drafts are verified in rounds of their own: %s", obstacle)
    stays = verification != "rounds" and obstacle is None
    made = {**resident.engine_options(), **resident.graph_options(options)} if stays else {}
    if judge_head is not None and (obstacle := judging.why_not(options)) is not None:
        log.warning("policy judge will be lossless: %s", obstacle)
        judge_head = None
    if judge_head is not None:
        made |= judging.engine_options()
        folder = _judged_folder(model, options)
    config = engine_config(model, {**made, **options})
    if stays:
        how = "a step ahead" if config.scheduler_config.async_scheduling else "step by step"
        log.info("sessions stay in the engine, which schedules %s", how)
    if judge_head is not None:
        judge_head.check_fits(name, folder_sha256(folder), config.model_config.get_hidden_size())
    return VllmTarget(config, _text_side(config, name), judge_head)


def load_reader(model: str, name: str, options: Mapping[str, Any]) -> tuple[VllmTarget, HfText]:
    """Start vLLM to read texts with it: its hidden states may be kept. Raises as `load_target` does."""
    if (obstacle := judging.why_not(options)) is not None:
        raise InvalidSetting(f"vLLM shows no hidden states here: {obstacle}")
    _judged_folder(model, options)
    config = engine_config(model, {**judging.engine_options(), **options})
    text = _text_side(config, name)
    return VllmTarget(config, text), text


def _text_side(config: VllmConfig, name: str) -> HfText:
    model = config.model_config
    return HfText.load(
        model.model, name, vocab_size=model.get_vocab_size(), trust_remote_code=model.trust_remote_code
    )


def _judged_folder(model: str, options: Mapping[str, Any]) -> Path:
    """The folder to whose files judge heads of a model are bound.

    Raises:
        InvalidSetting: it has none, or options make another model of it.
    """
    for name in ("quantization", "hf_overrides"):
        if options.get(name):
            raise InvalidSetting(
                f"a judge head is bound to the files of the model, and --engine.{name.replace('_', '-')}"
                " makes another model of them: leave it out, or leave judge_head out"
            )
    if not Path(model).is_dir():
        raise InvalidSetting(
            f"a judge head is bound to the files of the model, and {model} is none of this machine's folders:"
            f" run `hf download {model} --local-dir DIR`, and take DIR as the model"
        )
    return Path(model)


def why_not_resident(options: Mapping[str, Any]) -> str | None:
    """What stands against resident sessions: the installed vLLM, the operator's options, or nothing."""
    version = Version(vllm.__version__).public
    if version not in resident.TESTED_VERSIONS:
        return f"sessions in the engine were never tried with vLLM {version}"
    for name in resident.engine_options():
        if name in options:
            return f"--engine.{name.replace('_', '-')} is set"
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        return "VLLM_USE_V2_MODEL_RUNNER=1 has vLLM refuse drafts from outside; unset, it takes them"
    return None


def why_resident_may_lose(options: Mapping[str, Any]) -> str | None:
    """What speaks against resident sessions where they can be: more streams at once than they were measured
    to pay with, or nothing."""
    most, measured = options.get("max_num_seqs"), resident.measured_streams()
    if most is not None and most <= measured:
        return None
    return (
        f"sessions in the engine were measured to pay with up to {measured} streams, and it"
        f" takes {'as many as vLLM likes' if most is None else most}; --slots {measured} or"
        " less chooses them, and so does --verification resident"
    )


def engine_config(model: str, options: Mapping[str, Any]) -> VllmConfig:
    """vLLM's settings for a model: our defaults, the operator's options, and what verification needs.

    Raises:
        InvalidSetting: an option that vLLM does not know.
        ModelUnsupported: it refuses the model or the options.
    """
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in options:
        if name not in known:
            [near] = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InvalidSetting(f"vLLM has no engine option {name!r}; did you mean {near!r}?")
    with _start_errors(model):
        arguments = {**_defaults(), **options, "model": model, **_REQUIRED}
        config = AsyncEngineArgs(**arguments).create_engine_config()
    if resident.makes_room(config):
        resident.look_ahead(config)
    return config


_REQUIRED: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_logprobs": asked_width(MAX_TOP_K, 2 * MAX_TOP_K),
    # Texts come and go as token ids: the tokenizer is `TextSide`.
    "skip_tokenizer_init": True,
}


def _defaults() -> dict[str, Any]:
    if current_platform.is_cpu():
        return {"block_size": _CPU_BLOCK_TOKENS, "enforce_eager": True}
    # A round is a prefill of a few tokens, which only full graphs cover.
    return {"compilation_config": {"cudagraph_mode": "FULL"}} if current_platform.is_cuda() else {}


def _takes_noise(config: Any) -> bool:
    """Whether the engine applies the rule in its own stream: custom logits processors of this form need
    its V1 runner, and rounds are slow there on a GPU, so the V2 runner is kept where vLLM chose it."""
    return not config.use_v2_model_runner and config.speculative_config is None


@contextmanager
def _start_errors(model: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:500]
        if "memory" in reason.lower():
            raise OutOfMemory(f"{model} does not fit: {reason} ({_FIT})") from error
        if isinstance(error, RuntimeError):  # said by the engine's process, which logged the cause
            raise ModelUnsupported(
                f"vLLM's engine did not start with {model}; its log says why. If memory is short: {_FIT}"
            ) from error
        raise ModelUnsupported(f"vLLM cannot serve {model}: {reason}") from error


_FIT = (
    "lower --engine.max-model-len, spread the model with --engine.tensor-parallel-size, or serve a smaller or"
    " quantised one"
)


class VllmTarget:
    """Implements `base.Target`."""

    engine = "vllm"

    def __init__(self, config: VllmConfig, text: TextSide, judge_head: JudgeHead | None = None) -> None:
        """Starts the engine.

        Args:
            config: see `engine_config`.
            judge_head: of this model; only where the settings keep hidden states.
        Raises:
            ModelUnsupported, OutOfMemory: it does not start.
        """
        self.config = config
        """The engine's settings."""
        self._text = text
        self.name = text.name
        self.context_tokens = int(config.model_config.max_model_len)
        self.max_streams = int(config.scheduler_config.max_num_seqs)
        self.block_tokens = int(config.cache_config.block_size)
        """Tokens of one block of the KV cache."""
        self.vocabulary = text.vocabulary
        self.end_token_ids = text.end_token_ids
        # Grammars need the engine's own tokenizer, which it runs without; an engine that takes drafts refuses
        # a bias, and draws at another temperature on a CPU.
        self.shapes = PENALTIES if config.speculative_config is None else frozenset()
        self.streams_noise = _takes_noise(config)
        """Whether sampled text streams from the engine; otherwise each token is a round."""
        self.verification = "rounds"
        """How drafts are verified where the engine can do it by itself; "resident" once `warm_up` has tried
        that out."""
        self.num_sequences = 0
        """Streams that are open here."""
        self.num_repeated_rounds = 0
        """Rounds that ran again without the cache, which held part of their draft."""
        self._padding = np.array([kind is TokenKind.PADDING for kind in self.vocabulary.kinds])
        self._ids = itertools.count()
        if self.streams_noise:
            config.model_config.logits_processors = [f"{__name__}:{SeededNoise.__name__}"]
            config.additional_config[_PADDING] = np.flatnonzero(self._padding).tolist()
        with _start_errors(config.model_config.model):
            self.llm = AsyncLLM.from_vllm_config(config)
            """The engine itself."""
        self.judge_head = judge_head
        self.hidden = judging.HiddenRows(self.llm, config.model_config.get_hidden_size())
        """Hidden states that the engine keeps, where its settings say so."""
        self._sessions: resident.ResidentSessions | None = None
        if resident.makes_room(config):
            padding = frozenset(np.flatnonzero(self._padding).tolist())
            self._sessions = resident.ResidentSessions(self.llm, padding)

    @property
    def num_requests(self) -> int:
        """Requests that wait or run in the engine: 0 when every stream has ended."""
        return int(self.llm.output_processor.get_num_unfinished_requests()) + len(self._sessions or ())

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._text.render_chat(messages)

    def piece(self, token_id: int) -> bytes:
        return self._text.piece(token_id)

    def draws(self, sampling: Sampling, *, drafts: bool) -> bool:
        if not vllm_draws(sampling):
            return False
        return self.verification == "resident" if drafts else not self.streams_noise

    @asynccontextmanager
    async def sequence(
        self,
        token_ids: Sequence[int],
        *,
        tenant: str | None = None,
        expected_tokens: int = 0,
        own_draw: Sampling | None = None,
    ) -> AsyncIterator[TargetSequence]:
        rounds = VllmSequence(self, tenant, self._priority(expected_tokens))
        self.num_sequences += 1
        try:
            if self._sessions is None or self.verification == "rounds":
                yield rounds
                return
            made = resident.ResidentSequence(self._sessions, rounds, tenant, own_draw)
            async with aclosing(made) as sequence:
                yield sequence
        finally:
            self.num_sequences -= 1

    async def failed(self) -> None:
        while not self.llm.errored:  # noqa: ASYNC110 - nothing of vLLM can be waited for
            await asyncio.sleep(_WATCH_S)

    async def warm_up(self) -> None:
        """A round: vLLM compiles what logprobs need when they are first asked for (31 s on 2 cores).

        With a judge head, and with room for resident sessions: a few rounds more, which decide whether they
        are used.
        """
        text = sorted(self.vocabulary.legal_ids)[: judging.TEST_TOKENS]
        rounds = VllmSequence(self, None)
        await rounds.score(text, num_rows=2, width=1)
        if self.judge_head is not None:
            await self._try_judge(self.judge_head, rounds, text)
        if self._sessions is None:
            return
        fault = await resident.fault(self._sessions, rounds, text)
        self.verification = "resident" if fault is None else "rounds"
        if fault is not None:
            log.warning("drafts are verified in rounds of their own: %s", fault)

    async def _try_judge(self, head: JudgeHead, rounds: VllmSequence, text: Sequence[int]) -> None:
        await self.hidden.keep(None)
        fault = await judging.fault(rounds, text)
        if fault is None:
            await self.hidden.keep(head.weight)
        else:
            self.judge_head = None
            log.warning("policy judge will be lossless: %s", fault)

    async def close(self) -> None:
        # In this thread: with the loop running, vLLM would report the engine's end as its death.
        self.llm.shutdown()

    def _priority(self, expected_tokens: int) -> int:
        """Shortest first, and ageing: a stream goes before all that come so much later."""
        if self.config.scheduler_config.policy != "priority":
            return 0
        return expected_tokens + int(_AGEING_TOKENS_PER_S * time.monotonic())

    # For sequences.

    async def request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        cache_salt: str | None,
        priority: int,
        num_judged: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request of the engine; ends it when the caller stops reading.

        Args:
            priority: lower ones go first.
            num_judged: so many of the text's last tokens leave a row in `hidden`.
        Raises:
            CloudUnavailable: the engine has died.
            CloudFailed: it did not finish the request.
        """
        prompt = tokens_input(list(token_ids), cache_salt=cache_salt)
        number = next(self._ids)
        name = judging.request_name(number, num_judged) if num_judged else f"duet-{number}"
        answers = self.llm.generate(prompt, params, request_id=name, priority=priority)
        try:
            async with aclosing(answers):
                async for answer in answers:
                    if answer.outputs[0].finish_reason in ("abort", "error"):
                        raise CloudFailed("the engine gave a request up; its log says more")
                    yield answer
        except EngineDeadError:
            raise CloudUnavailable(resident.DIED) from None
        except (EngineGenerateError, ValueError) as error:
            raise CloudFailed(f"the engine failed: {error.__cause__ or error}") from error

    async def kept(self, name: str, num_tokens: int, num_rows: int) -> Hidden | None:
        """See `vllm_judge.HiddenRows.take`. Raises CloudUnavailable where the engine has died."""
        try:
            return await self.hidden.take(name, num_tokens, num_rows)
        except EngineDeadError:
            raise CloudUnavailable(resident.DIED) from None

    def rows(self, flat: Any, num_rows: int, width: int) -> Rows:
        ids, logprobs = last_rows(flat, num_rows)
        try:
            return best_rows(ids, logprobs, width=width, padding=self._padding)
        except ValueError as error:
            raise CloudFailed(f"the target failed: {error}") from None

    def own(self, flat: Any, num_rows: int) -> Float:
        try:
            return own_logprobs(flat, num_rows)
        except ValueError as error:
            raise CloudFailed(f"the target failed: {error}") from None

    def asked_width(self, width: int) -> int:
        return asked_width(width, len(self._padding))

    def has_meaning(self, token_id: int) -> bool:
        """Whether a token is more than padding."""
        return not self._padding[token_id]


class VllmSequence:
    """Implements `base.TargetSequence`. Holds nothing in the engine between calls."""

    def __init__(self, target: VllmTarget, cache_salt: str | None, priority: int = 0) -> None:
        self._target = target
        self._cache_salt = cache_salt
        self._priority = priority
        self._known = KnownRows()
        self.num_computed_tokens = 0

    @property
    def drafts_pay(self) -> bool:
        return self._target.num_sequences <= MEASURED_ROUND_STREAMS

    async def score(
        self,
        token_ids: Sequence[int],
        *,
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None = None,
        num_judged: int = 0,
    ) -> Scores:
        """See `base.TargetSequence`. What is proposed after the text's last token, or where the row is known
        from the round before, is looked for in the row, which is asked for at its widest."""
        scores, kept = await self._score(token_ids, num_rows, width, proposed, num_judged)
        if not num_judged:
            return scores
        head = self._target.judge_head
        assert head is not None, "nobody is judged without a head"
        return dataclasses.replace(scores, acceptable=head.acceptable_by(kept[:, 0]))

    async def read(self, token_ids: Sequence[int], num_read: int) -> tuple[Scores, Hidden]:
        """What the target makes of a text's last tokens, and their hidden states, whole where those are kept.

        Args:
            num_read: > 0, < len(token_ids)
        """
        return await self._score(token_ids, num_read + 1, 1, token_ids[-num_read:], num_read)

    async def _score(
        self,
        token_ids: Sequence[int],
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None,
        num_judged: int,
    ) -> tuple[Scores, Hidden]:
        began = time.perf_counter()
        if proposed is not None:
            width = MAX_TOP_K
        for read_cache in (True, False):
            answer = await self._round(token_ids, num_rows, width, num_judged, read_cache=read_cache)
            kept: Hidden | None = _NOTHING_KEPT
            if num_judged:
                kept = await self._target.kept(answer.request_id, len(token_ids), num_judged)
            read = self._read(answer, token_ids, num_rows, width)
            if read is not None and kept is not None:
                break
            # The draft itself is cached: verified before, or the text of another stream.
            self._target.num_repeated_rounds += read_cache
        else:
            raise CloudFailed("the engine did not return the rows of a draft, with and without its cache")
        rows, own = read
        self._known.remember(token_ids, rows)
        logprobs = logprobs_of(proposed or (), rows, own)
        return Scores(rows, _timings(answer, time.perf_counter() - began), logprobs), kept

    async def _round(
        self, token_ids: Sequence[int], num_rows: int, width: int, num_judged: int, *, read_cache: bool
    ) -> RequestOutput:
        asked = self._target.asked_width(width)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=asked if num_rows > 1 else None,
            logprobs=asked,
            # Full prompts' worth of dicts would cost more than the pass.
            flat_logprobs=True,
            # Ids of cached positions are garbage, which the engine's loop does not survive decoding.
            detokenize=False,
            # Unset means true where prompt_logprobs is given.
            skip_reading_prefix_cache=not read_cache,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with aclosing(self._request(token_ids, params, num_judged)) as answers:
            answer = await anext(answers)
        self.num_computed_tokens += len(token_ids) - (answer.num_cached_tokens or 0)
        return answer

    def _request(
        self, token_ids: Sequence[int], params: SamplingParams, num_judged: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        return self._target.request(token_ids, params, self._cache_salt, self._priority, num_judged)

    def _read(
        self, answer: RequestOutput, token_ids: Sequence[int], num_rows: int, width: int
    ) -> tuple[Rows, Float] | None:
        """All rows, and how likely the text's last tokens are, as many as were computed; None where rows that
        the engine has not computed are not known either."""
        last = self._target.rows(answer.outputs[0].logprobs, 1, width)
        if num_rows == 1:
            return last, np.empty(0)
        flat: Any = answer.prompt_logprobs
        there = num_prompt_rows(len(flat), len(token_ids), answer.num_cached_tokens or 0)
        num_missing = max(0, num_rows - 1 - there)
        num_read = num_rows - 1 - num_missing
        rows, own = last, np.empty(0)
        if num_read:
            rows, own = join(self._target.rows(flat, num_read, width), last), self._target.own(flat, num_read)
        if not num_missing:
            return rows, own
        known = self._known.leading(token_ids, num_rows, num_missing)
        return None if known is None else (join(known, rows), own)

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        sampling = options.sampling
        if options.shaping != NO_SHAPING:
            made = self._stream(token_ids, options, shaped_sampling(options))
        elif sampling.greedy or options.own_noise:
            drawn = {"temperature": 0.0} if sampling.greedy else drawn_by_vllm(sampling)
            stream = self._stream(token_ids, options, drawn)
            made = stream_then_rounds(self, stream, token_ids, options, self._target.has_meaning)
        elif self._target.streams_noise:
            seeded = {"temperature": 0.0, "extra_args": {_DRAW: _encode_draw(options)}}
            made = self._stream(token_ids, options, seeded)
        else:
            made = generate_by_rounds(self, token_ids, options)
        async with aclosing(made):
            async for new in made:
                yield new

    async def _stream(
        self, token_ids: Sequence[int], options: GenerateOptions, drawn: Mapping[str, Any]
    ) -> AsyncGenerator[list[int], None]:
        """The engine's own stream.

        Args:
            drawn: how its tokens are drawn, as fields of vLLM's SamplingParams.
        """
        params = SamplingParams(
            **drawn,
            max_tokens=options.max_tokens,
            ignore_eos=True,
            stop_token_ids=sorted(options.end_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        computed_before: int | None = None
        async with aclosing(self._request(token_ids, params)) as answers:
            async for answer in answers:
                new = list(answer.outputs[0].token_ids)
                if computed_before is None:
                    computed_before = self.num_computed_tokens
                    self.num_computed_tokens += len(token_ids) - (answer.num_cached_tokens or 0) - 1
                self.num_computed_tokens += len(new)
                if new:
                    yield new


_NOTHING_KEPT: Hidden = np.empty((0, 1), np.float32)


def _timings(answer: RequestOutput, seconds: float) -> Timings:
    """Times of the engine where it keeps them; otherwise all of it is work."""
    stats: Any = answer.metrics
    queued = stats.scheduled_ts - stats.queued_ts if stats is not None and stats.scheduled_ts else 0.0
    return Timings(queue_us=int(queued * 1e6), verify_us=int((seconds - queued) * 1e6))


# Below: the engine's process.

_DRAW = "duet_draw"
"""Key of a request's `extra_args`."""
_PADDING = "duet_padding_ids"
"""Key of the engine's `additional_config`."""


def _encode_draw(options: GenerateOptions) -> dict[str, Any]:
    return {
        "sampling": dataclasses.asdict(options.sampling),
        "seed": options.seed,
        "start": options.start,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Drawn:
    """A request of the batch whose tokens are drawn by our rule."""

    sampling: Sampling
    seed: int
    start: int
    made: list[int]
    """The engine's own list of the tokens that it made so far."""


class SeededNoise(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Makes the token that `shared.sampling.draw` draws the argmax, and padding impossible.

    The draw is on the host, by the very function that verification uses, so that a stream and rounds over
    the same rows cannot differ.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        padding = vllm_config.additional_config.get(_PADDING, [])
        self._padding = torch.tensor(padding, dtype=torch.long, device=device)
        self._is_padding = np.zeros(vllm_config.model_config.get_vocab_size(), bool)
        self._is_padding[padding] = True
        self._requests: dict[int, _Drawn] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._requests, batch_update, _new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        drawn = self._draw(logits)
        logits.index_fill_(1, self._padding, -torch.inf)
        for index, token in drawn.items():
            logits[index] = -torch.inf
            logits[index, token] = 0.0
        return logits

    def _draw(self, logits: torch.Tensor) -> dict[int, int]:
        """Tokens by row of the batch."""
        if not self._requests:
            return {}
        width = max(request.sampling.row_width for request in self._requests.values())
        # As vLLM computes the rows of a round, so that the two agree to the last bit.
        logprobs = logits[list(self._requests)].log_softmax(dim=-1, dtype=torch.float32)
        top = logprobs.topk(asked_width(width, logprobs.shape[1]))
        ids, values = top.indices.cpu().numpy(), top.values.cpu().numpy().astype(np.float64)
        drawn = {}
        for i, (index, request) in enumerate(self._requests.items()):
            # An error here would end the engine; a row that is no distribution is left to its argmax.
            with suppress(ValueError):
                rows = best_rows(
                    ids[i : i + 1],
                    values[i : i + 1],
                    width=request.sampling.row_width,
                    padding=self._is_padding,
                )
                position = request.start + len(request.made)
                drawn[index] = int(draw(rows, request.sampling, request.seed, position)[0])
        return drawn


def _new_request(params: Any, _: list[int] | None, made: list[int]) -> _Drawn | None:
    asked = (params.extra_args or {}).get(_DRAW)
    return asked and _Drawn(Sampling(**asked["sampling"]), asked["seed"], asked["start"], made)
