"""What the service counts, for Prometheus: `metrics_listen` says where it is read.

docs/observability.md lists every name; `tests/unit/test_observability_docs.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cloud_service.guards import Guards
from shared.errors import AddressInUse, CloudError, DuetError
from shared.messages import FinishReason, Timings

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class CloudMetrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self, guards: Guards) -> None:
        """
        Args:
            guards: whose queue and memory are shown.
        """
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
        self._limited = Counter(
            "duet_cloud_limited",
            "Calls refused or cut off, by tenant and by the limit (docs/security.md), places or memory.",
            ["tenant", "limit"],
            registry=registry,
        )
        self._of_tenant = Gauge(
            "duet_cloud_tenant_streams",
            "Streams that run or wait for a place now, by tenant.",
            ["tenant"],
            registry=registry,
        )
        self._spent = Counter(
            "duet_cloud_tenant_tokens",
            "Tokens that tokens_per_minute limits: of prompts, scored or made, by tenant.",
            ["tenant"],
            registry=registry,
        )
        for name, what, value in (
            (
                "streams_waiting",
                "Streams that wait for a place in the target.",
                lambda: guards.places.num_waiting,
            ),
            ("places_free", "Streams that the target could take at once.", lambda: guards.places.num_free),
            (
                "memory_free_bytes",
                "What is left to the machine or the container; short of min_free_mb, streams are refused.",
                lambda: guards.memory.free_bytes,
            ),
        ):
            Gauge(f"duet_cloud_{name}", what, registry=registry).set_function(value)
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
        self._clamped = Counter(
            "duet_cloud_clamped_predictions",
            "Streams whose predicted length made no sense, and was clamped.",
            registry=registry,
        )
        self._requeued = Counter(
            "duet_cloud_requeued_streams",
            "Times that an answer far longer than predicted gave its place to others that waited.",
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
    def stream(self, kind: str, tenant: str) -> Iterator[None]:
        """A stream runs."""
        with self._active.labels(kind).track_inprogress(), self._of_tenant.labels(tenant).track_inprogress():
            yield

    def spent(self, tenant: str, num_tokens: int) -> None:
        self._spent.labels(tenant).inc(num_tokens)

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

    def clamped(self) -> None:
        self._clamped.inc()

    def requeued(self) -> None:
        self._requeued.inc()

    def failed(self, error: DuetError, tenant: str | None) -> None:
        """
        Args:
            tenant: None is somebody unknown.
        """
        self._errors.labels(type(error).__name__).inc()
        if isinstance(error, CloudError) and error.limit is not None and tenant is not None:
            self._limited.labels(tenant, error.limit).inc()

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
