"""What a client may rely on when it talks to the service over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_agent.remote import Cloud, Meter, SpeculateStream
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.errors import CloudOverloaded, CloudUnavailable
from shared.messages import Draft, Finished, FinishReason, Message, Open, Verdict
from shared.sampling import Sampling
from shared.vocab import TokenKind
from tests.service import (
    CONTEXT_TOKENS,
    RunningServer,
    TargetAlone,
    connection,
    eventually,
    generate,
    in_process_cloud,
    loaded_edge,
    running_cloud,
    speculate,
)
from tests.tiny_pair import (
    DRAFT_PERTURBATION,
    NUM_TOKENS,
    PADDED_VOCAB_SIZE,
    TARGET_SEED,
    TinyPair,
    write_tiny_model,
)

pytestmark = pytest.mark.engine

SERVICE = "duet.v1.SpeculationService"
STATUS = health_pb2.HealthCheckResponse


def request(question: str = "Tell me a story.", **fields: Any) -> Open:
    defaults: dict[str, Any] = {"sampling": Sampling(), "seed": 0, "max_tokens": 24}
    return Open(prompt=(Message("user", question),), **(defaults | fields))


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=CONTEXT_TOKENS) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def channel(service: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> pb2_grpc.SpeculationServiceStub:
    return pb2_grpc.SpeculationServiceStub(channel)


class HeldStream:
    """A stream whose edge asks for one token at a time, so that the test says when it goes on."""

    def __init__(self, stream: SpeculateStream) -> None:
        self._stream = stream
        self._epoch = 0
        self.committed: list[int] = []

    async def step(self) -> Finished | None:
        """Ask for the next token; gives what ended the stream instead."""
        await self._stream.send(Draft(self._epoch, len(self.committed), (), more=False))
        return await self.receive()

    async def receive(self) -> Finished | None:
        message = await self._stream.receive()
        if isinstance(message, Finished):
            return message
        assert isinstance(message, Verdict)
        assert message.next_token is not None
        self.committed.append(message.next_token)
        return None


@asynccontextmanager
async def held_stream(cloud: Cloud, opening: Open) -> AsyncIterator[HeldStream]:
    async with cloud.speculate(opening, Meter()) as stream:
        held = HeldStream(stream)
        assert await held.step() is None
        yield held


# What is served


def test_describe_names_the_model_its_limits_and_its_ends(
    stub: pb2_grpc.SpeculationServiceStub, alone: TargetAlone
) -> None:
    described = stub.Describe(pb2.DescribeRequest())
    assert described.model == "target"
    assert described.target == "llama-cpp"
    assert described.context_tokens == CONTEXT_TOKENS
    assert described.max_draft_tokens == 32
    assert described.vocabulary_sha256 == alone.model.vocabulary.sha256
    assert set(described.end_token_ids) == alone.model.end_token_ids
    assert not described.vocabulary


def test_describe_gives_the_whole_vocabulary_on_request(
    stub: pb2_grpc.SpeculationServiceStub, alone: TargetAlone
) -> None:
    described = stub.Describe(pb2.DescribeRequest(include_vocabulary=True))
    vocabulary = wire.decode_vocabulary("target", described)
    assert vocabulary.sha256 == described.vocabulary_sha256 == alone.model.vocabulary.sha256
    assert len(vocabulary.pieces) == PADDED_VOCAB_SIZE
    assert set(vocabulary.kinds[NUM_TOKENS:]) == {TokenKind.PADDING}


@pytest.mark.parametrize("name", ["", SERVICE])
def test_a_service_that_answers_is_healthy(channel: grpc.Channel, name: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == STATUS.SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection.ServerReflectionInfo(iter([asked]))
    assert SERVICE in {listed.name for listed in answer.list_services_response.service}


# Streams that end early


@pytest.mark.parametrize("slots", [1, 3])
async def test_a_cancelled_generation_frees_its_slot_and_costs_nothing_more(
    tiny_pair: TinyPair, slots: int
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=slots, step_s=0.02) as service,
        connection(service.address) as cloud,
    ):
        tokens = cloud.generate(request(max_tokens=400), Meter())
        for _ in range(3):
            await anext(tokens)
        assert service.target.num_free_slots == slots - 1
        await tokens.aclose()
        await eventually(lambda: service.is_idle)
        assert service.context.num_decoded_tokens < 100
        assert (await generate(cloud, request(max_tokens=2))).token_ids  # the slot works


async def test_a_cancelled_speculation_frees_its_slot(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1) as service,
        connection(service.address) as cloud,
    ):
        async with held_stream(cloud, request()):
            assert service.target.num_free_slots == 0
        await eventually(lambda: service.is_idle)


async def test_an_edge_that_hangs_up_frees_its_slot(tiny_pair: TinyPair) -> None:
    async with in_process_cloud(tiny_pair.target_gguf, slots=2, step_s=0.02) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = pb2_grpc.SpeculationServiceStub(channel)
            speculation = stub.Speculate()
            await speculation.write(pb2.SpeculateRequest(open=wire.encode_open(request())))
            await speculation.read()
            generation = stub.Generate(pb2.GenerateRequest(open=wire.encode_open(request(max_tokens=400))))
            await generation.read()
            await generation.read()
            await eventually(lambda: service.target.num_free_slots == 0)
        await eventually(lambda: service.is_idle)


async def test_an_edge_that_stops_sending_ends_the_stream(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        call = pb2_grpc.SpeculationServiceStub(channel).Speculate()
        await call.write(pb2.SpeculateRequest(open=wire.encode_open(request())))
        assert (await call.read()).WhichOneof("message") == "opened"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        await eventually(lambda: service.is_idle)


# What the service refuses


def opening(**fields: Any) -> pb2.Open:
    """A sound Open, with some fields replaced."""
    message = wire.encode_open(request())
    message.MergeFrom(pb2.Open(**fields))
    return message


def draft(**fields: Any) -> pb2.SpeculateRequest:
    return pb2.SpeculateRequest(draft=pb2.Draft(**fields))


def refusal(call: Iterator[Any]) -> tuple[str, str, str]:
    """Status, kind of error and message that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error = caught.value
    kind = dict(error.trailing_metadata()).get(wire.ERROR_KIND)
    assert "\n" not in error.details()
    assert "Traceback" not in error.details()
    return error.code().name, str(kind), error.details()


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([{"start": 3, "token_ids": [65]}], ("INVALID_ARGUMENT", "InvalidDraft", "expected 0")),
        ([{"epoch": 2, "token_ids": [65]}], ("ABORTED", "FutureEpoch", "epoch 2")),
        ([{"token_ids": [NUM_TOKENS]}], ("INVALID_ARGUMENT", "InvalidDraft", str(NUM_TOKENS))),
        ([{"token_ids": [2**31]}], ("INVALID_ARGUMENT", "InvalidDraft", str(2**31))),
        ([{"token_ids": [65] * 33}], ("INVALID_ARGUMENT", "InvalidDraft", "at most 32")),
        ([{"more": True}], ("INVALID_ARGUMENT", "InvalidDraft", "empty draft")),
    ],
    ids=["wrong-start", "future-epoch", "padding", "no-token", "too-many-tokens", "empty-with-more"],
)
def test_a_bad_draft_ends_the_stream_with_its_reason(
    stub: pb2_grpc.SpeculationServiceStub, drafts: list[dict[str, Any]], expected: tuple[str, str, str]
) -> None:
    messages = [pb2.SpeculateRequest(open=opening()), *(draft(**fields) for fields in drafts)]
    status, kind, message = refusal(stub.Speculate(iter(messages)))
    assert (status, kind) == expected[:2]
    assert expected[2] in message


