"""Messages survive the wire, and what protobuf cannot check is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from shared.errors import InvalidRequest
from shared.messages import (
    Draft,
    Finished,
    FinishReason,
    Message,
    Open,
    Opened,
    Policy,
    Timings,
    Tokens,
    Usage,
    Verdict,
)
from shared.sampling import Sampling
from shared.vocab import TokenKind, Vocabulary

words = st.text("aé你👍\n", max_size=5)
uint32 = st.integers(0, 2**32 - 1)
ids = st.lists(uint32, max_size=5).map(tuple)
fractions = st.floats(0, 1)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e6),
    min_p=fractions,
    top_k=st.integers(1, 64),
    top_p=st.floats(0, 1, exclude_min=True),
)
prompts = ids.filter(len) | st.lists(st.builds(Message, words, words), min_size=1, max_size=3).map(tuple)

MESSAGES = {
    "open": st.builds(
        Open,
        prompt=prompts,
        sampling=samplings,
        seed=st.integers(0, 2**64 - 1),
        committed=ids,
        policy=st.sampled_from(Policy),
        rollback_threshold=st.none() | st.floats(0, 1e9, exclude_min=True),
        max_tokens=st.none() | st.integers(1, 2**32 - 1),
        predicted_length=st.none() | uint32,
        any_noise=st.booleans(),
    ),
    "opened": st.builds(
        Opened,
        model=words,
        prompt_token_ids=ids,
        end_token_ids=st.frozensets(uint32, max_size=3),
        sampling=samplings,
        max_tokens=uint32,
        max_draft_tokens=uint32,
        vocabulary_sha256=words,
        policy=st.sampled_from(Policy),
        rollback_threshold=st.none() | st.floats(0, 1e9, exclude_min=True),
        own_noise=st.booleans(),
    ),
    "draft": st.builds(Draft, uint32, uint32, ids, st.booleans()),
    "verdict": st.builds(
        Verdict,
        uint32,
        uint32,
        uint32,
        uint32,
        st.none() | uint32,
        st.builds(Timings, uint32, uint32),
        st.booleans(),
    ),
    "tokens": st.builds(Tokens, uint32, ids, st.lists(st.binary(max_size=4), max_size=5).map(tuple)),
    "finished": st.builds(
        Finished, st.sampled_from(FinishReason), st.builds(Usage, uint32, uint32, uint32, uint32)
    ),
    "sampling": samplings,
}


@pytest.mark.parametrize("kind", MESSAGES)
@given(data=st.data())
@settings(max_examples=30)
def test_a_message_comes_out_as_it_went_in(kind, data):
    message = data.draw(MESSAGES[kind])
    encode, decode = getattr(wire, f"encode_{kind}"), getattr(wire, f"decode_{kind}")
    encoded = encode(message)
    assert decode(type(encoded).FromString(encoded.SerializeToString())) == message


def test_every_message_has_its_round_trip_above():
    encoders = {name.removeprefix("encode_") for name in vars(wire) if name.startswith("encode_")}
    assert encoders == {*MESSAGES, "vocabulary"}


def test_a_vocabulary_keeps_pieces_that_are_no_text_and_its_fingerprint():
    kinds = [TokenKind.TEXT, TokenKind.SPECIAL, TokenKind.PADDING]
    vocabulary = Vocabulary("m", [b"\xff\xfe", b"<end>", b""], kinds)
    response = pb2.DescribeResponse(vocabulary=wire.encode_vocabulary(vocabulary))
    back = wire.decode_vocabulary("m", pb2.DescribeResponse.FromString(response.SerializeToString()))
    assert back == vocabulary
    assert back.sha256 == vocabulary.sha256


def request(**fields) -> pb2.Open:
    return pb2.Open(**{"prompt_token_ids": pb2.TokenIds(ids=[1]), **fields})


def test_fields_that_are_not_set_take_the_defaults():
    assert wire.decode_open(request()) == Open(prompt=(1,), sampling=Sampling(), seed=0)


def test_a_field_set_to_zero_is_set():
    with pytest.raises(InvalidRequest, match="top_k"):
        wire.decode_open(request(sampling=pb2.Sampling(top_k=0)))
    assert wire.decode_open(request(predicted_length=0)).predicted_length == 0


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        pytest.param(pb2.Open(), "prompt", id="no prompt"),
        pytest.param(pb2.Open(messages=pb2.Messages()), "prompt", id="a chat without messages"),
        pytest.param(pb2.Open(prompt_token_ids=pb2.TokenIds()), "prompt", id="a prompt of no tokens"),
        pytest.param(request(policy=99), "policy 99", id="a policy of a newer edge"),
        pytest.param(request(rollback_threshold=0.0), "rollback_threshold", id="rollback_threshold"),
        pytest.param(request(rollback_threshold=-1.0), "rollback_threshold", id="a distance below zero"),
        pytest.param(request(rollback_threshold=float("nan")), "rollback_threshold", id="no distance"),
        pytest.param(request(rollback_threshold=float("inf")), "rollback_threshold", id="endless"),
        pytest.param(request(limits=pb2.Limits(max_tokens=0)), "max_tokens", id="no tokens asked for"),
        pytest.param(request(sampling=pb2.Sampling(temperature=-1)), "temperature", id="temperature"),
        pytest.param(
            request(sampling=pb2.Sampling(temperature=float("nan"))), "temperature", id="not a number"
        ),
        pytest.param(request(sampling=pb2.Sampling(top_k=65)), "top_k", id="top_k"),
        pytest.param(request(sampling=pb2.Sampling(top_p=0)), "top_p", id="top_p"),
        pytest.param(request(sampling=pb2.Sampling(min_p=1.5)), "min_p", id="min_p"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_field(bad, field):
    with pytest.raises(InvalidRequest, match=field):
        wire.decode_open(bad)


def test_a_reason_of_a_newer_service_reads_as_a_cut():
    assert wire.decode_finished(pb2.Finished(reason=99)).reason is FinishReason.LENGTH
