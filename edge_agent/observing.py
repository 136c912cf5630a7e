"""One request as an operator sees it: an id that the cloud's records carry too, a span, counters, records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.trace import Span

from edge_agent.metrics import EdgeMetrics
from protos import wire
from shared import tracing
from shared.errors import DuetError
from shared.events import Answer

log = logging.getLogger("duet.edge")


@dataclass(frozen=True, slots=True)
class Observed:
    """A request that runs. Records hold no word of the prompt or the answer."""

    id: str
    span: Span
    metrics: EdgeMetrics

    def metadata(self, span: Span) -> tuple[tuple[str, str], ...]:
        """What a call to the cloud carries, to be found there under the same id and in the same trace."""
        return ((wire.REQUEST_ID, self.id), *tracing.to_metadata(tracing.below(span)))

    def lost(self, error: DuetError, num_committed: int) -> None:
        """A running stream broke."""
        log.info(
            "stream lost",
            extra={"request_id": self.id, "committed_tokens": num_committed, "error": str(error)},
        )

    def resumed(self, after_s: float) -> None:
        self.metrics.resumed(after_s)
        log.info("stream resumed", extra={"request_id": self.id, "seconds": round(after_s, 3)})

    def answered(self, answer: Answer) -> None:
        self.metrics.answered(answer)
        figures = {
            "mode": answer.mode,
            "finish_reason": answer.finish_reason.value,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "rounds": answer.rounds,
            "accepted_tokens": answer.accepted_tokens,
        }
        for name, value in figures.items():
            self.span.set_attribute(f"duet.{name}", value)
        log.info("answered", extra={"request_id": self.id, **figures})


@contextmanager
def observed(metrics: EdgeMetrics, request_id: str | None) -> Iterator[Observed]:
    """Observe a request.

    Args:
        request_id: the caller's own name for it, where it is one; otherwise it gets one here.
    """
    request_id = wire.request_id(request_id)
    with tracing.span("duet.answer", attributes={"duet.request_id": request_id}) as span:
        try:
            yield Observed(request_id, span, metrics)
        except DuetError as error:
            metrics.failed(error)
            log.info(
                "request failed",
                extra={"request_id": request_id, "kind": type(error).__name__, "error": str(error)},
            )
            raise