def test_a_stream_begins_with_open(stub: pb2_grpc.SpeculationServiceStub) -> None:
    status, kind, message = refusal(stub.Speculate(iter([draft(token_ids=[65])])))
    assert (status, kind) == ("ABORTED", "UnexpectedMessage")
    assert "Open" in message


def test_a_stream_is_opened_once(stub: pb2_grpc.SpeculationServiceStub) -> None:
    twice = [pb2.SpeculateRequest(open=opening())] * 2
    assert refusal(stub.Speculate(iter(twice)))[:2] == ("ABORTED", "UnexpectedMessage")


def test_a_stream_without_any_message_is_an_error(stub: pb2_grpc.SpeculationServiceStub) -> None:
    assert refusal(stub.Speculate(iter([])))[:2] == ("ABORTED", "UnexpectedMessage")


BAD_OPENINGS = {
    "temperature": (opening(sampling=pb2.Sampling(temperature=-1)), "InvalidRequest", "temperature"),
    "nan": (opening(sampling=pb2.Sampling(temperature=float("nan"))), "InvalidRequest", "temperature"),
    "top-k-0": (opening(sampling=pb2.Sampling(top_k=0)), "InvalidRequest", "top_k"),
    "top-k-65": (opening(sampling=pb2.Sampling(top_k=65)), "InvalidRequest", "top_k"),
    "top-p": (opening(sampling=pb2.Sampling(top_p=0)), "InvalidRequest", "top_p"),
    "min-p": (opening(sampling=pb2.Sampling(min_p=1.5)), "InvalidRequest", "min_p"),
    "max-tokens": (opening(limits=pb2.Limits(max_tokens=0)), "InvalidRequest", "max_tokens"),
    "policy": (opening(policy=99), "InvalidRequest", "policy"),
    "no-prompt": (pb2.Open(), "InvalidRequest", "prompt"),
    "no-messages": (pb2.Open(messages=pb2.Messages()), "InvalidRequest", "prompt"),
    "prompt-id": (
        pb2.Open(prompt_token_ids=pb2.TokenIds(ids=[1, NUM_TOKENS])),
        "InvalidRequest",
        f"{NUM_TOKENS}",
    ),
    "committed-id": (opening(committed=[2**32 - 1]), "InvalidRequest", f"{2**32 - 1}"),
    "long-prompt": (
        pb2.Open(prompt_token_ids=pb2.TokenIds(ids=[65] * CONTEXT_TOKENS)),
        "PromptTooLong",
        f"{CONTEXT_TOKENS}",
    ),
}


