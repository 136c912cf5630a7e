"""Tenants on one service: each gets what it may have, and nothing of another's."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from cloud_service.guards import Guards
from cloud_service.security import new_token
from cloud_service.server import SERVICE
from cloud_service.servicer import SpeculationServicer
from cloud_service.tenants import opened
from edge_agent.access import Access
from edge_agent.remote import Cloud, Meter
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.config import CloudConfig
from shared.errors import (
    AccessDenied,
    CloudOverloaded,
    InvalidDraft,
    InvalidRequest,
    PromptTooLong,
    QuotaExceeded,
    StreamExpired,
)
from shared.limits import Limits
from shared.logs import configure_logging
from shared.messages import Draft, Finished, Message, Open
from shared.sampling import Sampling
from tests.counters import samples
from tests.scripted_target import ScriptedTarget
from tests.service import eventually, generate, in_process_cloud, serving
from tests.tiny_pair import TinyPair

SECRET_WORDS = "the harbour master's unlisted number"


def request(text: str = "hello", *, max_tokens: int = 8, **fields: Any) -> Open:
    return Open(prompt=(Message("user", text),), sampling=Sampling(), seed=0, max_tokens=max_tokens, **fields)


def target() -> ScriptedTarget:
    return ScriptedTarget(lambda text: 1 + len(text) % 250)


def add_token(file: Path, tenant: str, **limits: Any) -> str:
    text, token = new_token(tenant, limits=Limits(**limits), now_s=time.time(), expires_s=None)
    with opened(file) as store:
        store.add_token(token)
    return text


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def edge(address: str, token: str | None = None) -> AsyncIterator[Cloud]:
    access = Access() if token is None else Access(metadata=bearer(token))
    async with Cloud(address, connect_timeout_s=5.0, silence_timeout_s=30.0, access=access) as cloud:
        yield cloud


@dataclass
class Shared:
    """A service with tokens, for two tenants and more."""

    address: str
    servicer: SpeculationServicer
    file: Path
    target: ScriptedTarget

    def edge(self, tenant: str, **limits: Any) -> Any:
        return edge(self.address, add_token(self.file, tenant, **limits))


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[Shared]:
    file = tmp_path / "tokens.db"
    with opened(file):
        pass
    scripted = target()
    async with serving(scripted, CloudConfig(tokens=str(file))) as (address, servicer):
        yield Shared(address, servicer, file, scripted)


# Who is let in


async def test_every_call_of_the_service_asks_who_calls(shared: Shared) -> None:
    methods = pb2.DESCRIPTOR.services_by_name["SpeculationService"].methods
    assert len(methods) == 3
    async with grpc.aio.insecure_channel(shared.address) as channel:
        for method in methods:
            call = channel.stream_stream(f"/{SERVICE}/{method.name}")(iter([b""]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name


@pytest.mark.parametrize("bad", [None, "nonsense", "duet_0123456789ab_" + "x" * 43])
async def test_an_edge_without_a_token_that_counts_gets_a_line_that_says_so(
    shared: Shared, bad: str | None
) -> None:
    add_token(shared.file, "alice")
    async with edge(shared.address, bad) as cloud:
        with pytest.raises(AccessDenied, match="token"):
            await generate(cloud, request())
        with pytest.raises(AccessDenied):
            async with cloud.speculate(request(), Meter()):
                raise AssertionError("a stream was opened")
    assert shared.target.scored == []


async def test_health_needs_no_token() -> None:
    """Balancers and Kubernetes probe it; it tells nothing but whether the service serves."""
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(None)


async def test_a_token_that_is_revoked_ends_no_running_stream_and_opens_no_new_one(shared: Shared) -> None:
    token = add_token(shared.file, "alice")
    async with edge(shared.address, token) as cloud, cloud.speculate(request(), Meter()) as stream:
        with opened(shared.file) as store:
            store.remove_token(token.split("_")[1])
        await stream.send(Draft(0, 0, (), more=False))
        assert not isinstance(await stream.receive(), Finished)
        with pytest.raises(AccessDenied):
            await generate(cloud, request())


# Nothing of another tenant


@pytest.mark.engine
async def test_a_prompt_that_another_tenant_asked_before_costs_as_much_as_a_new_one(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.db"
    alice, bob = add_token(file, "alice"), add_token(file, "bob")
    text = "What is the capital of the moon? " * 4

    async def computed(token: str, **metadata: str) -> int:
        access = Access(metadata=(*bearer(token), *metadata.items()))
        async with Cloud(service.address, connect_timeout_s=5, silence_timeout_s=30, access=access) as cloud:
            messages = [message async for message in cloud.generate(request(text, max_tokens=1), Meter())]
        finished = messages[-1]
        assert isinstance(finished, Finished)
        return finished.usage.target_tokens - finished.usage.prompt_tokens

    async with in_process_cloud(tiny_pair.target_gguf, slots=2, tokens=str(file)) as service:
        first = await computed(alice)
        assert await computed(alice) < first, "her own prompt is cached"
        assert await computed(bob) == first
        # Nor with her session's name, or a resume of her stream: the service keeps nothing by name.
        assert await computed(bob, **{"duet-session": "alice", "session-id": "alice"}) < first, "now his own"


async def test_the_engine_is_told_whose_stream_it_is(shared: Shared) -> None:
    tenants: list[str | None] = []
    original = shared.target.sequence

    def sequence(token_ids: Any, *, tenant: str | None = None, **rest: Any) -> Any:
        tenants.append(tenant)
        return original(token_ids, tenant=tenant, **rest)

    shared.target.sequence = sequence  # type: ignore[method-assign]
    async with shared.edge("alice") as alice, shared.edge("bob") as bob:
        await generate(alice, request())
        await generate(bob, request(committed=(1, 2, 3)))
    assert tenants == ["alice", "bob"]


async def test_what_one_tenant_is_told_names_no_other(shared: Shared) -> None:
    async with shared.edge("alice", streams=1) as alice, shared.edge("bob", streams=1) as bob:
        async with alice.speculate(request(SECRET_WORDS), Meter()), bob.speculate(request(), Meter()):
            with pytest.raises(QuotaExceeded) as caught:
                await generate(bob, request())
            assert "alice" not in str(caught.value)
            assert "harbour" not in str(caught.value)
        with pytest.raises(InvalidRequest) as refused:
            await generate(bob, request(committed=(9999,)))
        assert "alice" not in str(refused.value)


# Limits


async def test_a_stream_too_many_is_refused_with_a_time(shared: Shared) -> None:
    async with shared.edge("alice", streams=1) as cloud, cloud.speculate(request(), Meter()):
        with pytest.raises(QuotaExceeded, match="runs 1 streams") as caught:
            await generate(cloud, request())
        assert caught.value.retry_after_s == 1.0
    await eventually(lambda: shared.servicer.num_streams == 0)
    async with shared.edge("alice", streams=1) as cloud:
        assert (await generate(cloud, request())).token_ids


async def test_resource_exhausted_says_in_metadata_when_to_come_back(shared: Shared) -> None:
    token = add_token(shared.file, "alice", tokens_per_minute=1)
    async with grpc.aio.insecure_channel(shared.address) as channel:
        stub = pb2_grpc.SpeculationServiceStub(channel)
        message = pb2.GenerateRequest(open=wire.encode_open(request()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(message, metadata=bearer(token)):
                pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(caught.value.trailing_metadata())
    assert metadata[wire.ERROR_KIND] == "QuotaExceeded"
    assert 0 < int(metadata[wire.RETRY_AFTER_MS]) <= 120_000
    assert "try again in" in caught.value.details()


async def test_tokens_a_minute_end_a_stream_whose_committed_tokens_stand(shared: Shared) -> None:
    async with shared.edge("alice", tokens_per_minute=20) as cloud:
        made: list[int] = []

        async def write() -> None:
            async for message in cloud.generate(request(max_tokens=100), Meter()):
                made.extend(getattr(message, "token_ids", ()))

        with pytest.raises(QuotaExceeded):
            await write()
        assert len(made) == 15, "a prompt of 5, and 15 of the answer"
        assert made == [1 + n % 250 for n in range(5, 20)]
        with pytest.raises(QuotaExceeded):
            await generate(cloud, request())


async def test_a_shorter_context_and_shorter_drafts_are_said_and_kept(shared: Shared) -> None:
    async with shared.edge("alice", context_tokens=12, max_draft_tokens=2) as cloud:
        assert (await cloud.describe()).context_tokens == 12
        with pytest.raises(PromptTooLong, match="12"):
            await generate(cloud, request("twelve bytes"))
        async with cloud.speculate(request(max_tokens=100), Meter()) as stream:
            assert stream.opened.max_draft_tokens == 2
            assert stream.opened.max_tokens == 12 - len("hello")
            await stream.send(Draft(0, 0, (1, 2, 3), more=False))
            with pytest.raises(InvalidDraft):
                await stream.receive()


async def test_a_message_larger_than_allowed_is_refused_before_it_is_looked_at(shared: Shared) -> None:
    rendered: list[Any] = []
    shared.target.render_chat = rendered.append  # type: ignore[assignment, method-assign]
    async with shared.edge("alice", message_bytes=1000) as cloud:
        for call in (generate(cloud, request("x" * 2000)), _opened(cloud, request("x" * 2000))):
            with pytest.raises(InvalidRequest, match="may send 1000"):
                await call
    assert rendered == []


async def _opened(cloud: Cloud, opening: Open) -> None:
    async with cloud.speculate(opening, Meter()):
        pass


async def test_an_edge_that_falls_silent_is_cut_off(shared: Shared) -> None:
    async with (
        shared.edge("alice", idle_s=0.3) as cloud,
        cloud.speculate(request(), Meter()) as stream,
    ):
        assert shared.target.open_sequences <= 1
        with pytest.raises(StreamExpired, match=r"silent for 0\.3 s"):
            await stream.receive()
        await eventually(lambda: shared.servicer.num_streams == shared.target.open_sequences == 0)


async def test_a_call_that_never_says_what_it_wants_is_cut_off(shared: Shared) -> None:
    token = add_token(shared.file, "alice", idle_s=0.3)
    async with grpc.aio.insecure_channel(shared.address) as channel:
        call = pb2_grpc.SpeculationServiceStub(channel).Speculate(metadata=bearer(token))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_no_stream_lasts_longer_than_it_may_however_busy(shared: Shared) -> None:
    async with (
        shared.edge("alice", total_s=0.5) as cloud,
        cloud.speculate(request(max_tokens=10**6), Meter()) as stream,
    ):

        async def go_on() -> None:
            for start in range(10**6):
                await stream.send(Draft(0, start, (), more=False))
                assert not isinstance(await stream.receive(), Finished)

        with pytest.raises(StreamExpired, match=r"longer than 0\.5 s"):
            await go_on()


# Pressure


async def test_a_reader_that_does_not_read_is_cut_off_and_hurts_nobody(shared: Shared) -> None:
    slow_token = add_token(shared.file, "slow", reading_s=0.5)
    shared.target.piece = lambda token_id: bytes(4096)  # type: ignore[method-assign]
    async with (
        grpc.aio.insecure_channel(shared.address, options=[("grpc.http2.bdp_probe", 0)]) as channel,
        shared.edge("fast") as fast,
    ):
        stub = pb2_grpc.SpeculationServiceStub(channel)
        message = pb2.GenerateRequest(open=wire.encode_open(request(max_tokens=1 << 19)))
        calls = [stub.Generate(message, metadata=bearer(slow_token)) for _ in range(4)]
        for call in calls:
            await call.read()
        await eventually(lambda: shared.servicer.num_streams == 4)
        began = time.monotonic()
        answers = [(await generate(fast, request())).token_ids for _ in range(20)]
        print(f"20 answers in {time.monotonic() - began:.2f} s beside 4 readers that do not read")
        assert all(len(answer) == 8 for answer in answers)
        await eventually(
            lambda: shared.servicer.num_streams == shared.target.open_sequences == 0, within_s=30.0
        )
        for call in calls:
            call.cancel()


async def test_a_service_short_of_memory_takes_no_new_streams_and_finishes_those_that_run() -> None:
    scripted = target()
    config = CloudConfig()
    guards = Guards.of(config, scripted)
    async with (
        serving(scripted, config, guards) as (address, _),
        edge(address) as cloud,
        cloud.speculate(request(), Meter()) as stream,
    ):
        guards.memory._min_free_bytes = 1 << 60
        with pytest.raises(CloudOverloaded, match="short of memory") as caught:
            await generate(cloud, request())
        assert caught.value.retry_after_s == 5.0
        await stream.send(Draft(0, 0, (), more=False))
        assert not isinstance(await stream.receive(), Finished)


async def test_waiting_streams_of_one_tenant_do_not_shut_out_another(tmp_path: Path) -> None:
    file = tmp_path / "tokens.db"
    greedy_token, single_token = add_token(file, "greedy"), add_token(file, "single")
    scripted = target()
    scripted.max_streams = 1  # type: ignore[misc]
    config = CloudConfig(tokens=str(file), max_waiting_streams=4)
    async with (
        serving(scripted, config) as (address, servicer),
        edge(address, greedy_token) as greedy,
        edge(address, single_token) as single,
        AsyncExitStack() as stack,
    ):
        held = await stack.enter_async_context(greedy.speculate(request(), Meter()))
        waiting = [asyncio.create_task(generate(greedy, request())) for _ in range(4)]
        await eventually(lambda: servicer.num_streams == 5)
        newcomer = asyncio.create_task(generate(single, request()))
        await eventually(lambda: sum(task.done() for task in waiting) == 1)
        [refused] = [task for task in waiting if task.done()]
        assert isinstance(refused.exception(), CloudOverloaded)
        await held.close()
        assert (await newcomer).token_ids
        for task in waiting:
            assert task is refused or (await task).token_ids


# Logs


@contextmanager
def logged(config: CloudConfig) -> Iterator[io.StringIO]:
    """What the service logs, as `duet-cloud serve` sets it up."""
    written = io.StringIO()
    with redirect_stderr(written):
        configure_logging(config.log_format, config.log_level)
        try:
            yield written
        finally:
            structlog.reset_defaults()
            logging.basicConfig(handlers=[], force=True)


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("fails", [False, True], ids=["answered", "failed"])
async def test_prompts_and_answers_are_not_logged_even_when_something_fails(
    log_format: str, fails: bool
) -> None:
    def next_token(text: Any) -> int:
        if fails and len(text) > len(SECRET_WORDS) + 2:
            raise RuntimeError("the target broke")
        return ord("Z")

    config = CloudConfig.model_validate({"log_format": log_format, "log_level": "debug"})
    with logged(config) as log:
        async with serving(ScriptedTarget(next_token), config) as (address, _), edge(address) as cloud:
            if fails:
                with pytest.raises(Exception, match="internally"):
                    await generate(cloud, request(SECRET_WORDS))
            else:
                await generate(cloud, request(SECRET_WORDS))
            with pytest.raises(InvalidRequest):
                await generate(cloud, request(SECRET_WORDS, committed=(9999,)))
    text = log.getvalue()
    assert "stream ended" in text
    assert "RuntimeError" in text or not fails
    for words in ("harbour", "unlisted", "ZZZ", "104, 97, 114"):
        assert words not in text


async def test_prompts_and_answers_are_logged_where_that_is_asked_for() -> None:
    config = CloudConfig(log_texts=True, log_format="json")
    with logged(config) as log:
        async with (
            serving(ScriptedTarget(lambda text: ord("Z")), config) as (address, _),
            edge(address) as cloud,
        ):
            await generate(cloud, request(SECRET_WORDS))
    assert SECRET_WORDS in log.getvalue()
    assert "ZZZZZZZZ" in log.getvalue()


@pytest.mark.engine
@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_target_that_fails_logs_no_texts(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    def broken(self: Any, work: Any) -> Any:
        in_a_local_variable = "as the tokens of" + " a prompt are"  # noqa: F841
        raise RuntimeError("broken after a while")

    config = CloudConfig.model_validate({"log_format": log_format})
    with logged(config) as log:
        async with (
            in_process_cloud(tiny_pair.target_gguf, slots=1) as service,
            edge(service.address) as cloud,
        ):
            monkeypatch.setattr(type(service.context), "decode", broken)
            with pytest.raises(Exception, match="broken after"):
                await generate(cloud, request(SECRET_WORDS))
    text = log.getvalue()
    assert "broken after" in text
    assert "as the tokens of a prompt are" not in text


# What the operator sees


def counted(shared: Shared) -> dict[tuple[str, ...], float]:
    return samples(generate_latest(shared.servicer.metrics.registry).decode())


async def test_what_limits_refuse_or_cut_off_is_counted_by_tenant(shared: Shared) -> None:
    async with (
        shared.edge("alice", streams=1, idle_s=0.3) as alice,
        alice.speculate(request(), Meter()) as stream,
    ):
        with pytest.raises(QuotaExceeded):
            await generate(alice, request())
        assert counted(shared)["duet_cloud_tenant_streams", "alice"] == 1
        with pytest.raises(StreamExpired):
            await stream.receive()
    async with shared.edge("bob", tokens_per_minute=20) as bob:
        with pytest.raises(QuotaExceeded):
            await generate(bob, request(max_tokens=100))
    await eventually(lambda: shared.servicer.num_streams == 0)
    seen = counted(shared)
    assert {key[1:]: value for key, value in seen.items() if key[0] == "duet_cloud_limited_total"} == {
        ("streams", "alice"): 1,
        ("idle_s", "alice"): 1,
        ("tokens_per_minute", "bob"): 1,
    }
    assert seen["duet_cloud_tenant_streams", "alice"] == 0
    assert seen["duet_cloud_tenant_tokens_total", "bob"] == 20


async def test_load_that_is_shed_is_counted_with_what_was_short() -> None:
    scripted = target()
    scripted.max_streams = 1
    config = CloudConfig(max_waiting_streams=1)
    guards = Guards.of(config, scripted)
    async with serving(scripted, config, guards) as (address, servicer), edge(address) as cloud:

        def seen(name: str, *labels: str) -> float:
            return samples(generate_latest(servicer.metrics.registry).decode()).get((name, *labels), 0.0)

        async with cloud.speculate(request(), Meter()), cloud.speculate(request(), Meter()):
            await eventually(lambda: seen("duet_cloud_streams_waiting") == 1)
            assert seen("duet_cloud_places_free") == 0
            with pytest.raises(CloudOverloaded):
                await generate(cloud, request())
        guards.memory._min_free_bytes = 1 << 60
        with pytest.raises(CloudOverloaded):
            await generate(cloud, request())
        assert 0 < seen("duet_cloud_memory_free_bytes") < 1 << 60
        for what in ("places", "memory"):
            assert seen("duet_cloud_limited_total", what, "anybody") == 1
