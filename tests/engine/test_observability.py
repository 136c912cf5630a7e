"""What an operator sees of a request: one trace, one id and matching counts on both sides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from edge_agent.agent import Agent
from shared.config import EdgeConfig
from shared.events import Answer
from tests.counters import samples, scraped
from tests.ports import free_port
from tests.service import CONTEXT_TOKENS, connection, in_process_cloud, loaded_edge, run_duet, running_cloud
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


async def ask(agent: Agent, request_id: str | None = None) -> Answer:
    async with aclosing(agent.ask(QUESTION, request_id=request_id)) as events:
        async for event in events:
            if isinstance(event, Answer):
                return event
    raise AssertionError("no answer")


async def test_one_trace_holds_the_edges_spans_and_the_clouds(
    tiny_pair: TinyPair, spans: InMemorySpanExporter
) -> None:
    config = EdgeConfig(mode="speculate", max_tokens=16)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf, mode="speculate") as edge,
        connection(service.address) as cloud,
    ):
        await ask(Agent(config, edge=edge, cloud=cloud), "asked-by-me")
    by_name = {span.name: span for span in spans.get_finished_spans()}
    answer, stream, served = (by_name[n] for n in ("duet.answer", "duet.stream", "duet.cloud.speculate"))
    assert len({span.context.trace_id for span in (answer, stream, served)}) == 1
    assert answer.parent is None
    assert (stream.parent.span_id, served.parent.span_id) == (answer.context.span_id, stream.context.span_id)
    assert answer.attributes["duet.request_id"] == "asked-by-me"
    verdicts = [event for event in served.events if event.name == "verdict"]
    assert len(verdicts) == answer.attributes["duet.rounds"] > 0


async def test_both_sides_count_the_same(tiny_pair: TinyPair) -> None:
    config = EdgeConfig(mode="speculate", max_tokens=24)
    port = free_port()
    with running_cloud(
        tiny_pair.target_gguf, context_tokens=CONTEXT_TOKENS, metrics_listen=f"127.0.0.1:{port}"
    ) as service:
        async with (
            loaded_edge(tiny_pair.draft_gguf, mode="speculate") as edge,
            connection(service.address) as cloud,
        ):
            agent = Agent(config, edge=edge, cloud=cloud)
            answer = await ask(agent)
            here = samples(agent.metrics.exposition().decode())
        there = await scraped(f"127.0.0.1:{port}")
    for name, count in (
        ("rounds", answer.rounds),
        ("drafted_tokens", answer.drafted_tokens),
        ("accepted_tokens", answer.accepted_tokens),
    ):
        assert here[f"duet_edge_{name}_total",] == there[f"duet_cloud_{name}_total",] == count
    assert there["duet_cloud_committed_tokens_total", "speculate"] == answer.completion_tokens
    assert here["duet_edge_answers_total", answer.finish_reason.value, "speculate"] == 1
    assert here["duet_edge_breaker_state", service.address, "closed"] == 1
    assert there["duet_cloud_streams_active", "speculate"] == 0
    assert there["duet_cloud_verify_seconds_count",] == answer.rounds


def test_log_records_of_both_sides_carry_the_requests_id_and_none_of_its_words(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    with running_cloud(tiny_pair.target_gguf, context_tokens=CONTEXT_TOKENS, log_format="json") as service:
        done = run_duet(
            *("ask", "--mode", "cloud", "--cloud", service.address, "--max-tokens", "8", QUESTION),
            folder=tmp_path,
            env={"DUET_LOG_FORMAT": "json", "DUET_LOG_LEVEL": "info"},
        )
    assert done.returncode == 0, done.stderr
    here = [json.loads(line) for line in done.stderr.decode().splitlines()]
    there = [json.loads(line) for line in service.log_lines if line.strip()]
    [answered] = [record for record in here if record["event"] == "answered"]
    [ended] = [record for record in there if record["event"] == "stream ended"]
    assert answered["request_id"] == ended["request_id"]
    assert answered["completion_tokens"] == ended["completion_tokens"]
    assert QUESTION not in done.stderr.decode() + "".join(service.log_lines)
