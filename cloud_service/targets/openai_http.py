"""A target behind HTTP: rounds are requests to a `vllm serve` that runs already."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from cloud_service.targets.base import (
    GenerateOptions,
    Scores,
    TextSide,
    drawn_by_vllm,
    generate_by_rounds,
    shaped_sampling,
    stream_then_rounds,
    vllm_draws,
)
from cloud_service.targets.hf_text import HfText
from cloud_service.targets.openai_rows import (
    Row,
    as_arrays,
    cached_tokens,
    error_text,
    new_tokens,
    next_row,
    own_logprobs,
    prompt_rows,
)
from cloud_service.targets.vllm_rows import (
    KnownRows,
    asked_width,
    best_rows,
    join,
    logprobs_of,
    num_prompt_rows,
)
from shared.errors import (
    CloudError,
    CloudFailed,
    CloudOverloaded,
    CloudUnavailable,
    InvalidSetting,
    ModelFileInvalid,
    ModelUnsupported,
    VerifyTimeout,
)
from shared.messages import Message, Timings
from shared.sampling import MAX_TOP_K, Float, Rows, Sampling
from shared.shaping import NO_SHAPING, PENALTIES
from shared.vocab import TokenKind

log = logging.getLogger("duet.target")

_GENERATE = "/inference/v1/generate"
_COMPLETIONS = "/v1/completions"
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_ATTEMPTS = 3
_BACKOFF_S = 0.2
_PROBE = [0, 0]

_PLAIN: dict[str, Any] = {
    # All of them: what is unset, the service fills in from the model's generation_config.json.
    "n": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "stop": [],
    "ignore_eos": True,
}
"""Sampling fields of a greedy request; both endpoints name them alike."""


class Upstream:
    """One HTTP service: connections that are kept, bounded retries, and our errors.

    A request may be sent again: it only reads.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        backoff_s: float = _BACKOFF_S,
    ) -> None:
        """
        Args:
            key: sent as a bearer token.
            backoff_s: wait before the second attempt; it doubles.
        """
        self.url = url
        self._backoff_s = backoff_s
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            transport=transport,
        )

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the service answers: to a POST, or to a GET where there is no body.

        Raises:
            CloudUnavailable, CloudOverloaded, VerifyTimeout, CloudFailed
            NotServed: there is no such endpoint.
        """
        async with self._response(path, body) as response:
            await response.aread()
            try:
                return response.json()
            except ValueError:
                raise CloudFailed(f"{self.url}{path} answered something that is not JSON") from None

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """The events of a stream. Raises as `ask` does; CloudUnavailable too where it breaks off."""
        async with self._response(path, {**body, "stream": True}) as response:
            rest = b""
            # Not by aiter_lines: it parts lines where str.splitlines does, at what JSON's strings may hold.
            async for chunk in response.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in map(bytes.rstrip, lines):
                    if line == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield self._event(line.removeprefix(b"data: "))
        raise CloudUnavailable(f"the stream from {self.url} broke off; resume it on another replica")

    async def close(self) -> None:
        await self._client.aclose()

    def _event(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise CloudFailed(f"{self.url} streamed something that is not JSON") from None

    @asynccontextmanager
    async def _response(self, path: str, body: Mapping[str, Any] | None) -> AsyncIterator[httpx.Response]:
        """A response of status 200, not yet read."""
        response = await self._retried(path, body)
        try:
            yield response
        except httpx.HTTPError as error:
            raise self._unanswered(error) from None
        finally:
            await response.aclose()

    async def _retried(self, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        wait_s = self._backoff_s
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._once(path, body)
            except (CloudUnavailable, CloudOverloaded, ServerError) as error:
                log.debug("asking the upstream again: %s", error)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s *= 2
        return await self._once(path, body)

    async def _once(self, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        method = "GET" if body is None else "POST"
        try:
            response = await self._client.send(
                self._client.build_request(method, path, json=body), stream=True
            )
            if response.status_code == 200:
                return response
            async with aclosing(response):
                await response.aread()
        except httpx.HTTPError as error:
            raise self._unanswered(error) from None
        raise self._refused(path, response)

    def _unanswered(self, error: httpx.HTTPError) -> CloudError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return VerifyTimeout(f"{self.url} did not answer within {_TIMEOUT.read:g} s")
        reason = " ".join(str(error).split()) or type(error).__name__
        return CloudUnavailable(f"cannot reach {self.url} ({reason}); is `vllm serve` running there?")

    def _refused(self, path: str, response: httpx.Response) -> CloudError:
        status = response.status_code
        try:
            reason = error_text(response.json())
        except ValueError:
            reason = response.reason_phrase
        said = f"{self.url}{path} answered {status}: {reason}"
        if status == 404:
            return NotServed(said)
        if status in (401, 403):
            return CloudFailed(f"{said}; set DUET_CLOUD_UPSTREAM_KEY to its API key")
        if status == 429:
            return CloudOverloaded(f"{said}; try again later")
        if status in (502, 503, 504):  # a proxy whose server is away
            return CloudUnavailable(f"{said}; try again later")
        if status >= 500:
            return ServerError(said)
        return NotFinite(said) if "not JSON compliant" in reason else CloudFailed(said)


class NotServed(CloudFailed):
    """The service has no such endpoint or model."""


class NotFinite(CloudFailed):
    """The answer held a NaN or an infinity, which JSON cannot."""


class ServerError(CloudFailed):
    """The service failed on this request."""


@dataclass(frozen=True)
class Service:
    """What a service said of itself."""

    model: str
    """Name that requests give."""
    source: str
    """Where it has its model from: a folder or a repository's id."""
    context_tokens: int
    by_tokens: bool
    """Whether it serves /inference/v1/generate."""
    tells_cached: bool
    """Whether it says how much of a prompt came from its cache. If not, rounds must not read the cache:
    rows of cached positions hold garbage."""