@pytest.mark.parametrize("name", BAD_OPENINGS)
@pytest.mark.parametrize("call", ["speculate", "generate"])
def test_a_bad_open_is_refused_by_name(stub: pb2_grpc.SpeculationServiceStub, call: str, name: str) -> None:
    message, kind, word = BAD_OPENINGS[name]
    if call == "speculate":
        status, got, details = refusal(stub.Speculate(iter([pb2.SpeculateRequest(open=message)])))
    else:
        status, got, details = refusal(stub.Generate(pb2.GenerateRequest(open=message)))
    assert (status, got) == ("INVALID_ARGUMENT", kind)
    assert word in details


def test_the_service_lives_on_after_refusals(
    stub: pb2_grpc.SpeculationServiceStub, alone: TargetAlone
) -> None:
    messages = list(stub.Generate(pb2.GenerateRequest(open=wire.encode_open(request()))))
    made = [token for message in messages for token in message.tokens.token_ids]
    assert made == alone.complete(request())


# Leaving


async def serving_status(cloud: RunningServer) -> int:
    async with grpc.aio.insecure_channel(cloud.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        return int((await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status)


async def until_draining(cloud: RunningServer) -> None:
    deadline = time.monotonic() + 10
    while await serving_status(cloud) != STATUS.NOT_SERVING:
        assert time.monotonic() < deadline, "the service did not begin to drain"
        await asyncio.sleep(0.01)


async def test_a_service_that_is_told_to_leave_lets_running_streams_finish(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", drain_s=60) as service:
        async with (
            connection(service.address) as cloud,
            held_stream(cloud, request(max_tokens=8)) as stream,
        ):
            service.terminate()
            await until_draining(service)
            with pytest.raises(CloudUnavailable, match="shutting down"):
                await generate(cloud, request())
            while len(stream.committed) < 8:
                assert await stream.step() is None
            finished = await stream.receive()
            assert finished is not None
            assert finished.reason is FinishReason.LENGTH
            assert stream.committed == alone.complete(request(max_tokens=8))
        assert service.wait() == 0
    assert not any("Traceback" in line or "error" in line.lower() for line in service.log_lines)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "sampled"])
async def test_a_stream_that_is_handed_back_goes_on_elsewhere_with_the_same_text(
    tiny_pair: TinyPair, alone: TargetAlone, service: RunningServer, sampling: Sampling
) -> None:
    whole = request(sampling=sampling, seed=7)
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", drain_s=0) as leaving:
        async with connection(leaving.address) as cloud, held_stream(cloud, whole) as stream:
            for _ in range(4):
                assert await stream.step() is None
            leaving.terminate()
            finished = await stream.receive()
        assert leaving.wait() == 0
    assert finished is not None
    assert finished.reason is FinishReason.DRAIN
    assert finished.usage.completion_tokens == len(stream.committed) == 5
    resumed = request(sampling=sampling, seed=7, committed=tuple(stream.committed))
    async with connection(service.address) as cloud:
        rest = await generate(cloud, resumed)
    assert stream.committed + rest.token_ids == alone.complete(whole)


async def test_a_draft_sent_to_a_leaving_service_still_learns_that_the_stream_was_handed_back(
    tiny_pair: TinyPair,
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        connection(service.address) as cloud,
        held_stream(cloud, request()) as stream,
    ):
        drained = asyncio.create_task(service.servicer.drain(0))
        await eventually(lambda: service.target.num_free_slots == service.num_slots)
        finished = await stream.step()
        assert finished is not None
        assert finished.reason is FinishReason.DRAIN
    await drained


# Many at once


@pytest.mark.parametrize(
    ("edge_rows", "target_rows"), [(PADDED_VOCAB_SIZE + 32, PADDED_VOCAB_SIZE), (NUM_TOKENS, 320)]
)
async def test_models_whose_tables_are_padded_differently_work_together(
    tmp_path: Path, alone: TargetAlone, edge_rows: int, target_rows: int
) -> None:
    edge_model = write_tiny_model(
        tmp_path,
        name="edge",
        seed=TARGET_SEED,
        perturbation=DRAFT_PERTURBATION,
        padded_vocab_size=edge_rows,
    )
    target_model = write_tiny_model(tmp_path, name="big", seed=TARGET_SEED, padded_vocab_size=target_rows)
    async with (
        in_process_cloud(target_model.gguf) as service,
        loaded_edge(edge_model.gguf) as edge,
        connection(service.address) as cloud,
    ):
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            completion = await speculate(edge, cloud, request(sampling=sampling), 4)
            assert completion.token_ids == alone.complete(request(sampling=sampling))
            assert completion.num_accepted > 0


async def test_a_stream_waits_for_a_slot_and_a_full_queue_refuses(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, max_waiting_streams=1) as service,
        connection(service.address) as cloud,
    ):
        async with held_stream(cloud, request()):
            others = [asyncio.create_task(generate(cloud, request())) for _ in range(3)]
            await eventually(lambda: sum(task.done() for task in others) == 2)
            refused = [task for task in others if task.done()]
            [waiting] = [task for task in others if not task.done()]
            for task in refused:
                with pytest.raises(CloudOverloaded, match="slots are taken"):
                    task.result()
        assert (await waiting).token_ids == alone.complete(request())
        await eventually(lambda: service.is_idle)


