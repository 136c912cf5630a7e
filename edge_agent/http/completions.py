"""`/v1/chat/completions` and `/v1/completions`: an agent's events as OpenAI's bodies and chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_agent.agent import Agent
from edge_agent.http.errors import ApiError, as_api_error, error_body
from edge_agent.http.requests import ChatCompletion, TextCompletion, parse
from edge_agent.http.streaming import StreamedResponse, sse, sse_comment, unless_gone
from edge_agent.http.tool_calls import ToolCall, ToolCallFinder
from shared.events import Answer, Event, Notice, Text, Token, Waiting
from shared.messages import FinishReason
from shared.thinking import ThinkingSplitter

MODES = {
    "duet": "auto",
    "duet-local": "local",
    "duet-cloud": "cloud",
    "duet-speculate": "speculate",
    "duet-guide": "guide",
}
"""What clients call a model, and the mode that it is."""

Part = tuple[bool, str] | ToolCall
"""(is it thinking?, text), or a call of a function"""


def mode_of(model: str) -> str:
    try:
        return MODES[model]
    except KeyError:
        raise ApiError(
            f"the model {model!r} does not exist; there are {', '.join(MODES)}",
            status=404,
            param="model",
            code="model_not_found",
        ) from None


async def chat_completions(request: Request) -> Response:
    asked = parse(ChatCompletion, await request.body())
    agent: Agent = request.app.state.agent
    mode = mode_of(asked.model)
    events = agent.chat(
        asked.chat(), request_id=request_id(request), mode=mode, shaping=asked.shaping(), **asked.settings()
    )
    calls = ToolCallFinder(asked.functions, forced=asked.forces_call, parallel=asked.parallel_tool_calls)
    answering = _ChatAnswering(asked.model, asked.wants_logprobs, calls=calls)
    return await _respond(request, asked, answering, events)


async def text_completions(request: Request) -> Response:
    asked = parse(TextCompletion, await request.body())
    agent: Agent = request.app.state.agent
    mode = mode_of(asked.model)
    events = agent.complete(
        asked.prompt, request_id=request_id(request), mode=mode, shaping=asked.shaping(), **asked.settings()
    )
    return await _respond(request, asked, _TextAnswering(asked.model, asked.wants_logprobs), events)


async def _respond(
    request: Request,
    asked: ChatCompletion | TextCompletion,
    answering: _Answering,
    events: AsyncGenerator[Event, None],
) -> Response:
    if asked.wants_logprobs and mode_of(asked.model) != "local":
        raise ApiError(
            f"logprobs are known in duet-local only, not in {asked.model}",
            param="logprobs",
            code="invalid_value",
        )
    if not asked.stream:
        body = await unless_gone(request, answering.whole(events))
        return JSONResponse(body, headers=_queue_header(answering.queue_position))
    begun, position = await unless_gone(request, _begun(events))
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return StreamedResponse(
        answering.chunks(begun, include_usage=include_usage),
        media_type="text/event-stream",
        headers=_queue_header(position),
        stall_timeout_s=request.app.state.stall_timeout_s,
    )


def request_id(request: Request) -> str | None:
    """The client's own name for the request, for the logs."""
    return request.headers.get("x-request-id")


def _queue_header(position: int) -> dict[str, str]:
    """Where in the line for the edge model the request began; 0 did not wait."""
    return {"X-Duet-Queue-Position": str(position)}


async def _begun(events: AsyncGenerator[Event, None]) -> tuple[AsyncGenerator[Event, None], int]:
    """Wait for the first text, or for a place in line: what fails before is an HTTP error, and not the middle
    of a stream. Gives all events, and the place."""
    first: list[Event] = []
    try:
        async for event in events:
            first.append(event)
            if isinstance(event, Waiting | Text | Answer):
                break
    except BaseException:
        await events.aclose()
        raise

    async def all_events() -> AsyncGenerator[Event, None]:
        async with aclosing(events):
            for event in first:
                yield event
            async for event in events:
                yield event

    return all_events(), first[-1].position if isinstance(first[-1], Waiting) else 0


