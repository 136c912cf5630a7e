"""`POST /api/chat`: everything that happens while an answer is made, for the web page.

The body is `{"messages": [{"role", "content"}, ...], "settings": {...}}`; settings are those of
`shared.config.REQUEST_SETTINGS`, `mode` among them. The answer is a stream of JSON objects, one a line
(application/x-ndjson), each with a `type`:

- `waiting`: the request waits for the edge model. `position`: 1 is next; again when it moves up.
- `route`: who answers, again where that changed. `mode`; `p_cloud`, `predicted_tokens`, `reasons` and
  `probes` are null unless the mode asked for is `auto`.
- `text`: text that stands. `text`; `origin`: `accepted`, `correction`, `bonus`, `cloud` or `local`;
  `thinking`: whether it belongs to the model's thoughts.
- `provisional`: what follows all `text` so far and is not verified yet. `text`, `num_tokens`. It replaces
  what was provisional before, and may be empty; a `text` ends it too.
- `round`: a verdict. `drafted` and `accepted` are its own; `rounds`, `drafted_tokens`, `accepted_tokens`,
  `completion_tokens` (before this verdict) and `elapsed_ms` are the answer's so far.
- `notice`: a line that the user should see. `message`.
- `answer`: the end. The fields of `duet ask --json`.
- `error`: the end, instead of an answer. `error`, in OpenAI's shape.

A request that is refused before anything is streamed gets an HTTP error in OpenAI's shape.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_agent.agent import Agent
from edge_agent.http.completions import request_id
from edge_agent.http.errors import as_api_error, error_body
from edge_agent.http.requests import LiveChat, as_chat, parse
from edge_agent.http.streaming import StreamedResponse, to_json
from edge_agent.show import answer_fields
from shared.events import Answer, Event, Notice, Provisional, Round, Routed, Text, Token, Waiting
from shared.thinking import ThinkingSplitter


async def live_chat(request: Request) -> Response:
    asked = parse(LiveChat, await request.body())
    agent: Agent = request.app.state.agent
    return StreamedResponse(
        _lines(
            agent.chat(
                as_chat(asked.messages), provisional=True, request_id=request_id(request), **asked.settings
            )
        ),
        media_type="application/x-ndjson",
        stall_timeout_s=request.app.state.stall_timeout_s,
    )


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    live = _Live()
    try:
        async with aclosing(events):
            async for event in events:
                for message in live.messages(event):
                    yield (to_json(message) + "\n").encode()
    except Exception as error:
        yield (to_json({"type": "error", **error_body(as_api_error(error))}) + "\n").encode()


class _Live:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self._thinking = ThinkingSplitter()
        self._rounds = self._drafted = self._accepted = self._tokens = 0

    def messages(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Token):
            self._tokens += 1
            return []
        if isinstance(event, Text):
            origin = event.origin.value
            return [_text(run, origin) for run in self._thinking.feed(event.text)]
        if isinstance(event, Answer):
            rest = [_text(run, event.tokens[-1].origin.value) for run in self._thinking.finish()]
            return [*rest, {"type": "answer", **answer_fields(event)}]
        return [self._message(event)]

    def _message(self, event: Waiting | Routed | Provisional | Round | Notice) -> dict[str, Any]:
        if isinstance(event, Routed):
            decision: Any = event.decision
            names = ("p_cloud", "predicted_tokens", "reasons", "probes")
            return {
                "type": "route",
                "mode": event.mode,
                **{name: None if decision is None else _plain(getattr(decision, name)) for name in names},
            }
        if isinstance(event, Provisional):
            return {"type": "provisional", "text": event.text, "num_tokens": event.num_tokens}
        if isinstance(event, Waiting):
            return {"type": "waiting", "position": event.position}
        if isinstance(event, Notice):
            return {"type": "notice", "message": event.message}
        self._rounds += 1
        self._drafted += event.num_drafted
        self._accepted += event.num_accepted
        return {
            "type": "round",
            "drafted": event.num_drafted,
            "accepted": event.num_accepted,
            "rounds": self._rounds,
            "drafted_tokens": self._drafted,
            "accepted_tokens": self._accepted,
            "completion_tokens": self._tokens,
            "elapsed_ms": 1e3 * (time.monotonic() - self._began),
        }


def _text(run: tuple[bool, str], origin: str) -> dict[str, Any]:
    return {"type": "text", "text": run[1], "origin": origin, "thinking": run[0]}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
