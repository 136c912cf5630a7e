"""Between the wire and `shared.messages`: one function a message and direction, nothing decided.

Decoders check what protobuf cannot say and raise InvalidRequest naming the field.
"""

from __future__ import annotations

import math
import re
import uuid

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
from shared.shaping import NO_SHAPING, Shaping
from shared.vocab import TokenKind, Vocabulary

_FINISH = {
    FinishReason.STOP: pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb2.FINISH_REASON_LENGTH,
    FinishReason.DRAIN: pb2.FINISH_REASON_DRAIN,
}
_FINISH_BACK = {wire: reason for reason, wire in _FINISH.items()}
POLICY = {
    Policy.LOSSLESS: pb2.POLICY_LOSSLESS,
    Policy.BILD: pb2.POLICY_BILD,
    Policy.JUDGE: pb2.POLICY_JUDGE,
}
_POLICY_BACK = {wire: policy for policy, wire in POLICY.items()} | {pb2.POLICY_UNSPECIFIED: Policy.LOSSLESS}
_KIND = {
    TokenKind.PADDING: pb2.TOKEN_KIND_UNSPECIFIED,
    TokenKind.TEXT: pb2.TOKEN_KIND_TEXT,
    TokenKind.SPECIAL: pb2.TOKEN_KIND_SPECIAL,
}

ERROR_KIND = "duet-error"
"""Trailing metadata with the class name of the error behind a status; see `shared.errors.from_status`."""

SESSION = "duet-session"
"""Metadata of a call with a name for its chat, for balancers; see `shared.affinity`."""

REQUEST_ID = "duet-request-id"
"""Metadata of a call: the name of the request that it serves, in the logs of both sides."""

RETRY_AFTER_MS = "retry-after-ms"
"""Trailing metadata with the milliseconds after which it is worth asking again."""

MAX_REQUEST_BYTES = 4 * 2**20
"""What a service takes from an edge at once: more than the text of any context."""

_REQUEST_ID_FORM = re.compile(r"[\w.:-]{1,64}", re.ASCII)

MAX_MESSAGE_BYTES = 32 * 2**20
"""A whole vocabulary is the largest message: 262k tokens are about 4 MB."""


def request_id(given: object) -> str:
    """The caller's name for a request, where it is one that may stand in a log; otherwise a new one."""
    return given if isinstance(given, str) and _REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex


def encode_open(message: Open) -> pb2.Open:
    wire = pb2.Open(
        committed=message.committed,
        sampling=encode_sampling(message.sampling),
        seed=message.seed,
        policy=POLICY[message.policy],
        rollback_threshold=message.rollback_threshold,
        limits=pb2.Limits(max_tokens=message.max_tokens),
        predicted_length=message.predicted_length,
        any_noise=message.any_noise,
    )
    if message.shaping != NO_SHAPING:
        wire.shaping.CopyFrom(_encode_shaping(message.shaping))
    if message.prompt and isinstance(message.prompt[0], Message):
        chat = (m for m in message.prompt if isinstance(m, Message))
        wire.messages.CopyFrom(
            pb2.Messages(messages=[pb2.Message(role=m.role, content=m.content) for m in chat])
        )
    else:
        wire.prompt_token_ids.CopyFrom(pb2.TokenIds(ids=[t for t in message.prompt if isinstance(t, int)]))
    return wire


def decode_open(wire: pb2.Open) -> Open:
    prompt: tuple[Message, ...] | tuple[int, ...]
    if wire.WhichOneof("prompt") == "messages":
        prompt = tuple(Message(m.role, m.content) for m in wire.messages.messages)
    else:
        prompt = tuple(wire.prompt_token_ids.ids)
    if not prompt:
        raise InvalidRequest("the prompt is empty")
    if wire.limits.HasField("max_tokens") and wire.limits.max_tokens == 0:
        raise InvalidRequest("limits.max_tokens must be 1 or more")
    if wire.HasField("rollback_threshold") and not 0.0 < wire.rollback_threshold < math.inf:
        raise InvalidRequest(
            f"rollback_threshold must be above 0 nats and finite, got {wire.rollback_threshold!r}"
        )
    return Open(
        prompt=prompt,
        committed=tuple(wire.committed),
        sampling=decode_sampling(wire.sampling),
        seed=wire.seed,
        policy=_decode_policy(wire.policy),
        rollback_threshold=wire.rollback_threshold if wire.HasField("rollback_threshold") else None,
        max_tokens=wire.limits.max_tokens if wire.limits.HasField("max_tokens") else None,
        predicted_length=wire.predicted_length if wire.HasField("predicted_length") else None,
        shaping=_decode_shaping(wire),
        any_noise=wire.any_noise,
    )


def _decode_policy(wire: pb2.Policy) -> Policy:
    if wire not in _POLICY_BACK:
        raise InvalidRequest(f"policy {wire} is not known to this side; update it, or use lossless")
    return _POLICY_BACK[wire]


