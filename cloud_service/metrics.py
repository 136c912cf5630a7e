"""What the service counts, for Prometheus: `metrics_listen` says where it is read.

docs/observability.md lists every name; `tests/unit/test_observability_docs.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from shared.errors import AddressInUse, DuetError
from shared.messages import FinishReason, Timings

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class CloudMetrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._active = Gauge(
            "duet_cloud_streams_active", "Streams that run now.", ["kind"], registry=registry
        )
        self._streams = Counter(
            "duet_cloud_streams",
            "Streams that ended, by call and reason; cancelled is an edge that hung up.",
            ["kind", "reason"],
            registry=registry,
        )
        self._errors = Counter(
            "duet_cloud_errors", "Calls that failed, by the error's kind.", ["kind"], registry=registry
        )
        self._rounds = Counter("duet_cloud_rounds", "Verifications.", registry=registry)
        self._drafted = Counter(
            "duet_cloud_drafted_tokens", "Draft tokens that verdicts answered.", registry=registry
        )
        self._accepted = Counter(
            "duet_cloud_accepted_tokens", "Draft tokens that the target accepted.", registry=registry
        )
        self._committed = Counter(
            "duet_cloud_committed_tokens", "Completion tokens, by call.", ["kind"], registry=registry
        )
        self._prompt = Counter(
            "duet_cloud_prompt_tokens",
            "Tokens that streams began with: prompts, and what a resume had committed.",
            registry=registry,
        )
        self._computed = Counter(
            "duet_cloud_computed_tokens",
            "Tokens that the target evaluated; the prompt cache spared it the others.",
            registry=registry,
        )
        self._queue = Histogram(
            "duet_cloud_queue_seconds",
            "Of a round, waiting for the target.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._verify = Histogram(
            "duet_cloud_verify_seconds", "Of a round, the target's pass.", buckets=_SECONDS, registry=registry
        )

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """A stream runs."""
        with self._active.labels(kind).track_inprogress():
            yield

    def ended(
        self,
        kind: str,
        reason: FinishReason | None,
        *,
        num_began_with: int,
        num_committed: int,
        num_computed: int,
    ) -> None:
        """
        Args:
            reason: None where the edge hung up.
            num_began_with: tokens of the prompt and of a resumed completion.
            num_committed: completion tokens since.
            num_computed: tokens that the target evaluated.
        """
        self._streams.labels(kind, reason.value if reason else "cancelled").inc()
        self._prompt.inc(num_began_with)
        self._committed.labels(kind).inc(num_committed)
        self._computed.inc(num_computed)

    def round(self, num_drafted: int, num_accepted: int, timings: Timings) -> None:
        self._rounds.inc()
        self._drafted.inc(num_drafted)
        self._accepted.inc(num_accepted)
        self._queue.observe(timings.queue_us / 1e6)
        self._verify.observe(timings.verify_us / 1e6)

    def failed(self, error: DuetError) -> None:
        self._errors.labels(type(error).__name__).inc()

    @contextmanager
    def served(self, listen: str | None) -> Iterator[None]:
        """Answer Prometheus at HOST:PORT while the block runs; None answers nobody.

        Raises:
            AddressInUse: the address cannot be bound.
        """
        if listen is None:
            yield
            return
        host, _, port = listen.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise AddressInUse(
                f"cannot serve metrics on {listen}: {error.strerror}; choose another --metrics-listen"
            ) from None
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
