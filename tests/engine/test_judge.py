"""Policy judge on the tiny pair: what stands, what is in force without a head, and what it leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_service.judging.head_file import write_head
from cloud_service.scheduling import PassCost
from edge_agent.agent import Agent
from shared.config import EdgeConfig
from shared.events import Answer, Notice
from shared.judge import JudgeHead
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.messages import Message, Open, Policy
from shared.models import file_sha256
from shared.sampling import Sampling
from shared.session import Origin
from tests.service import (
    CONTEXT_TOKENS,
    TargetAlone,
    connection,
    eventually,
    float32_target,
    generate,
    in_process_cloud,
    loaded_edge,
    run_duet,
    running_cloud,
    speculate,
    together,
)
from tests.tiny_pair import HIDDEN_SIZE, TinyPair

pytestmark = pytest.mark.engine

MAX_TOKENS = 40
DRAFT = 4
QUESTIONS = ("Tell me a story.", "Nine stones?", "while x:\n  print(x)", "été 👍")
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.9))


def head(*, bias: float = 0.0, weight: float = 0.0, sha256: str = "") -> JudgeHead:
    direction = np.random.default_rng(0).normal(size=HIDDEN_SIZE)
    return JudgeHead(model="target", model_sha256=sha256, weight=weight * direction, bias=bias, threshold=0.5)


ACCEPTS_ALL, REFUSES_ALL, SOME = head(bias=9.0), head(bias=-9.0), head(weight=1.0)


def judged(question: str = QUESTIONS[0], **fields: Any) -> Open:
    defaults: dict[str, Any] = {"sampling": Sampling(), "seed": 5, "max_tokens": MAX_TOKENS}
    return Open(prompt=(Message("user", question),), policy=Policy.JUDGE, **(defaults | fields))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_a_judge_that_refuses_all_gives_the_targets_own_text(
    tiny_pair: TinyPair, alone: TargetAlone, sampling: Sampling
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, judge_head=REFUSES_ALL) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for question in QUESTIONS:
            request = judged(question, sampling=sampling)
            assert (await speculate(edge, cloud, request, DRAFT)).token_ids == alone.complete(request)
        await eventually(lambda: service.is_idle)


async def test_a_judge_that_accepts_all_lets_every_draft_stand_but_an_end_of_text(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    lossy = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf, judge_head=ACCEPTS_ALL) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for question in QUESTIONS:
            request = judged(question)
            done = await speculate(edge, cloud, request, DRAFT)
            assert done.num_accepted == done.num_drafted
            assert set(done.origins) <= {Origin.ACCEPTED, Origin.BONUS}
            lossy += done.token_ids != alone.complete(request)
    assert lossy


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_each_token_is_judged_right_or_the_targets_own_and_passes_are_saved(
    tiny_pair: TinyPair, alone: TargetAlone, sampling: Sampling
) -> None:
    passes = {Policy.LOSSLESS: 0, Policy.JUDGE: 0}
    by_judge = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf, judge_head=SOME) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for question in QUESTIONS:
            request = judged(question, sampling=sampling)
            done = await speculate(edge, cloud, request, DRAFT)
            passes[Policy.JUDGE] += done.num_rounds
            own = [token for token, _ in alone.judged(request, done.token_ids)]
            right = SOME.acceptable(hidden_states(tiny_pair.target_gguf, request, done.token_ids))
            for token, origin, targets, acceptable in zip(
                done.token_ids, done.origins, own, right, strict=True
            ):
                if origin is Origin.ACCEPTED:
                    assert token == targets or acceptable
                    by_judge += token != targets
                else:
                    assert token == targets
            lossless = replace(request, policy=Policy.LOSSLESS)
            passes[Policy.LOSSLESS] += (await speculate(edge, cloud, lossless, DRAFT)).num_rounds
    assert by_judge
    assert passes[Policy.JUDGE] < passes[Policy.LOSSLESS]


def hidden_states(path: Path, request: Open, completion: list[int]) -> np.ndarray:
    """Of the completion's tokens, read one by one."""
    with closing(LlamaModel(path, path.stem)) as model:
        chat = [part for part in request.prompt if isinstance(part, Message)]
        with LlamaContext(
            model,
            num_sequences=1,
            context_tokens=CONTEXT_TOKENS,
            rollback_tokens=0,
            threads=1,
            cache_type="f32",
        ) as context:
            context.extend(0, model.render_chat(chat), 1)
            states = []
            for token in completion:
                context.decode([Extension(0, [token], 1, wants_hidden=True)])
                states.append(context.hidden_states(0)[0])
            return np.array(states)


