"""`/v1/chat/completions`: an agent's events as OpenAI's bodies and chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_agent.agent import Agent
from edge_agent.http.errors import ApiError, as_api_error, error_body
from edge_agent.http.requests import ChatCompletion, parse
from edge_agent.http.streaming import StreamedResponse, sse, sse_comment, unless_gone
from shared.events import Answer, Event, Notice, Text, Waiting
from shared.messages import FinishReason
from shared.thinking import ThinkingSplitter

MODES = {"duet": "auto", "duet-local": "local", "duet-cloud": "cloud", "duet-speculate": "speculate"}
"""What clients call a model, and the mode that it is."""


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
    messages = [message.as_message() for message in asked.messages]
    events = agent.chat(
        messages, request_id=request_id(request), mode=mode_of(asked.model), **asked.settings()
    )
    answering = _Answering(asked.model)
    if not asked.stream:
        body = await unless_gone(request, answering.whole(events))
        return JSONResponse(body, headers=queue_header(answering.queue_position))
    begun, position = await unless_gone(request, _begun(events))
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return StreamedResponse(
        answering.chunks(begun, include_usage=include_usage),
        media_type="text/event-stream",
        headers=queue_header(position),
        stall_timeout_s=request.app.state.stall_timeout_s,
    )


def request_id(request: Request) -> str | None:
    """The client's own name for the request, for the logs."""
    return request.headers.get("x-request-id")


def queue_header(position: int) -> dict[str, str]:
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
    """One completion as it comes about."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    notices: list[str] = field(default_factory=list)
    queue_position: int = 0
    """Where in line the request began."""

    def note(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.message)
        elif isinstance(event, Waiting):
            self.queue_position = max(self.queue_position, event.position)

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        thinking = ThinkingSplitter()
        runs: list[tuple[bool, str]] = []
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Text):
                    runs += thinking.feed(event.text)
                elif isinstance(event, Answer):
                    answer = event
                else:
                    self.note(event)
        runs += thinking.finish()
        thought = "".join(text for is_thought, text in runs if is_thought)
        message = {
            "role": "assistant",
            "content": "".join(text for is_thought, text in runs if not is_thought),
            **({"reasoning_content": thought} if thought else {}),
        }
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(answer), "logprobs": None}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage(answer),
            "duet": about(answer, self.notices),
        }

    async def chunks(
        self, events: AsyncGenerator[Event, None], *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        thinking = ThinkingSplitter()
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Text):
                        for run in thinking.feed(event.text):
                            yield self._chunk(_delta(*run))
                    elif isinstance(event, Waiting):
                        self.note(event)
                        yield sse_comment(f"waiting for the edge model, position {event.position}")
                    elif isinstance(event, Answer):
                        for run in thinking.finish():
                            yield self._chunk(_delta(*run))
                        yield self._chunk({}, finish_reason(event), {"duet": about(event, self.notices)})
                        if include_usage:
                            yield sse(
                                {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(event)}
                            )
        except Exception as error:
            yield sse(error_body(as_api_error(error)))
        yield sse("[DONE]")

    def _chunk(
        self, delta: Mapping[str, Any], reason: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **(extra or {})})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _delta(is_thought: bool, text: str) -> dict[str, str]:
    return {"reasoning_content" if is_thought else "content": text}


def finish_reason(answer: Answer) -> str:
    """A text that a leaving service cut off is not whole, which clients know as `length`."""
    return "stop" if answer.finish_reason is FinishReason.STOP else "length"


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def about(answer: Answer, notices: list[str]) -> dict[str, Any]:
    """What duet tells beside OpenAI's fields, all under one key."""
    decision = answer.decision
    return {
        "mode": answer.mode,
        "route": decision
        and {
            "p_cloud": decision.p_cloud,
            "predicted_tokens": decision.predicted_tokens,
            "reasons": list(decision.reasons),
        },
        "notices": notices,
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