@dataclass
class _Answering:
    """One completion as it comes about; the two kinds differ in the shapes of their choices."""

    model: str
    wants_logprobs: bool
    queue_position: int = 0
    """Where in line the request began."""
    _created: int = field(default_factory=lambda: int(time.time()))
    _number: str = field(default_factory=lambda: uuid.uuid4().hex)
    _notices: list[str] = field(default_factory=list)
    _tokens: list[Token] = field(default_factory=list)
    """Those whose log-probabilities are not told yet."""

    _id = ""
    _whole = ""
    _chunk = ""

    def _choice(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Of a whole answer."""
        raise NotImplementedError

    def _delta(self, part: Part | None = None) -> dict[str, Any]:
        """Of a chunk."""
        raise NotImplementedError

    def _parts(self, text: str) -> list[Part]:
        """What is certain, now that this has come."""
        return [(False, text)]

    def _rest(self) -> list[Part]:
        """What was held back."""
        return []

    def _remarks(self) -> list[str]:
        return []

    def _finish_reason(self, answer: Answer) -> str:
        """A text that a leaving service cut off is not whole, which clients know as `length`."""
        return "stop" if answer.finish_reason is FinishReason.STOP else "length"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        raise NotImplementedError

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        parts: list[Part] = []
        async with aclosing(events):
            async for event in events:
                self._note(event)
                if isinstance(event, Text):
                    parts += self._parts(event.text)
                elif isinstance(event, Answer):
                    answer = event
        parts += self._rest()
        return {
            **self._head(self._whole),
            "choices": [self._finished(self._choice(parts), self._finish_reason(answer))],
            "usage": usage(answer),
            "duet": self._about(answer),
        }

    async def chunks(
        self, events: AsyncGenerator[Event, None], *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        yield self._sse(self._first_delta())
        try:
            async with aclosing(events):
                async for event in events:
                    self._note(event)
                    if isinstance(event, Text):
                        for part in self._parts(event.text):
                            yield self._sse(self._delta(part))
                    elif isinstance(event, Waiting):
                        yield sse_comment(f"waiting for the edge model, position {event.position}")
                    elif isinstance(event, Answer):
                        for part in self._rest():
                            yield self._sse(self._delta(part))
                        extra = {"duet": self._about(event)}
                        yield self._sse(self._delta(), self._finish_reason(event), extra)
                        if include_usage:
                            yield sse({**self._head(self._chunk), "choices": [], "usage": usage(event)})
        except Exception as error:
            yield sse(error_body(as_api_error(error)))
        yield sse("[DONE]")

    def _about(self, answer: Answer) -> dict[str, Any]:
        return about(answer, self._notices + self._remarks(), self.queue_position)

    def _note(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._notices.append(event.message)
        elif isinstance(event, Waiting):
            self.queue_position = max(self.queue_position, event.position)
        elif isinstance(event, Token):
            self._tokens.append(event)

    def _first_delta(self) -> dict[str, Any]:
        return self._delta()

    def _sse(
        self, delta: dict[str, Any], reason: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> bytes:
        return sse({**self._head(self._chunk), "choices": [self._finished(delta, reason)], **(extra or {})})

    def _finished(self, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        told, self._tokens = self._tokens, []
        logprobs = self._logprobs(told) if self.wants_logprobs and told else None
        return {"index": 0, **choice, "finish_reason": reason, "logprobs": logprobs}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self._id}-{self._number}",
            "object": kind,
            "created": self._created,
            "model": self.model,
        }


@dataclass
class _ChatAnswering(_Answering):
    calls: ToolCallFinder = field(default_factory=ToolCallFinder)
    _thinking: ThinkingSplitter = field(default_factory=ThinkingSplitter)
    _num_told: int = 0
    """Calls that chunks have told."""

    _id = "chatcmpl"
    _whole = "chat.completion"
    _chunk = "chat.completion.chunk"

    def _parts(self, text: str) -> list[Part]:
        return self._sorted(self._thinking.feed(text))

    def _rest(self) -> list[Part]:
        held = self._sorted(self._thinking.finish())
        return held + [_as_part(found) for found in self.calls.finish()]

    def _sorted(self, runs: list[tuple[bool, str]]) -> list[Part]:
        parts: list[Part] = []
        for is_thought, text in runs:
            parts += [(True, text)] if is_thought else map(_as_part, self.calls.feed(text))
        return parts

    def _remarks(self) -> list[str]:
        return self.calls.remarks

    def _finish_reason(self, answer: Answer) -> str:
        reason = super()._finish_reason(answer)
        return "tool_calls" if reason == "stop" and self.calls.num_calls else reason

    def _choice(self, parts: Sequence[Part]) -> dict[str, Any]:
        runs = [part for part in parts if not isinstance(part, ToolCall)]
        calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
        thought = "".join(text for is_thought, text in runs if is_thought)
        said = "".join(text for is_thought, text in runs if not is_thought)
        message = {"role": "assistant", "content": None if calls and not said else said}
        return {
            "message": message
            | ({"reasoning_content": thought} if thought else {})
            | ({"tool_calls": calls} if calls else {})
        }

    def _first_delta(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, part: Part | None = None) -> dict[str, Any]:
        if part is None:
            return {"delta": {}}
        if isinstance(part, ToolCall):
            self._num_told += 1
            return {"delta": {"tool_calls": [{"index": self._num_told - 1, **_call(part)}]}}
        is_thought, text = part
        return {"delta": {"reasoning_content" if is_thought else "content": text}}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {
                    "token": token.piece.decode("utf-8", "replace"),
                    "logprob": token.logprob,
                    "bytes": list(token.piece),
                    "top_logprobs": [],
                }
                for token in tokens
            ]
        }


class _TextAnswering(_Answering):
    """A plain text's thoughts are part of it."""

    _id = "cmpl"
    _whole = _chunk = "text_completion"

    def _choice(self, parts: Sequence[Part]) -> dict[str, Any]:
        return {"text": "".join(part[1] for part in parts if not isinstance(part, ToolCall))}

    def _delta(self, part: Part | None = None) -> dict[str, Any]:
        return self._choice([] if part is None else [part])

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [token.piece.decode("utf-8", "replace") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
        }


def _as_part(found: str | ToolCall) -> Part:
    return (False, found) if isinstance(found, str) else found


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def about(answer: Answer, notices: list[str], queue_position: int) -> dict[str, Any]:
    """What duet tells beside OpenAI's fields, all under one key."""
    decision = answer.decision
    reasons = decision.reasons if decision else (answer.reason,) if answer.reason else ()
    return {
        "mode": answer.mode,
        "reasons": list(reasons),
        "p_cloud": decision and decision.p_cloud,
        "predicted_tokens": decision and decision.predicted_tokens,
        "notices": notices,
        "queue_position": queue_position,
        "policy": answer.policy and answer.policy.value,
        "acceptance_rate": answer.accepted_tokens / answer.drafted_tokens if answer.drafted_tokens else None,
        "acceptance_length": answer.acceptance_length,
        "rounds": answer.rounds,
        "target_passes": answer.target_passes,
        "drafted_tokens": answer.drafted_tokens,
        "accepted_tokens": answer.accepted_tokens,
        "seed": answer.seed,
        "ttft_ms": answer.ttft_ms,
        "tpot_ms": answer.tpot_ms,
        "bytes_per_token": answer.bytes_per_token,
        "edge_model": answer.edge_model,
        "cloud_model": answer.cloud_model,
    }