async def inspect(upstream: Upstream) -> Service:
    """Look at a service and try a round on it.

    Raises:
        CloudError: no service answers, or not as vLLM does.
        InvalidSetting: it allows too few logprobs.
    """
    models = await upstream.ask("/v1/models")
    try:
        first = models["data"][0]
        model, context_tokens = first["id"], int(first["max_model_len"])
    except (KeyError, IndexError, TypeError):
        raise CloudFailed(f"{upstream.url} does not answer as `vllm serve` does; check --upstream") from None
    source = first.get("root") or model
    width = asked_width(MAX_TOP_K, 2 * MAX_TOP_K)
    try:
        answer, by_tokens = await upstream.ask(_GENERATE, _by_tokens(model, _PROBE, _round(width))), True
    except NotServed:
        answer, by_tokens = await _try_completion(upstream, model, width), False
    except CloudFailed as error:
        raise _too_narrow(error, width) from None
    return Service(model, source, context_tokens, by_tokens, cached_tokens(answer) is not None)


async def _try_completion(upstream: Upstream, model: str, width: int) -> Any:
    try:
        return await upstream.ask(_COMPLETIONS, _by_completion(model, _PROBE, _round(width)))
    except CloudFailed as error:
        raise _too_narrow(error, width) from None


def _too_narrow(error: CloudFailed, width: int) -> CloudFailed | InvalidSetting:
    if "logprobs" not in str(error):
        return error
    return InvalidSetting(f"start the upstream with --max-logprobs {width} or more: {error}")


def _round(width: int) -> dict[str, Any]:
    return {**_PLAIN, "max_tokens": 1, "prompt_logprobs": width, "logprobs": width}


def _by_tokens(
    model: str, token_ids: Sequence[int], sampling: Mapping[str, Any], *, read_cache: bool = False
) -> dict[str, Any]:
    return {
        "model": model,
        "token_ids": list(token_ids),
        # Ids of cached positions are garbage, which must not be decoded.
        "sampling_params": {**sampling, "detokenize": False, "skip_reading_prefix_cache": not read_cache},
    }


