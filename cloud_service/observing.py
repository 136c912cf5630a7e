"""Joins a call's records and spans with those of the edge that made it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import structlog
from opentelemetry.context import Context

from protos import wire
from shared import tracing

caller_trace: ContextVar[Context] = ContextVar("caller_trace", default=Context())  # noqa: B039 (immutable)
"""The trace context that came with the call which the current task serves."""


class CallIdentity(grpc.aio.ServerInterceptor):
    """Binds the request's id to all log records of the call, and keeps the caller's trace context.

    grpc.aio runs interceptors and the handler of a call in one task, so context variables are the call's own.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        metadata = tuple(handler_call_details.invocation_metadata or ())
        given = dict(metadata).get(wire.REQUEST_ID)
        structlog.contextvars.bind_contextvars(request_id=wire.request_id(given))
        caller_trace.set(tracing.from_metadata(metadata))
        return await continuation(handler_call_details)
