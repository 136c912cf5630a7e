"""OpenTelemetry traces that join the edge and the cloud: spans, and the context that travels between them.

The API alone does nothing; `send_to` installs the SDK, an extra of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from shared.errors import DuetError, InvalidSetting

_PROPAGATOR = TraceContextTextMapPropagator()


def send_to(endpoint: str | None, service: str) -> None:
    """Send all spans of this process to an OTLP collector, over gRPC.

    Args:
        endpoint: for example http://127.0.0.1:4317; None sends nothing anywhere.
        service: name of this process in traces.
    Raises:
        InvalidSetting: the SDK is not installed.
    """
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidSetting(
            "traces_to needs the OpenTelemetry SDK; install it with: pip install 'duet-llm[traces]'"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


@contextmanager
def span(
    name: str,
    parent: Context | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Iterator[Span]:
    """A span for as long as the block runs. Its parent is named, never ambient: generators change tasks.

    A DuetError that passes marks the span as failed.
    """
    each = trace.get_tracer("duet").start_span(name, parent, kind, dict(attributes or {}))
    try:
        yield each
    except DuetError as error:
        each.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        raise
    finally:
        each.end()


def below(parent: Span) -> Context:
    """The context of a span's children."""
    return trace.set_span_in_context(parent)


def to_metadata(context: Context | None) -> tuple[tuple[str, str], ...]:
    """W3C trace context as gRPC metadata; empty where there is nothing to join."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return tuple(carrier.items())


def from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The caller's context; an empty one where it sent none, or nothing valid."""
    carrier = {name: value for name, value in metadata if isinstance(value, str)}
    return _PROPAGATOR.extract(carrier, Context())
