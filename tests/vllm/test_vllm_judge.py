"""Policy judge on vLLM: hidden states are the model's own, and a stream is judged by its own text's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from cloud_service.judging.head_file import read_head
from cloud_service.judging.states import load_states
from cloud_service.targets import vllm as vllm_target
from cloud_service.targets import vllm_judge
from cloud_service.targets.loading import target_loader
from cloud_service.targets.vllm import VllmTarget
from shared.config import CloudConfig
from shared.judge import JudgeHead
from shared.labelled_answers import to_lines
from shared.messages import Message, Policy
from shared.models import folder_sha256
from shared.sampling import Sampling
from shared.session import Origin
from tests.labelled import answers
from tests.service import connection, eventually, generate, loaded_edge, run_duet, serving, speculate
from tests.tiny_pair import HIDDEN_SIZE, NUM_TOKENS, TinyPair
from tests.vllm.conftest import CONTEXT_TOKENS, NUM_BLOCKS, Pair, paired
from tests.vllm_streams import random_requests, rendered

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

ENGINE = {
    "dtype": "float32",
    "max_model_len": CONTEXT_TOKENS,
    "num_gpu_blocks_override": NUM_BLOCKS,
    # Longer prompts, and some drafts, take several steps.
    "max_num_batched_tokens": 64,
}


def head(*, bias: float = 0.0, weight: float = 0.0, sha256: str = "") -> JudgeHead:
    direction = np.random.default_rng(0).normal(size=HIDDEN_SIZE)
    return JudgeHead(
        model="target-hf", model_sha256=sha256, weight=weight * direction, bias=bias, threshold=0.5
    )


ACCEPTS_ALL, REFUSES_ALL, SOME = head(bias=9.0), head(bias=-9.0), head(weight=1.0)


class Reference:
    """The model in transformers."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def read(self, text: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At each token the likeliest next one, [num_tokens], all log-probabilities of it, [num_tokens,
        vocab_size], and the hidden state, [num_tokens, hidden_size]."""
        with torch.no_grad():
            out = self._model(torch.tensor([list(text)]), output_hidden_states=True)
        own = out.logits[0, :, :NUM_TOKENS].argmax(-1).numpy()
        return own, out.logits[0].log_softmax(-1).numpy(), out.hidden_states[-1][0].numpy()


@pytest.fixture(scope="module")
def reference(tiny_pair: TinyPair) -> Reference:
    return Reference(tiny_pair.target_hf)


# Making a head for a folder, by the commands


@pytest.fixture(scope="module")
def workplace(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a head was made."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "answers.jsonl").write_text(to_lines(answers()), "utf-8")
    common = ("answers.jsonl", "--states=states", f"--model={tiny_pair.target_hf}")
    for command in (
        ("collect", *common, '--engine={"dtype": "float32"}'),
        ("train", *common, "--out=head.safetensors"),
    ):
        done = run_duet("judge", *command, folder=folder, program="duet-cloud")
        assert done.returncode == 0, done.stderr
    return folder


async def test_what_is_kept_of_an_answer_is_what_the_model_holds(
    workplace: Path, tiny_pair: TinyPair, reference: Reference
) -> None:
    read = list(load_states(workplace / "states", folder_sha256(tiny_pair.target_hf), answers()))
    assert len(read) == len(answers())
    text_side = vllm_target.HfText.load(str(tiny_pair.target_hf), "target", vocab_size=NUM_TOKENS)
    for answer, states in read[:6]:
        prompt = text_side.render_chat([Message("user", answer.question)])
        token_ids = states.token_ids.tolist()
        assert b"".join(map(text_side.piece, token_ids)).decode() == answer.answer
        assert states.ends[-1] == len(answer.answer.encode())
        own, logprobs, hidden = reference.read([*prompt, *token_ids])
        before = slice(len(prompt) - 1, -1)
        assert states.own_ids.tolist() == own[before].tolist()
        assert np.allclose(states.logprobs, logprobs[before][range(len(token_ids)), token_ids], atol=1e-4)
        assert np.allclose(states.hidden, hidden[len(prompt) :], atol=5e-3)


async def test_a_head_of_a_folder_is_measured_by_the_command(workplace: Path, tiny_pair: TinyPair) -> None:
    measured = run_duet(
        *("judge", "eval", "answers.jsonl", "--states=states", "--head=head.safetensors"),
        f"--model={tiny_pair.target_hf}",
        folder=workplace,
        program="duet-cloud",
    )
    assert measured.returncode == 0, measured.stderr
    assert b"acceptance length" in measured.stdout
    trained = read_head(workplace / "head.safetensors")
    assert (trained.model, trained.hidden_size) == (tiny_pair.target_hf.name, HIDDEN_SIZE)


# Judging


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["rounds", "resident"])
async def target(
    request: pytest.FixtureRequest, tiny_pair: TinyPair, workplace: Path
) -> AsyncIterator[VllmTarget]:
    """Served with the head that was made, as an operator serves it."""
    config = CloudConfig(
        target="vllm",
        model=str(tiny_pair.target_hf),
        verification=request.param,
        slots=16,
        judge_head=str(workplace / "head.safetensors"),
        engine=ENGINE,
    )
    target = await asyncio.to_thread(target_loader(config, lambda *_: None))
    assert isinstance(target, VllmTarget)
    await target.warm_up()
    assert target.verification == request.param
    assert target.judge_head is not None
    yield target
    await target.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(target: VllmTarget, tiny_pair: TinyPair) -> AsyncIterator[Pair]:
    async with paired(target, tiny_pair, num_slots=6) as pair:
        yield pair


async def judge_by(target: VllmTarget, head: JudgeHead) -> None:
    target.judge_head = head
    await target.hidden.keep(head.weight)


def random_text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def assert_judged(acceptable: np.ndarray, hidden: np.ndarray) -> None:
    """By `SOME`, but for what rounding decides."""
    probabilities = SOME.probabilities(hidden)
    clear = np.abs(probabilities - SOME.threshold) > 1e-3
    assert acceptable.shape == probabilities.shape
    assert (acceptable == SOME.acceptable(hidden))[clear].all()


async def test_the_head_that_was_made_judges_as_by_the_models_hidden_states(
    target: VllmTarget, workplace: Path, reference: Reference
) -> None:
    trained = read_head(workplace / "head.safetensors")
    await judge_by(target, trained)
    text = target.render_chat([Message("user", "Story 1?")]) + list(b"Once there were #%&! nine stones. #%&!")
    async with target.sequence(text) as sequence:
        scores = await sequence.score(text, num_rows=39, width=1, num_judged=38)
    hidden = reference.read(text)[2][-38:]
    assert scores.acceptable.tolist() == trained.acceptable(hidden).tolist()
    assert 0 < scores.acceptable.sum() < 38


@pytest.mark.parametrize("num_judged", [1, 6, 40])
async def test_tokens_are_judged_by_their_own_hidden_states_whatever_the_cache_holds(
    target: VllmTarget, reference: Reference, num_judged: int
) -> None:
    await judge_by(target, SOME)
    for context in (1, 31, 32, 33, 64, 100, 400):
        text = random_text(context + num_judged, seed=context)
        hidden = reference.read(text)[2][-num_judged:]
        assert await target.llm.reset_prefix_cache()
        async with target.sequence(text) as sequence:
            await sequence.score(text[:context], num_rows=1, width=1)
            # Of the second time all is cached.
            for _ in range(2):
                scores = await sequence.score(text, num_rows=num_judged + 1, width=1, num_judged=num_judged)
                assert_judged(scores.acceptable, hidden)


async def test_drafts_of_many_texts_in_one_batch_are_each_judged_by_their_own(
    target: VllmTarget, reference: Reference
) -> None:
    await judge_by(target, SOME)
    texts = [random_text(20 + 9 * i, seed=100 + i) for i in range(12)]
    async with AsyncExitStack() as stack:
        sequences = [await stack.enter_async_context(target.sequence(text)) for text in texts]
        scored = await asyncio.gather(
            *(
                sequence.score(text, num_rows=2 + i, width=1, num_judged=1 + i)
                for i, (sequence, text) in enumerate(zip(sequences, texts, strict=True))
            ),
            # In the same batches, and put to no judge.
            *(sequences[0].score(random_text(50, seed=i), num_rows=4, width=1) for i in range(4)),
        )
    for i, text in enumerate(texts):
        assert_judged(scored[i].acceptable, reference.read(text)[2][-(1 + i) :])
    assert not any(len(scores.acceptable) for scores in scored[len(texts) :])


async def test_streams_at_once_get_what_each_gets_alone_and_every_token_is_own_or_judged_right(
    pair: Pair, reference: Reference
) -> None:
    await judge_by(pair.target, SOME)
    requests = [
        replace(request, policy=Policy.JUDGE) for request in random_requests(6, 3, samplings=[Sampling()])
    ]
    alone = [await speculate(pair.edge, pair.cloud, request, 4) for request in requests]
    together = await asyncio.gather(*(speculate(pair.edge, pair.cloud, each, 4) for each in requests))
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    by_judge = 0
    for request, done in zip(requests, alone, strict=True):
        prompt = rendered(pair.target, request)
        own, _, hidden = reference.read([*prompt, *done.token_ids])
        right = SOME.acceptable(hidden[len(prompt) :])
        for token, origin, targets, acceptable in zip(
            done.token_ids, done.origins, own[len(prompt) - 1 :], right, strict=False
        ):
            if origin is Origin.ACCEPTED:
                assert token == targets or acceptable
                by_judge += token != targets
            else:
                assert token == targets
    assert by_judge
    await eventually(lambda: pair.target.num_requests == 0)


async def test_a_judge_that_accepts_all_saves_rounds(pair: Pair) -> None:
    await judge_by(pair.target, ACCEPTS_ALL)
    for lossless in random_requests(4, seed=4, samplings=[Sampling()]):
        judged = await speculate(pair.edge, pair.cloud, replace(lossless, policy=Policy.JUDGE), 4)
        assert judged.num_accepted == judged.num_drafted
        assert judged.num_rounds < (await speculate(pair.edge, pair.cloud, lossless, 4)).num_rounds


async def test_beside_a_judge_lossless_text_is_the_targets_own_and_so_is_what_it_refuses(pair: Pair) -> None:
    await judge_by(pair.target, REFUSES_ALL)
    for request in random_requests(10, seed=5):
        own = (await generate(pair.cloud, request)).token_ids
        lossless, judged = await asyncio.gather(
            speculate(pair.edge, pair.cloud, request, 4),
            speculate(pair.edge, pair.cloud, replace(request, policy=Policy.JUDGE), 4),
        )
        assert lossless.token_ids == judged.token_ids == own, request


async def test_an_engine_that_fails_its_test_verifies_losslessly_and_says_so(
    target: VllmTarget,
    tiny_pair: TinyPair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fault(*_: object) -> str:
        return "rows are of other tokens"

    await judge_by(target, ACCEPTS_ALL)
    monkeypatch.setattr(vllm_judge, "fault", fault)
    verification = target.verification
    await target.warm_up()
    assert "policy judge will be lossless: rows are of other tokens" in caplog.text
    assert target.verification == verification
    async with (
        serving(target) as (address, _),
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(address) as cloud,
    ):
        for request in random_requests(2, seed=6, samplings=[Sampling()]):
            judged = await speculate(edge, cloud, replace(request, policy=Policy.JUDGE), 4)
            assert judged.token_ids == (await generate(cloud, request)).token_ids
