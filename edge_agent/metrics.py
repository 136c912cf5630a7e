"""What the edge counts, for Prometheus: `duet serve` answers with it at /metrics.

docs/observability.md lists every name; `tests/unit/test_observability_docs.py` holds the two together.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from edge_agent.remote import Cloud
from shared.breaker import BreakerState
from shared.errors import DuetError
from shared.events import Answer

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EdgeMetrics:
    """Counters of one agent, in a registry of its own."""

    def __init__(self, cloud: Cloud | None = None) -> None:
        """
        Args:
            cloud: whose breakers are shown.
        """
        self.registry = registry = CollectorRegistry()
        self._answers = Counter(
            "duet_edge_answers", "Answers that were completed.", ["mode", "finish_reason"], registry=registry
        )
        self._errors = Counter(
            "duet_edge_errors", "Requests that failed, by the error's kind.", ["kind"], registry=registry
        )
        self._routes = Counter(
            "duet_edge_routes", "Decisions of the router in mode auto.", ["route"], registry=registry
        )
        self._tokens = Counter(
            "duet_edge_tokens", "Committed tokens, by who made them.", ["origin"], registry=registry
        )
        self._drafted = Counter(
            "duet_edge_drafted_tokens", "Draft tokens that verdicts answered.", registry=registry
        )
        self._accepted = Counter(
            "duet_edge_accepted_tokens", "Draft tokens that the target accepted.", registry=registry
        )
        self._rounds = Counter("duet_edge_rounds", "Verdicts received.", registry=registry)
        self._first_token = Histogram(
            "duet_edge_time_to_first_token_seconds",
            "From the request to its first committed token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._resumed = Histogram(
            "duet_edge_outage_seconds",
            "From the loss of a running stream to its next committed token.",
            buckets=_SECONDS,
            registry=registry,
        )
        if cloud is not None:
            registry.register(_Breakers(cloud))

    def answered(self, answer: Answer) -> None:
        self._answers.labels(answer.mode, answer.finish_reason.value).inc()
        if answer.decision is not None:
            self._routes.labels(answer.decision.route.value).inc()
        for token in answer.tokens:
            self._tokens.labels(token.origin.value).inc()
        self._rounds.inc(answer.rounds)
        self._drafted.inc(answer.drafted_tokens)
        self._accepted.inc(answer.accepted_tokens)
        if answer.ttft_ms is not None:
            self._first_token.observe(answer.ttft_ms / 1e3)

    def failed(self, error: DuetError) -> None:
        self._errors.labels(type(error).__name__).inc()

    def resumed(self, after_s: float) -> None:
        self._resumed.observe(after_s)

    def exposition(self) -> bytes:
        """Prometheus' text format, content type `prometheus_client.CONTENT_TYPE_LATEST`."""
        return generate_latest(self.registry)


class _Breakers(Collector):
    """Read when asked, so that it is never stale."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "duet_edge_breaker_state",
            "1 for the state that the breaker of a replica is in, 0 for the others.",
            labels=["replica", "state"],
        )
        for status in self._cloud.replicas:
            for state in BreakerState:
                family.add_metric([status.address, state.value], float(status.state is state))
        return [family]
