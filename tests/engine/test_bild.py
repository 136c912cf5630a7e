"""Policy bild on the tiny pair: what stands, what it saves, and how a stream ends where numbers are bad."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud_service.targets.base import Scores
from edge_agent.agent import Agent
from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Meter
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.config import EdgeConfig
from shared.errors import CloudFailed, ModelUnsupported
from shared.events import Answer, Notice
from shared.llama import Extension
from shared.messages import Draft, Message, Open, Policy, Verdict
from shared.policies import DEFAULT_ROLLBACK_THRESHOLD
from shared.sampling import Sampling
from shared.session import Origin
from shared.stopping import TopProbBelow
from tests.scripted_target import ScriptedTarget
from tests.service import (
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    generate,
    in_process_cloud,
    loaded_edge,
    run_duet,
    running_cloud,
    serving,
    speculate,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

MAX_TOKENS = 40
DRAFT = 4
QUESTIONS = ("Tell me a story.", "Nine stones?", "while x:\n  print(x)", "été 👍")
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.9))
ANYTHING = 1e6
"""Nats: no token of a softmax is so far away."""


def bild(question: str = QUESTIONS[0], threshold: float | None = 2.0, **fields: Any) -> Open:
    defaults: dict[str, Any] = {"sampling": Sampling(), "seed": 5, "max_tokens": MAX_TOKENS}
    return Open(
        prompt=(Message("user", question),),
        policy=Policy.BILD,
        rollback_threshold=threshold,
        **(defaults | fields),
    )


# What stands


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_next_to_no_threshold_gives_the_targets_own_text(
    tiny_pair: TinyPair, alone: TargetAlone, sampling: Sampling
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for question in QUESTIONS:
            request = bild(question, threshold=1e-9, sampling=sampling)
            done = await speculate(edge, cloud, request, DRAFT)
            assert done.token_ids == alone.complete(request)


async def test_without_a_threshold_the_edges_drafts_stand_whole_and_nothing_is_corrected(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        lossy = 0
        for question in QUESTIONS:
            request = bild(question, threshold=ANYTHING)
            done = await speculate(edge, cloud, request, DRAFT)
            assert done.num_accepted == done.num_drafted
            assert set(done.origins) <= {Origin.ACCEPTED, Origin.BONUS}
            await _check_edges_own(edge, request, done.token_ids, done.origins)
            lossy += done.token_ids != alone.complete(request)
        assert lossy


async def _check_edges_own(
    edge: EdgeModel, request: Open, token_ids: Sequence[int], origins: Sequence[Origin]
) -> None:
    """Each accepted token is what the edge model goes on with after the text before it."""
    prompt = edge.model.render_chat([part for part in request.prompt if isinstance(part, Message)])
    drafter = LlamaDrafter(edge)
    for i, origin in enumerate(origins):
        if origin is Origin.ACCEPTED:
            text = [*prompt, *token_ids[:i]]
            [proposal] = await drafter.propose(
                text, 1, sampling=request.sampling, seed=request.seed, start=i, end_token_ids=()
            )
            assert proposal.token_id == token_ids[i]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_each_token_is_likely_enough_to_the_target_or_its_own_and_passes_are_saved(
    tiny_pair: TinyPair, alone: TargetAlone, sampling: Sampling
) -> None:
    threshold = 2.0
    passes = {Policy.LOSSLESS: 0, Policy.BILD: 0}
    tolerated = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for question in QUESTIONS:
            request = bild(question, threshold, sampling=sampling)
            done = await speculate(edge, cloud, request, DRAFT)
            passes[Policy.BILD] += done.num_rounds
            judged = alone.judged(request, done.token_ids)
            for token, origin, (own, logprob) in zip(done.token_ids, done.origins, judged, strict=True):
                if origin is Origin.ACCEPTED:
                    assert token == own or -logprob <= threshold + 1e-3
                    tolerated += token != own
                else:
                    assert token == own
            lossless = replace(request, policy=Policy.LOSSLESS)
            passes[Policy.LOSSLESS] += (await speculate(edge, cloud, lossless, DRAFT)).num_rounds
    assert tolerated
    assert passes[Policy.BILD] < passes[Policy.LOSSLESS]


async def test_a_resume_at_a_verdict_goes_on_with_the_same_text(tiny_pair: TinyPair) -> None:
    request = bild()
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        whole = await speculate(edge, cloud, request, DRAFT)
        own = [i + 1 for i, origin in enumerate(whole.origins) if origin is not Origin.ACCEPTED]
        assert len(own) > 2
        for end in own[:-1]:
            resumed = replace(request, committed=tuple(whole.token_ids[:end]))
            rest = await speculate(edge, cloud, resumed, DRAFT)
            assert rest.token_ids == whole.token_ids[end:]


async def test_drafts_in_flight_stand_whatever_passes_they_share(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    request = bild(threshold=ANYTHING)
    wrong = alone.model.render_chat([Message("user", "abcd")])[-4:]
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        connection(service.address) as cloud,
        cloud.speculate(request, Meter()) as stream,
    ):
        for i, token in enumerate(wrong):
            await stream.send(Draft(0, i, (token,), more=i < len(wrong) - 1))
        verdicts: list[Verdict] = []
        while sum(verdict.num_scored for verdict in verdicts) < len(wrong):
            verdict = await stream.receive()
            assert isinstance(verdict, Verdict)
            verdicts.append(verdict)
    assert [verdict.epoch for verdict in verdicts] == [0] * len(verdicts)
    starts = [0, *accumulate(verdict.num_scored for verdict in verdicts)]
    assert [verdict.start for verdict in verdicts] == starts[:-1]
    assert all(verdict.num_accepted == verdict.num_scored for verdict in verdicts)
    assert verdicts[-1].next_token is not None


# When the edge asks instead of drafting


async def test_an_edge_that_is_never_sure_enough_drafts_nothing(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    request = bild(threshold=ANYTHING)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        done = await speculate(edge, cloud, request, DRAFT, stop_below=1.0)
    assert done.num_drafted == 0
    assert done.token_ids == alone.complete(request)


async def test_a_draft_ends_before_the_first_token_that_the_edge_is_unsure_of(tiny_pair: TinyPair) -> None:
    async with loaded_edge(tiny_pair.draft_gguf) as edge:
        prompt = edge.model.render_chat([Message("user", QUESTIONS[0])])
        drafter = LlamaDrafter(edge)
        options: dict[str, Any] = {"sampling": Sampling(), "seed": 0, "start": 0, "end_token_ids": ()}
        whole = await drafter.propose(prompt, 16, **options)
        probs = [proposal.prob for proposal in whole if proposal.prob is not None]
        for stop_below in (0.0, *sorted(probs)[::4], 1.0):
            sure = next((i for i, p in enumerate(probs) if p < stop_below), len(probs))
            drafted = await drafter.propose(prompt, 16, **options, stop=TopProbBelow(stop_below))
            assert drafted == whole[:sure]


# What is in force


async def opened_as(service: InProcessCloud, request: pb2.Open) -> pb2.Opened:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = pb2_grpc.SpeculationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Speculate()
        await call.write(pb2.SpeculateRequest(open=request))
        response = await call.read()
        call.cancel()
        return response.opened


def raw(**fields: Any) -> pb2.Open:
    return pb2.Open(prompt_token_ids=pb2.TokenIds(ids=[65]), **fields)


async def test_opened_says_which_policy_and_threshold_are_in_force(tiny_pair: TinyPair) -> None:
    async with in_process_cloud(tiny_pair.target_gguf) as service:
        opened = await opened_as(service, raw(policy=pb2.POLICY_BILD, rollback_threshold=2.5))
        assert (opened.policy, opened.rollback_threshold) == (pb2.POLICY_BILD, 2.5)
        opened = await opened_as(service, raw(policy=pb2.POLICY_BILD))
        assert opened.rollback_threshold == DEFAULT_ROLLBACK_THRESHOLD
        opened = await opened_as(service, raw(rollback_threshold=2.5))
        assert opened.policy == pb2.POLICY_LOSSLESS
        assert not opened.HasField("rollback_threshold")


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_threshold_out_of_range_is_refused_in_one_line(tiny_pair: TinyPair, threshold: float) -> None:
    async with in_process_cloud(tiny_pair.target_gguf) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened_as(service, raw(policy=pb2.POLICY_BILD, rollback_threshold=threshold))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details()
        assert details is not None
        assert "rollback_threshold" in details
        assert "\n" not in details
        await eventually(lambda: service.is_idle)


@pytest.mark.parametrize("lossy", [True, False])
async def test_describe_lists_the_policies(tiny_pair: TinyPair, lossy: bool) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, lossy_policies=lossy) as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        stub = pb2_grpc.SpeculationServiceStub(channel)  # type: ignore[no-untyped-call]
        described = await stub.Describe(pb2.DescribeRequest())
    assert list(described.policies) == [pb2.POLICY_LOSSLESS, *[pb2.POLICY_BILD] * lossy]


async def test_a_service_that_grants_no_lossy_policy_says_so_and_stays_lossless(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    config = EdgeConfig(
        mode="speculate",
        policy=Policy.BILD,
        rollback_threshold=ANYTHING,
        max_tokens=MAX_TOKENS,
        seed=5,
    )
    async with (
        in_process_cloud(tiny_pair.target_gguf, lossy_policies=False) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        events = [event async for event in Agent(config, edge=edge, cloud=cloud).ask(QUESTIONS[0])]
    [notice] = [event for event in events if isinstance(event, Notice)]
    assert "bild" in notice.message
    assert "lossless" in notice.message
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert answer.policy is Policy.LOSSLESS
    assert [token.id for token in answer.tokens] == alone.complete(bild())


async def test_the_answer_says_which_policy_made_it_and_how_many_passes(tiny_pair: TinyPair) -> None:
    config = EdgeConfig(
        mode="speculate",
        policy=Policy.BILD,
        rollback_threshold=ANYTHING,
        max_draft_tokens=DRAFT,
        proactive=False,
        max_tokens=MAX_TOKENS,
    )
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        events = [event async for event in Agent(config, edge=edge, cloud=cloud).ask(QUESTIONS[0])]
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert answer.policy is Policy.BILD
    assert answer.target_passes == answer.rounds
    assert answer.rounds <= -(-answer.completion_tokens // (DRAFT + 1)) + 1


async def test_the_targets_own_stream_is_the_same_whatever_policy_is_asked(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    request = bild(threshold=ANYTHING)
    async with in_process_cloud(tiny_pair.target_gguf) as service, connection(service.address) as cloud:
        assert (await generate(cloud, request)).token_ids == alone.complete(request)


# Numbers that are no distribution


def spoil(context: Any, sequence: int, value: float, gate: threading.Event | None = None) -> None:
    """One sequence's logits hold `value` from now on.

    Args:
        gate: passes wait until it is set.
    """
    decode = context.decode

    def spoiled(work: Sequence[Extension]) -> Any:
        if gate is not None:
            gate.wait()
        rows = decode(work)
        for extension, logits in zip(work, rows, strict=True):
            for row in logits if extension.sequence == sequence else ():
                row[7] = value
        return rows

    context.decode = spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_target_that_gives_no_number_ends_the_stream_and_frees_its_slot(
    tiny_pair: TinyPair, value: float
) -> None:
    async with in_process_cloud(tiny_pair.target_gguf) as service, connection(service.address) as cloud:
        spoil(service.context, 0, value)  # the slot that the first stream takes
        async with cloud.speculate(bild(), Meter()) as stream:
            await stream.send(Draft(0, 0, (65, 66), more=False))
            with pytest.raises(CloudFailed, match="the target failed: the model gave") as caught:
                await stream.receive()
            assert "\n" not in str(caught.value)
        await eventually(lambda: service.is_idle)
        with pytest.raises(CloudFailed, match="the target failed: the model gave"):
            await generate(cloud, bild())
        await eventually(lambda: service.is_idle)


async def test_a_stream_without_numbers_does_not_fail_those_of_the_same_pass(tiny_pair: TinyPair) -> None:
    gate = threading.Event()
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        service.target.sequence([65]) as sick,
        service.target.sequence([66]) as healthy,
        service.target.sequence([67]) as first,
    ):
        spoil(service.context, 0, float("nan"), gate)
        scores = []
        for i, sequence in enumerate((first, sick, healthy)):  # the last two wait for the first one's pass
            scores.append(asyncio.create_task(sequence.score([65 + i, 70], num_rows=1, width=1)))
            await eventually(lambda i=i: service.target.num_jobs == i + 1)
        gate.set()
        outcomes = await asyncio.gather(*scores, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Scores, CloudFailed, Scores]


async def test_a_row_that_sums_to_more_than_one_ends_the_stream_and_frees_its_sequence() -> None:
    target = ScriptedTarget(lambda text: 1, probability=2.0)
    async with serving(target) as (address, servicer), connection(address) as cloud:
        async with cloud.speculate(bild(), Meter()) as stream:
            await stream.send(Draft(0, 0, (1,), more=False))
            with pytest.raises(CloudFailed, match="probabilities that sum to 2, not to one"):
                await stream.receive()
        await eventually(lambda: target.open_sequences == 0 and servicer.num_streams == 0)


async def test_an_edge_model_that_gives_no_number_ends_the_stream_on_both_sides(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        spoil(edge.context, 0, float("nan"))
        with pytest.raises(ModelUnsupported, match="draft does not work here: the model gave") as caught:
            await speculate(edge, cloud, bild(), DRAFT)
        assert "\n" not in str(caught.value)
        await eventually(lambda: service.is_idle)


def test_a_command_may_ask_for_it(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=512) as service:
        done = run_duet(
            *("ask", "hello", "--json", "--mode", "speculate", "--cloud", service.address),
            *("--model", str(tiny_pair.draft_gguf), "--max-tokens", "12"),
            *("--policy", "bild", "--rollback-threshold", "4", "--fallback-threshold", "0.1"),
            folder=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    assert b'"policy": "bild"' in done.stdout
    assert done.stderr == b""