def _by_completion(model: str, token_ids: Sequence[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(token_ids),
        **sampling,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }


def load_target(url: str, key: str | None, model: str | None, name: str | None) -> OpenAiTarget:
    """Connect to a service. Not for a thread with a running loop.

    Args:
        model: folder or repository's id of the tokenizer; None takes what the service names as its model's.
        name: what people call the model; None takes the service's name.
    Raises:
        CloudError: no service answers, or not as vLLM does.
        InvalidSetting: it allows too few logprobs.
        ModelError: there is no tokenizer for its model.
    """

    async def look() -> Service:
        upstream = Upstream(url, key)
        try:
            return await inspect(upstream)
        finally:
            await upstream.close()

    service = asyncio.run(look())
    source = model or service.source
    text = HfText.load(source, name or service.model, vocab_size=_head_size(source))
    if not service.by_tokens:
        log.warning(
            "%s has no %s: every round is a full prefill there; start it with --enable-scale-out"
            " --enable-prompt-tokens-details",
            url,
            _GENERATE,
        )
    elif not service.tells_cached:
        log.warning(
            "%s does not say what it cached: every round is a full prefill there; start it with"
            " --enable-prompt-tokens-details",
            url,
        )
    return OpenAiTarget(Upstream(url, key), service, text)


def _head_size(source: str) -> int:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ModelUnsupported(
            "--target openai needs the model's tokenizer; run: pip install 'duet-llm[openai]'"
        ) from None
    try:
        return int(AutoConfig.from_pretrained(source).get_text_config().vocab_size)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelFileInvalid(
            f"cannot read the upstream's model {source} ({reason}); name its folder or id with --model"
        ) from None


class OpenAiTarget:
    """Implements `base.Target`."""

    engine = "openai"
    verification = "rounds"
    max_streams = 256
    """As many as a `vllm serve` runs at once by default."""
    shapes = PENALTIES
    judge_head = None

    def __init__(self, upstream: Upstream, service: Service, text: TextSide) -> None:
        self.upstream = upstream
        self.service = service
        self.name = text.name
        self.context_tokens = service.context_tokens
        self.vocabulary = text.vocabulary
        self.end_token_ids = text.end_token_ids
        self.num_repeated_rounds = 0
        """Rounds that ran again without the upstream's cache."""
        self.padding = np.array([kind is TokenKind.PADDING for kind in self.vocabulary.kinds])
        """[vocabulary_size], true where an id has no meaning."""
        self._text = text

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._text.render_chat(messages)

    def piece(self, token_id: int) -> bytes:
        return self._text.piece(token_id)

    def draws(self, sampling: Sampling, *, drafts: bool) -> bool:
        return not drafts and vllm_draws(sampling)

    @asynccontextmanager
    async def sequence(
        self,
        token_ids: Sequence[int],
        *,
        tenant: str | None = None,
        expected_tokens: int = 0,
        own_draw: Sampling | None = None,
    ) -> AsyncIterator[OpenAiSequence]:
        yield OpenAiSequence(self, cache_salt=tenant)

    async def warm_up(self) -> None:
        pass  # `inspect` ran a round

    async def failed(self) -> None:
        await asyncio.Event().wait()  # an upstream that went may come back

    async def close(self) -> None:
        await self.upstream.close()


class OpenAiSequence:
    """Implements `base.TargetSequence`. Holds nothing upstream between calls."""

    def __init__(self, target: OpenAiTarget, cache_salt: str | None) -> None:
        self._target = target
        self._own_cache = {} if cache_salt is None else {"cache_salt": cache_salt}
        self._service = target.service
        self._known = KnownRows()
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
        """See `base.TargetSequence`, and `VllmSequence.score` for where proposed tokens are looked for."""
        began = time.perf_counter()
        if proposed is not None:
            width = MAX_TOP_K
        read = None
        if self._service.by_tokens and self._service.tells_cached:
            read = await self._cached_round(token_ids, num_rows, width)
        if read is None:
            rows, own, _ = await self._round(token_ids, num_rows, width, read_cache=False)
        else:
            rows, own = read
        if len(rows) < num_rows:
            raise CloudFailed(f"{self._target.upstream.url} did not return the rows of a draft")
        self._known.remember(token_ids, rows)
        timings = Timings(queue_us=0, verify_us=int((time.perf_counter() - began) * 1e6))
        return Scores(rows, timings, logprobs_of(proposed or (), rows, own))

    async def _cached_round(
        self, token_ids: Sequence[int], num_rows: int, width: int
    ) -> tuple[Rows, Float] | None:
        """As `_round`, all rows; or None where the round must run again without the cache."""
        try:
            rows, own, num_missing = await self._round(token_ids, num_rows, width, read_cache=True)
        except (NotFinite, ServerError):  # the garbage of cached rows
            num_missing = num_rows
        if not num_missing:
            return rows, own
        known = self._known.leading(token_ids, num_rows, num_missing) if num_missing < num_rows else None
        if known is None:
            self._target.num_repeated_rounds += 1
            return None
        return join(known, rows), own

    async def _round(
        self, token_ids: Sequence[int], num_rows: int, width: int, *, read_cache: bool
    ) -> tuple[Rows, Float, int]:
        """The rows that the service computed, how likely the text's own tokens are there, and how many rows
        are missing before them."""
        asked = asked_width(width, len(self._target.padding))
        sampling = _round(asked)
        if num_rows == 1:
            del sampling["prompt_logprobs"]
            read_cache = True  # the generated token's row is always computed
        answer = await self._ask(token_ids, sampling, read_cache)
        try:
            cached = cached_tokens(answer) or 0
            there = num_prompt_rows(len(token_ids), len(token_ids), cached)
            num_read = min(num_rows - 1, max(there, 0))
            prompt = prompt_rows(answer, num_read) if num_read else []
            own = own_logprobs(prompt, token_ids[len(token_ids) - num_read :])
            self.num_computed_tokens += len(token_ids) - cached
            return self._in_order([*prompt, next_row(answer)], width), own, num_rows - 1 - num_read
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CloudFailed(f"{self._target.upstream.url} answered no usable rows: {error}") from None

    async def _ask(self, token_ids: Sequence[int], sampling: Mapping[str, Any], read_cache: bool) -> Any:
        path, body = self._request(token_ids, sampling, read_cache)
        return await self._target.upstream.ask(path, body)

    def _request(
        self, token_ids: Sequence[int], sampling: Mapping[str, Any], read_cache: bool
    ) -> tuple[str, dict[str, Any]]:
        if self._service.by_tokens:
            path = _GENERATE
            body = _by_tokens(self._service.model, token_ids, sampling, read_cache=read_cache)
        else:
            path, body = _COMPLETIONS, _by_completion(self._service.model, token_ids, sampling)
        return path, body | self._own_cache

    def _in_order(self, rows: Sequence[Row], width: int) -> Rows:
        ids, logprobs = as_arrays(rows)
        return best_rows(ids, logprobs, width=width, padding=self._target.padding)

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        text = list(token_ids)
        if options.shaping != NO_SHAPING:
            async with aclosing(self._stream(text, options, shaped_sampling(options))) as made:
                async for new in made:
                    if not all(map(self._has_meaning, new)):
                        raise CloudFailed(f"{self._target.upstream.url} made a token without a meaning")
                    yield new
            return
        if options.sampling.greedy or options.own_noise:
            drawn = {} if options.sampling.greedy else drawn_by_vllm(options.sampling)
            stream = self._stream(text, options, drawn)
            tokens = stream_then_rounds(self, stream, text, options, self._has_meaning)
        else:
            tokens = generate_by_rounds(self, text, options)
        async with aclosing(tokens):
            async for new in tokens:
                yield new

    def _has_meaning(self, token_id: int) -> bool:
        return not self._target.padding[token_id]

    async def _stream(
        self, token_ids: Sequence[int], options: GenerateOptions, drawn: Mapping[str, Any]
    ) -> AsyncGenerator[list[int], None]:
        """The service's own stream: greedy, unless `drawn` says how its own sampler draws."""
        sampling = {
            **_PLAIN,
            **drawn,
            "max_tokens": options.max_tokens,
            "stop_token_ids": sorted(options.end_token_ids),
        }
        path, body = self._request(token_ids, sampling, read_cache=True)
        self.num_computed_tokens += len(token_ids)
        async with aclosing(self._target.upstream.events(path, body)) as events:
            async for event in events:
                try:
                    new = list(new_tokens(event))
                except ValueError as error:
                    raise CloudFailed(f"{self._target.upstream.url} failed: {error}") from None
                self.num_computed_tokens += len(new)
                if new:
                    yield new