async def test_lossless_streams_beside_judged_ones_keep_the_targets_own_text(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, judge_head=SOME) as service,
        loaded_edge(tiny_pair.draft_gguf, num_slots=4) as edge,
        connection(service.address) as cloud,
    ):

        async def one(request: Open) -> None:
            done = await speculate(edge, cloud, request, DRAFT)
            if request.policy is Policy.LOSSLESS:
                assert done.token_ids == alone.complete(request)

        policies = (Policy.LOSSLESS, Policy.JUDGE)
        requests = [
            replace(judged(question), policy=policy) for question in QUESTIONS[:2] for policy in policies
        ]
        await together(*map(one, requests))
        assert (await generate(cloud, judged())).token_ids == alone.complete(judged())
        await eventually(lambda: service.is_idle)


async def test_a_pass_with_a_judged_draft_holds_no_more_tokens_than_rows(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine where tokens of a prompt cost next to nothing, so that a pass would take all of it.
    monkeypatch.setattr(PassCost, "prefill_tokens", lambda self, num_step_tokens: 512)
    target, context = float32_target(tiny_pair.target_gguf, step_s=0.2, judge_head=SOME)
    in_passes: list[tuple[int, bool]] = []
    decode = context.decode

    def watched(work: Sequence[Extension]) -> list[list[np.ndarray]]:
        in_passes.append((sum(len(w.token_ids) for w in work), any(w.wants_hidden for w in work)))
        return decode(work)

    monkeypatch.setattr(context, "decode", watched)
    text = [65 + i % 20 for i in range(400)]
    async with (
        target.sequence(text[:1]) as first,
        target.sequence(text[:9]) as second,
        target.sequence(text) as third,
    ):
        busy = asyncio.create_task(first.score(text[:1], num_rows=1, width=1))
        await eventually(lambda: bool(in_passes))
        scores, _ = await asyncio.gather(  # both wait for that pass to end, and so share the next
            second.score(text[:9], num_rows=5, width=1, num_judged=4),
            third.score(text, num_rows=1, width=1),
        )
        await busy
    await target.close()
    assert len(scores.acceptable) == 4
    shared = [num_tokens for num_tokens, hidden in in_passes if hidden]
    assert shared == [context.max_rows]


async def test_without_a_head_the_stream_is_lossless_and_the_edge_says_so(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    config = EdgeConfig(mode="speculate", policy=Policy.JUDGE, max_tokens=MAX_TOKENS, seed=5)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        events = [event async for event in Agent(config, edge=edge, cloud=cloud).ask(QUESTIONS[0])]
    [notice] = [event for event in events if isinstance(event, Notice)]
    assert "judge" in notice.message
    assert "lossless" in notice.message
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert answer.policy is Policy.LOSSLESS
    assert [token.id for token in answer.tokens] == alone.complete(judged())


def test_a_service_judges_by_the_head_of_its_own_file_only(tiny_pair: TinyPair, tmp_path: Path) -> None:
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    write_head(head(bias=9.0, sha256=file_sha256(tiny_pair.target_gguf)), own)
    write_head(head(bias=9.0, sha256=file_sha256(tiny_pair.draft_gguf)), other)
    with running_cloud(tiny_pair.target_gguf, judge_head=own) as cloud:
        done = run_duet(
            "ask", QUESTIONS[0], "--mode", "speculate", "--policy", "judge", "--json",
            *("--model", str(tiny_pair.draft_gguf), "--cloud", cloud.address, "--max-tokens", "20"),
            folder=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b'"policy": "judge"' in done.stdout
    refused = run_duet(
        *("serve", "--model", str(tiny_pair.target_gguf), "--judge-head", str(other)),
        *("--listen", "127.0.0.1:0"),
        folder=tmp_path,
        program="duet-cloud",
    )
    assert refused.returncode == 2
    assert b"trained for target, and the target is another file of that name" in refused.stderr
    assert b"Traceback" not in refused.stderr
