"""Bytes that are no message, as answers and not as failures of the service.

Left alone, gRPC raises while it reads them: the caller gets UNKNOWN, and the log a traceback for each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos.duet.v1 import speculation_pb2 as pb2

_OURS = f"/{pb2.DESCRIPTOR.services_by_name['SpeculationService'].full_name}/"


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Hands our servicer None for what cannot be read, and other servicers an empty message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer
        ours = handler_call_details.method.startswith(_OURS)

        def read(content: bytes) -> Any:
            try:
                return parse(content)
            except DecodeError:
                return None if ours else parse(b"")

        return handler._replace(request_deserializer=read)
