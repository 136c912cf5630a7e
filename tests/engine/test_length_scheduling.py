"""Admission by predicted length on a real service: order, run-away answers, predictions without sense."""

from __future__ import annotations

import asyncio
import struct
from contextlib import aclosing

import grpc
import pytest

from edge_agent.remote import Meter
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from tests.service import (
    Completion,
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    generate,
    in_process_cloud,
    loaded_edge,
    speculate,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

MAX_TOKENS = 32


def request(question: str, predicted_length: int | None, max_tokens: int = MAX_TOKENS) -> Open:
    return Open(
        prompt=(Message("user", question),),
        sampling=Sampling(temperature=1.0),
        seed=7,
        max_tokens=max_tokens,
        predicted_length=predicted_length,
    )


def counted(service: InProcessCloud, name: str) -> float:
    value = service.servicer.metrics.registry.get_sample_value(f"duet_cloud_{name}_total")
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("admission", "went"),
    [
        ("first-come", ["long", "unsaid", "short", "middle"]),
        ("shortest", ["short", "middle", "long", "unsaid"]),
    ],
)
async def test_who_waits_goes_in_the_order_that_is_set(
    tiny_pair: TinyPair, admission: str, went: list[str]
) -> None:
    predictions = {"long": 30, "unsaid": None, "short": 4, "middle": 9}
    began: list[str] = []
    # Of several places one is free: ageing lets as many as there are places overtake.
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=4, admission=admission) as service,
        connection(service.address) as cloud,
    ):
        places = service.servicer._guards.places

        async def ask(name: str, predicted: int | None) -> None:
            async with aclosing(cloud.generate(request(name, predicted), Meter())) as messages:
                async for message in messages:
                    if isinstance(message, Tokens) and name not in began:
                        began.append(name)

        tasks = []
        async with places.place("a"), places.place("b"), places.place("c"):
            async with places.place("d"):
                for number, (name, predicted) in enumerate(predictions.items(), start=1):
                    tasks.append(asyncio.create_task(ask(name, predicted)))
                    await eventually(lambda n=number: places.num_waiting == n)
            await asyncio.gather(*tasks)
        assert service.is_idle
    assert began == went


@pytest.mark.parametrize("mode", ["generate", "speculate"])
async def test_an_answer_far_longer_than_predicted_lets_others_go_first_and_keeps_its_text(
    tiny_pair: TinyPair, alone: TargetAlone, mode: str
) -> None:
    runaway, other = request("Tell me a story.", 5), request("Count to nine.", 20)
    ended: list[str] = []
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, admission="shortest", step_s=0.002) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        loaded_edge(tiny_pair.draft_gguf) as other_edge,
        connection(service.address) as cloud,
    ):

        async def ask(name: str, asked: Open, model: object) -> Completion:
            if mode == "generate":
                made = await generate(cloud, asked)
            else:
                made = await speculate(model, cloud, asked, max_draft_tokens=3)
            ended.append(name)
            return made

        first = asyncio.create_task(ask("runaway", runaway, edge))
        await eventually(lambda: service.target.num_free_slots == 0)
        second = asyncio.create_task(ask("other", other, other_edge))
        assert (await first).token_ids == alone.complete(runaway)
        assert (await second).token_ids == alone.complete(other)
        assert ended == ["other", "runaway"]
        assert counted(service, "requeued_streams") >= 1
        await eventually(lambda: service.is_idle)


async def test_without_anybody_waiting_an_answer_keeps_its_place(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, admission="shortest") as service,
        connection(service.address) as cloud,
    ):
        asked = request("Tell me a story.", 1)
        assert (await generate(cloud, asked)).token_ids == alone.complete(asked)
        assert counted(service, "requeued_streams") == 0


async def test_at_first_come_predictions_change_nothing(tiny_pair: TinyPair, alone: TargetAlone) -> None:
    asked = [request(f"Count to {n}.", 1 + n % 3) for n in range(6)]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1) as service,
        connection(service.address) as cloud,
    ):
        made = await asyncio.gather(*(generate(cloud, each) for each in asked))
        assert [each.token_ids for each in made] == [alone.complete(each) for each in asked]
        assert counted(service, "requeued_streams") == 0


async def test_many_answers_that_run_away_all_end_with_their_own_text(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    asked = [request(f"Count to {n}.", 1 + n % 5) for n in range(12)]
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=2, admission="shortest") as service,
        connection(service.address) as cloud,
    ):
        made = await asyncio.gather(*(generate(cloud, each) for each in asked))
        assert [each.token_ids for each in made] == [alone.complete(each) for each in asked]
        # Each gives way at lengths that triple: few times, whatever the prediction.
        assert 0 < counted(service, "requeued_streams") <= len(asked) * MAX_TOKENS.bit_length()
        assert service.is_idle


async def test_who_hangs_up_while_waiting_again_leaves_nothing(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, admission="shortest", step_s=0.005) as service,
        connection(service.address) as cloud,
    ):
        runaway = asyncio.create_task(generate(cloud, request("Tell me a story.", 1, max_tokens=200)))
        await eventually(lambda: service.target.num_free_slots == 0)
        other = asyncio.create_task(generate(cloud, request("Count to nine.", 100, max_tokens=150)))
        await eventually(lambda: counted(service, "requeued_streams") == 1)
        runaway.cancel()
        await asyncio.gather(runaway, return_exceptions=True)
        await other
        await eventually(lambda: service.is_idle)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize(
    ("field", "is_clamped"),
    [
        pytest.param(varint(8 << 3) + varint(20), False, id="a prediction"),
        pytest.param(varint(8 << 3) + varint(0), True, id="zero"),
        pytest.param(varint(8 << 3) + varint(2**64 - 5), True, id="a negative number, as protobuf writes it"),
        pytest.param(varint(8 << 3) + varint(2**32 - 1), True, id="huge"),
        pytest.param(varint(8 << 3 | 1) + struct.pack("<d", float("nan")), False, id="a NaN: no such field"),
    ],
)
async def test_a_prediction_without_sense_is_clamped_counted_and_harmless(
    tiny_pair: TinyPair, alone: TargetAlone, field: bytes, is_clamped: bool
) -> None:
    asked = request("Tell me a story.", None)
    message = wire.encode_open(asked).SerializeToString() + field
    raw = pb2.GenerateRequest.DESCRIPTOR.fields_by_name["open"].number
    body = varint(raw << 3 | 2) + varint(len(message)) + message
    async with (
        in_process_cloud(tiny_pair.target_gguf, admission="shortest") as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        call = channel.unary_stream(
            "/duet.v1.SpeculationService/Generate", response_deserializer=pb2.GenerateResponse.FromString
        )
        token_ids = [token async for response in call(body) for token in response.tokens.token_ids]
        assert token_ids == alone.complete(asked)
        assert counted(service, "clamped_predictions") == is_clamped