def _encode_shaping(shaping: Shaping) -> pb2.Shaping:
    return pb2.Shaping(
        presence_penalty=shaping.presence_penalty,
        frequency_penalty=shaping.frequency_penalty,
        repetition_penalty=shaping.repetition_penalty,
        logit_bias=dict(shaping.logit_bias),
        json_schema=shaping.json_schema,
        grammar=shaping.grammar,
    )


def _decode_shaping(wire: pb2.Open | pb2.Opened) -> Shaping:
    shaping = {field.name: value for field, value in wire.ListFields()}.get("shaping")
    if shaping is None:
        return NO_SHAPING
    asked = {field.name: value for field, value in shaping.ListFields()}
    return Shaping(**asked | {"logit_bias": tuple(sorted(shaping.logit_bias.items()))})


def encode_sampling(sampling: Sampling) -> pb2.Sampling:
    return pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def decode_sampling(wire: pb2.Sampling) -> Sampling:
    """Unset fields take the defaults of `Sampling`."""
    return Sampling(**{field.name: value for field, value in wire.ListFields()})


def encode_opened(message: Opened) -> pb2.Opened:
    wire = pb2.Opened(
        model=message.model,
        prompt_token_ids=message.prompt_token_ids,
        end_token_ids=sorted(message.end_token_ids),
        sampling=encode_sampling(message.sampling),
        max_tokens=message.max_tokens,
        max_draft_tokens=message.max_draft_tokens,
        vocabulary_sha256=message.vocabulary_sha256,
        policy=POLICY[message.policy],
        rollback_threshold=message.rollback_threshold,
        own_noise=message.own_noise,
    )
    if message.shaping != NO_SHAPING:
        wire.shaping.CopyFrom(_encode_shaping(message.shaping))
    return wire


def decode_opened(wire: pb2.Opened) -> Opened:
    return Opened(
        model=wire.model,
        prompt_token_ids=tuple(wire.prompt_token_ids),
        end_token_ids=frozenset(wire.end_token_ids),
        sampling=decode_sampling(wire.sampling),
        max_tokens=wire.max_tokens,
        max_draft_tokens=wire.max_draft_tokens,
        vocabulary_sha256=wire.vocabulary_sha256,
        policy=_decode_policy(wire.policy),
        rollback_threshold=wire.rollback_threshold if wire.HasField("rollback_threshold") else None,
        shaping=_decode_shaping(wire),
        own_noise=wire.own_noise,
    )


def encode_draft(message: Draft) -> pb2.Draft:
    return pb2.Draft(epoch=message.epoch, start=message.start, token_ids=message.token_ids, more=message.more)


def decode_draft(wire: pb2.Draft) -> Draft:
    return Draft(wire.epoch, wire.start, tuple(wire.token_ids), wire.more)


def encode_verdict(message: Verdict) -> pb2.Verdict:
    return pb2.Verdict(
        epoch=message.epoch,
        start=message.start,
        num_scored=message.num_scored,
        num_accepted=message.num_accepted,
        next_token=message.next_token,
        timings=pb2.Timings(queue_us=message.timings.queue_us, verify_us=message.timings.verify_us),
        stream_instead=message.stream_instead,
    )


def decode_verdict(wire: pb2.Verdict) -> Verdict:
    return Verdict(
        wire.epoch,
        wire.start,
        wire.num_scored,
        wire.num_accepted,
        wire.next_token if wire.HasField("next_token") else None,
        Timings(wire.timings.queue_us, wire.timings.verify_us),
        wire.stream_instead,
    )


def encode_tokens(message: Tokens) -> pb2.Tokens:
    return pb2.Tokens(start=message.start, token_ids=message.token_ids, pieces=message.pieces)


def decode_tokens(wire: pb2.Tokens) -> Tokens:
    return Tokens(wire.start, tuple(wire.token_ids), tuple(wire.pieces))


def encode_finished(message: Finished) -> pb2.Finished:
    usage = message.usage
    return pb2.Finished(
        reason=_FINISH[message.reason],
        usage=pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            rounds=usage.rounds,
            target_tokens=usage.target_tokens,
        ),
    )


def decode_finished(wire: pb2.Finished) -> Finished:
    usage = wire.usage
    return Finished(
        _FINISH_BACK.get(wire.reason, FinishReason.LENGTH),
        Usage(usage.prompt_tokens, usage.completion_tokens, usage.rounds, usage.target_tokens),
    )


def encode_vocabulary(vocabulary: Vocabulary) -> list[pb2.VocabularyEntry]:
    return [
        pb2.VocabularyEntry(piece=piece, kind=_KIND[kind])
        for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True)
    ]


def decode_vocabulary(name: str, wire: pb2.DescribeResponse) -> Vocabulary:
    return Vocabulary(name, [e.piece for e in wire.vocabulary], [TokenKind(e.kind) for e in wire.vocabulary])