async def test_a_stream_that_waited_too_long_is_refused(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, max_wait_s=0.2) as service,
        connection(service.address) as cloud,
    ):
        async with held_stream(cloud, request()):
            with pytest.raises(CloudOverloaded, match=r"within 0\.2 s"):
                await generate(cloud, request())
        await eventually(lambda: service.is_idle)


async def test_a_stream_that_is_cancelled_while_it_waits_leaves_the_queue(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1) as service,
        connection(service.address) as cloud,
    ):
        async with held_stream(cloud, request()):
            waiting = asyncio.create_task(generate(cloud, request()))
            await eventually(lambda: service.servicer.num_streams == 2)
            waiting.cancel()
            await eventually(lambda: service.servicer.num_streams == 1)
        await eventually(lambda: service.is_idle)


@pytest.mark.parametrize("slots", [8, 3])
async def test_eight_streams_at_once_get_what_each_gets_alone(
    tiny_pair: TinyPair, alone: TargetAlone, slots: int
) -> None:
    requests = [
        request(f"Count to {i}" + " and on" * i, sampling=Sampling(temperature=i % 2), seed=i)
        for i in range(8)
    ]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=slots) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        made = await asyncio.gather(
            *(
                generate(cloud, each) if i % 3 == 0 else speculate(edge, cloud, each, 1 + i)
                for i, each in enumerate(requests)
            )
        )
        assert [completion.token_ids for completion in made] == [alone.complete(each) for each in requests]
        await eventually(lambda: service.is_idle)


def test_a_stop_in_the_moment_the_address_is_announced_is_clean(tiny_pair: TinyPair) -> None:
    for _ in range(3):
        with running_cloud(tiny_pair.target_gguf) as cloud:
            assert cloud.stop() == 0
