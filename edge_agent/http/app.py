"""The HTTP application over one agent: its routes, its key, its errors."""

from __future__ import annotations

import hmac
import re
import time
from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent.agent import Agent
from edge_agent.http.completions import MODES, chat_completions, mode_of, text_completions
from edge_agent.http.cross_origin import check_host, check_same_site
from edge_agent.http.errors import ApiError, error_response
from edge_agent.http.live import live_chat
from edge_agent.http.site import page_routes
from edge_agent.http.streaming import STALL_TIMEOUT_S
from shared.errors import DuetError

MAX_BODY_BYTES = 8 * 2**20
"""Of a request: far more than any context holds."""

PUBLIC_PATHS = re.compile("/(health|page/.*)?")
"""Answered without the key; the page asks for it."""


def create_app(
    agent: Agent, *, api_key: str | None = None, stall_timeout_s: float = STALL_TIMEOUT_S
) -> Starlette:
    """
    Args:
        api_key: what clients must send as a bearer token, if anything.
        stall_timeout_s: how long a client may leave a stream unread before it is given up.
    """
    handlers = (ApiError, ValidationError, DuetError, HTTPException, Exception)
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", list_models),
            Route("/v1/models/{model}", show_model),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", text_completions, methods=["POST"]),
            Route("/api/chat", live_chat, methods=["POST"]),
            Route("/metrics", metrics),
            *page_routes(),
        ],
        middleware=[Middleware(_Guard, api_key=api_key)],
        exception_handlers=dict.fromkeys(handlers, error_response) | {ClientDisconnect: _nobody},
    )
    app.state.agent = agent
    app.state.started = int(time.time())
    app.state.stall_timeout_s = stall_timeout_s
    return app


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": version("duet-llm")})


async def metrics(request: Request) -> Response:
    agent: Agent = request.app.state.agent
    return Response(agent.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(request, name) for name in MODES]})


async def show_model(request: Request) -> Response:
    name = request.path_params["model"]
    mode_of(name)
    return JSONResponse(_model(request, name))


def _model(request: Request, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "duet",
        "duet": {"mode": MODES[name]},
    }


async def _nobody(_: Request, __: Exception) -> Response:
    """The client is gone; what is sent goes nowhere."""
    return Response(status_code=499)


class _Guard:
    """Turns away, before anything is read, other sites' pages, who has no key, and what is too large."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._check(request)
        except ApiError as refusal:
            await error_response(request, refusal)(scope, receive, send)
            return
        await self._app(scope, _limited(receive), send)

    def _check(self, request: Request) -> None:
        check_same_site(request.method, request.headers)
        if self._expected is None:
            check_host(request.scope["server"][0], request.headers)
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected) and not PUBLIC_PATHS.fullmatch(
            request.scope["path"]
        ):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")


def _limited(receive: Receive) -> Receive:
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise ApiError(
                f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="request_too_large"
            )
        return message

    return limited
