"""Sessions that stay in vLLM's engine: the text of rounds, whatever happens, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio

from cloud_service.targets import vllm as vllm_target
from cloud_service.targets import vllm_resident as resident
from cloud_service.targets.base import GenerateOptions
from cloud_service.targets.hf_text import HfText
from cloud_service.targets.resident_rounds import graph_sizes
from cloud_service.targets.vllm import VllmTarget, engine_config, load_target, why_not_resident
from cloud_service.targets.vllm_resident import ResidentSequence
from edge_agent.agent import Agent
from edge_agent.remote import Meter
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.config import EdgeConfig
from shared.errors import CloudFailed, InvalidSetting
from shared.events import Answer
from shared.messages import Message, Open, Policy
from shared.sampling import Rows, Sampling, draw
from shared.session import EdgeSession
from tests.chi_square import p_value
from tests.service import eventually, generate, speculate
from tests.tiny_pair import PADDED_VOCAB_SIZE, TinyPair
from tests.vllm.conftest import CONTEXT_TOKENS, NUM_BLOCKS, Pair, paired
from tests.vllm_streams import SAMPLINGS, random_requests

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

PARKED_S = 0.3


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def target(tiny_pair: TinyPair) -> AsyncIterator[VllmTarget]:
    options = {
        "dtype": "float32",
        "max_model_len": CONTEXT_TOKENS,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "max_num_seqs": 24,
        **resident.engine_options(parked_s=PARKED_S, num_groups=2),
    }
    model = str(tiny_pair.target_hf)
    config = engine_config(model, options)
    text = HfText.load(model, "target", vocab_size=PADDED_VOCAB_SIZE)
    target = await asyncio.to_thread(VllmTarget, config, text)
    await target.warm_up()
    yield target
    await target.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(target: VllmTarget, tiny_pair: TinyPair) -> AsyncIterator[Pair]:
    async with paired(target, tiny_pair) as pair:
        yield pair


async def greedy_by_rounds(target: VllmTarget, prompt: list[int], num_tokens: int) -> list[int]:
    text = list(prompt)
    sequence = vllm_target.VllmSequence(target, None)
    for _ in range(num_tokens):
        scores = await sequence.score(text, num_rows=1, width=1)
        text.append(int(scores.rows.token_ids[0, 0]))
    return text[len(prompt) :]


async def verified(sequence: Any, text: list[int], draft: list[int]) -> list[int]:
    """The target's tokens in answer to a draft."""
    scores = await sequence.score(text + draft, num_rows=len(draft) + 1, width=1)
    return scores.rows.token_ids[:, 0].tolist()


async def assert_nothing_is_held(target: VllmTarget) -> None:
    """No request, and of the cache's blocks none that is in use: only then vLLM empties the cache."""
    await eventually(lambda: target.num_requests == 0)
    deadline = time.monotonic() + 5.0
    while not await target.llm.reset_prefix_cache():
        assert time.monotonic() < deadline, "blocks are held"
        await asyncio.sleep(0.01)


# The same text


async def test_the_engine_passes_its_own_test_at_the_start(pair: Any) -> None:
    assert pair.target.verification == "resident"
    async with grpc.aio.insecure_channel(pair.cloud.address) as channel:
        described = await pb2_grpc.SpeculationServiceStub(channel).Describe(pb2.DescribeRequest())
    assert described.verification == "resident"


async def test_greedy_text_is_that_of_rounds(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    num_drafted = num_accepted = 0
    for i, request in enumerate(random_requests(20, seed=20, samplings=[Sampling()])):
        kept = await speculate(pair.edge, pair.cloud, request, max_draft_tokens=1 + i % 8)
        with monkeypatch.context() as patched:
            patched.setattr(pair.target, "verification", "rounds")
            by_rounds = await speculate(pair.edge, pair.cloud, request, max_draft_tokens=1 + i % 8)
        streamed = await generate(pair.cloud, request)
        assert kept.token_ids == by_rounds.token_ids == streamed.token_ids, request
        assert kept.reason is by_rounds.reason
        num_drafted += kept.num_drafted
        num_accepted += kept.num_accepted
    assert 0 < num_accepted < num_drafted


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(0, 0, id="an empty draft asks for one token"),
        pytest.param(0, 5, id="a wrong draft gives the correction"),
        pytest.param(5, 0, id="a right draft stands whole and gets the bonus"),
        pytest.param(5, 3, id="a draft stands up to its first wrong token"),
        pytest.param(40, 0, id="a draft longer than a step of the engine is verified in several"),
        pytest.param(40, 2, id="and so is one that turns wrong in a later step"),
    ],
)
async def test_a_draft_is_answered_with_the_targets_own_tokens(
    target: VllmTarget, right: int, wrong: int
) -> None:
    prompt = [72, 105, 32, right, wrong]
    greedy = await greedy_by_rounds(target, prompt, 44)
    for committed in (0, 3):  # the first round of a session, and a later one
        async with target.sequence(prompt) as sequence:
            if committed:
                await verified(sequence, prompt, greedy[: committed - 1])
            rest = greedy[committed:]
            draft = rest[:right] + [(token + 1) % 256 for token in rest[right : right + wrong]]
            assert await verified(sequence, prompt + greedy[:committed], draft) == rest[: right + 1]


async def test_a_round_computes_its_draft_and_one_token(target: VllmTarget) -> None:
    prompt = [72] * 100
    greedy = await greedy_by_rounds(target, prompt, 30)
    async with target.sequence(prompt) as sequence:
        await verified(sequence, prompt, [])
        for start in range(1, 25, 6):
            before = sequence.num_computed_tokens
            await verified(sequence, prompt + greedy[:start], greedy[start : start + 5])
            assert sequence.num_computed_tokens - before == 6


async def test_a_text_that_is_no_continuation_begins_a_new_session(target: VllmTarget) -> None:
    prompt = [65, 66, 67]
    async with target.sequence(prompt) as sequence:
        await verified(sequence, prompt, [1, 2])
        for other in ([65, 66], [70, 71, 72, 73]):
            expected = await greedy_by_rounds(target, other, 1)
            assert await verified(sequence, other, []) == expected
            assert target.num_requests == 1
    await assert_nothing_is_held(target)


async def test_a_token_that_stands_for_nothing_is_never_the_targets(
    target: VllmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [80, 81, 82]
    greedy = await greedy_by_rounds(target, prompt, 4)
    asked_rounds = []
    score = vllm_target.VllmSequence.score

    async def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked_rounds.append(kwargs["num_rows"])
        return await score(self, *args, **kwargs)

    monkeypatch.setattr(vllm_target.VllmSequence, "score", counted)
    monkeypatch.setattr(target._sessions, "padding", frozenset(greedy[1:2]))
    async with target.sequence(prompt) as sequence:
        assert await verified(sequence, prompt, greedy[:3]) == greedy[:4]
        assert asked_rounds == [3], "from there on the other scheme, which can look at the next best, decides"
        assert target.num_requests == 0, "the engine's text is not ours, so that session has ended"


async def test_a_stream_whose_drafts_do_not_pay_is_told_so(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Open(prompt=(72, 105), sampling=Sampling(), seed=0, max_tokens=40)
    value = pair.target._sessions.value
    monkeypatch.setattr(value, "pays", lambda rounds: rounds.num < 7 or rounds.made >= rounds.drafted)
    session = EdgeSession()
    session.send_open()
    told = []
    async with pair.cloud.speculate(request, Meter()) as stream:
        session.receive_opened(stream.opened)
        while len(told) < 10:
            await stream.send(session.send_draft([0, 0, 0], more=False))
            verdict = await stream.receive()
            session.receive_verdict(verdict)
            told.append(verdict.stream_instead)
    assert not any(told[:7]), "a few rounds tell nothing"
    assert all(told[7:])


# Sampled streams whose seed nobody asked for

NUM_DRAWS = 2000
OWN_DRAWS = [
    pytest.param(Sampling(temperature=0.6, top_k=4), id="cool, of four"),
    pytest.param(Sampling(temperature=1.5, top_p=0.7, top_k=32), id="hot, of most of the mass"),
]


def chances(rows: Rows, sampling: Sampling) -> list[dict[int, float]]:
    """Of each position, slowly: temperature, top-k, top-p."""
    positions = []
    for ids, logprobs in zip(rows.token_ids, rows.logprobs, strict=True):
        weights = np.exp(logprobs[: sampling.top_k] / sampling.temperature)
        weights /= weights.sum()
        kept = weights[: 1 + int(np.sum(np.cumsum(weights)[:-1] < sampling.top_p))]
        positions.append(dict(zip(ids.tolist(), (kept / kept.sum()).tolist(), strict=False)))
    return positions


@pytest.mark.parametrize("sampling", OWN_DRAWS)
async def test_sampled_drafts_are_verified_exactly_in_distribution(
    target: VllmTarget, sampling: Sampling
) -> None:
    prompt = [72, 111, 119]
    draft = await greedy_by_rounds(target, prompt, 2)
    async with target.sequence(prompt) as rounds:
        scores = await rounds.score(prompt + draft, num_rows=3, width=64)
    first, second, third = chances(scores.rows, sampling)
    expected: dict[Hashable, float] = {(token,): prob for token, prob in first.items() if token != draft[0]}
    for token, prob in second.items():
        if token != draft[1]:
            expected[draft[0], token] = first[draft[0]] * prob
    for token, prob in third.items():
        expected[(*draft, token)] = first[draft[0]] * second[draft[1]] * prob
    assert sum(expected.values()) == pytest.approx(1.0)
    places = asyncio.Semaphore(44)  # more than slots, and than share a step

    async def answer(number: int) -> tuple[int, ...]:
        async with places, target.sequence(prompt, own_draw=sampling if number % 8 else None) as sequence:
            scores = await sequence.score(prompt + draft, num_rows=3, width=64 if number % 8 else 1)
            return tuple(scores.rows.token_ids[:, 0].tolist())

    # Every eighth is greedy, in the same steps.
    made = await asyncio.gather(*(answer(number) for number in range(NUM_DRAWS)))
    assert {made[number][:2] for number in range(0, NUM_DRAWS, 8)} == {tuple(draft)}
    drawn = Counter(made[number] for number in range(NUM_DRAWS) if number % 8)
    assert 0 < sum(drawn[answer] for answer in drawn if len(answer) == 3) < drawn.total()
    assert p_value(drawn, expected) > 1e-6
    warmer = chances(scores.rows, replace(sampling, temperature=1.3 * sampling.temperature))
    assert (
        p_value(Counter(answer[:1] for answer in drawn.elements()), {(t,): p for t, p in warmer[0].items()})
        < 1e-6
    )
    await assert_nothing_is_held(target)


@pytest.mark.parametrize("sampling", OWN_DRAWS)
async def test_a_sampled_cloud_stream_is_the_engines_own(target: VllmTarget, sampling: Sampling) -> None:
    prompt = [72, 111, 119]
    async with target.sequence(prompt) as rounds:
        [expected] = chances((await rounds.score(prompt, num_rows=1, width=64)).rows, sampling)
    options = GenerateOptions(
        sampling=sampling, seed=0, start=0, max_tokens=1, end_token_ids=frozenset(), own_noise=True
    )

    async def first_token() -> int:
        async with target.sequence(prompt, own_draw=sampling) as sequence:
            [[token]] = [new async for new in sequence.generate(prompt, options)]
        return token

    drawn = Counter(await asyncio.gather(*(first_token() for _ in range(400))))
    assert p_value(drawn, expected) > 1e-6


async def test_a_token_that_stands_for_nothing_is_never_drawn(
    target: VllmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sampling = [80, 81, 82], Sampling(temperature=1.0, top_k=4)
    greedy = await greedy_by_rounds(target, prompt, 3)
    padding = np.array([token in greedy[1:2] for token in range(PADDED_VOCAB_SIZE)])
    monkeypatch.setattr(target, "_padding", padding)
    monkeypatch.setattr(target._sessions, "padding", frozenset(greedy[1:2]))
    options = GenerateOptions(
        sampling=Sampling(), seed=0, start=0, max_tokens=6, end_token_ids=frozenset(), own_noise=True
    )
    for drawn in (sampling, Sampling()):
        async with target.sequence(prompt, own_draw=sampling) as sequence:
            stream = sequence.generate(prompt, replace(options, sampling=drawn))
            made = [token async for new in stream for token in new]
        assert len(made) == 6
        assert greedy[1] not in made
    for seed in range(20):
        async with target.sequence(prompt, own_draw=sampling) as sequence:
            scores = await sequence.score([*prompt, greedy[0], greedy[1]], num_rows=3, width=4)
            assert greedy[1] not in draw(scores.rows, sampling, seed, 0)[:2]
    await assert_nothing_is_held(target)


async def test_a_stream_without_a_seed_stays_in_the_engine_and_says_so(pair: Any) -> None:
    computed = []
    for request in random_requests(4, seed=23, samplings=[Sampling(temperature=0.9, top_p=0.9)]):
        free = replace(request, any_noise=True)
        drafted = [await speculate(pair.edge, pair.cloud, free, 4) for _ in range(3)]
        assert all(0 < len(each.token_ids) <= 24 for each in drafted)
        computed += [each.num_drafted for each in drafted]
        assert len({tuple(each.token_ids) for each in drafted}) > 1, "no seed repeats them"
        assert len({tuple((await generate(pair.cloud, free)).token_ids) for _ in range(3)}) > 1
        async with pair.cloud.speculate(free, Meter()) as stream:
            assert stream.opened.own_noise
    assert sum(computed) > 0
    await assert_nothing_is_held(pair.target)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"any_noise": False}, "the seed is asked for"),
        ({"policy": Policy.BILD}, "it judges by rows"),
        ({"sampling": Sampling(temperature=1.0, min_p=0.1)}, "the engine applies no min-p to drafts"),
        ({"sampling": Sampling(temperature=0.001)}, "the engine would draw at another temperature"),
        ({"sampling": Sampling()}, "nothing is drawn"),
    ],
)
async def test_other_streams_keep_to_their_seed(pair: Any, changed: dict[str, Any], why: str) -> None:
    sampled = Open(prompt=(72, 105), sampling=Sampling(temperature=1.0), seed=7, max_tokens=8, any_noise=True)
    async with pair.cloud.speculate(replace(sampled, **changed), Meter()) as stream:
        assert not stream.opened.own_noise, why


@pytest.mark.parametrize("mode", ["cloud", "speculate"])
async def test_an_answer_names_its_seed_only_where_that_repeats_it(pair: Any, mode: Any) -> None:
    def agent(seed: int | None) -> Agent:
        config = EdgeConfig(mode=mode, temperature=1.0, max_tokens=16, seed=seed)
        return Agent(config, edge=pair.edge, cloud=pair.cloud)

    async def answer(seed: int | None) -> Answer:
        events = [event async for event in agent(seed).ask("Go on")]
        assert isinstance(events[-1], Answer)
        return events[-1]

    assert (await answer(None)).seed is None
    first, again = await answer(5), await answer(5)
    assert first.seed == again.seed == 5
    assert first.answer == again.answer


# What the engine does not verify by itself


@pytest.mark.parametrize("policy", list(Policy))
async def test_sampled_and_lossy_streams_get_the_text_of_rounds(
    pair: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, request in enumerate(random_requests(len(SAMPLINGS), seed=21)):
        asked = replace(request, policy=policy)
        here = await speculate(pair.edge, pair.cloud, asked, max_draft_tokens=1 + i % 8)
        with monkeypatch.context() as patched:
            patched.setattr(pair.target, "verification", "rounds")
            by_rounds = await speculate(pair.edge, pair.cloud, asked, max_draft_tokens=1 + i % 8)
        assert here.token_ids == by_rounds.token_ids
        if policy is Policy.LOSSLESS:
            assert here.token_ids == (await generate(pair.cloud, request)).token_ids


# Sessions that pause, vanish, resume, are preempted


async def test_a_parked_session_costs_no_processor_time(target: VllmTarget) -> None:
    prompt = [90, 91]
    # Its worker's process waits busily for a while, with and without sessions.
    engines = [child for child in psutil.Process().children() if "EngineCore" in child.name()]
    engine = max(engines, key=lambda child: child.create_time())  # other modules' may still be there
    async with target.sequence(prompt) as sequence:
        await verified(sequence, prompt, [1])
        await asyncio.sleep(0.1)
        before = sum(engine.cpu_times()[:2])
        await asyncio.sleep(1.0)
        assert sum(engine.cpu_times()[:2]) - before < 0.1


async def test_a_session_that_pauses_too_long_gives_up_its_blocks_and_goes_on(target: VllmTarget) -> None:
    prompt = [100] * 70
    greedy = await greedy_by_rounds(target, prompt, 12)
    async with target.sequence(prompt) as sequence, target.sequence([1]) as other:
        assert await verified(sequence, prompt, greedy[:4]) == greedy[:5]
        await asyncio.sleep(PARKED_S + 0.1)
        evicted = target._sessions.num_evicted
        await verified(other, [1], [])  # the engine looks when it has something to do
        assert await verified(sequence, prompt + greedy[:5], [*greedy[5:8], 0, 0]) == greedy[5:9]
        assert target._sessions.num_evicted == evicted + 1
        assert await verified(sequence, prompt + greedy[:9], greedy[9:11]) == greedy[9:12]
    await assert_nothing_is_held(target)


async def test_parked_sessions_give_way_to_those_that_work(target: VllmTarget) -> None:
    long = 12 * target.block_tokens
    prompts = [[i] * long for i in range(6)]
    expected = [await greedy_by_rounds(target, prompt, 8) for prompt in prompts]
    async with AsyncExitStack() as stack:
        sequences = [await stack.enter_async_context(target.sequence(prompt)) for prompt in prompts]
        evicted = target._sessions.num_evicted
        for num_committed in (0, 4):  # twice as much as the cache holds
            for sequence, prompt, greedy in zip(sequences, prompts, expected, strict=True):
                text = prompt + greedy[:num_committed]
                draft = greedy[num_committed : num_committed + 3]
                made = await verified(sequence, text, draft)
                assert made == greedy[num_committed : num_committed + 4]
        assert target._sessions.num_evicted > evicted
    await assert_nothing_is_held(target)


async def test_16_streams_at_once_get_what_each_gets_alone_preempted_ones_too(pair: Any) -> None:
    requests = [
        Open(
            prompt=(Message("user", f"Count to {i}" + " and on" * i),),
            sampling=Sampling(),
            seed=i,
            max_tokens=120,
        )
        for i in range(16)
    ]
    alone = [(await generate(pair.cloud, request)).token_ids for request in requests]
    preempted = pair.target._sessions.num_evicted
    together = await asyncio.gather(
        *(
            speculate(pair.edge, pair.cloud, request, 1 + i % 8) if i % 4 else generate(pair.cloud, request)
            for i, request in enumerate(requests)
        )
    )
    assert [completion.token_ids for completion in together] == alone
    assert pair.target._sessions.num_evicted > preempted, "the streams do not fit the cache together"
    await assert_nothing_is_held(pair.target)


async def test_of_many_sessions_half_share_a_step(
    target: VllmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[number, number + 1, number + 2] for number in range(38)]
    drafts = [[number] * 4 for number in range(38)]
    alone = []
    for text, draft in zip(texts, drafts, strict=True):
        async with target.sequence(text) as sequence:
            alone.append(await verified(sequence, text, draft))

    num_answered: list[int] = []
    sessions = target._sessions
    assert sessions is not None
    learn = sessions._learn
    monkeypatch.setattr(
        sessions, "_learn", lambda outputs: (num_answered.append(len(outputs)), learn(outputs))
    )
    async with AsyncExitStack() as stack:
        sequences = [await stack.enter_async_context(target.sequence(text)) for text in texts]
        made = await asyncio.gather(*map(verified, sequences, texts, drafts))
        num_answered.clear()
        after = [[*text, *new] for text, new in zip(texts, made, strict=True)]
        again = await asyncio.gather(*map(verified, sequences, after, drafts))
    assert made == alone
    assert all(len(new) >= 1 for new in again)
    assert max(num_answered) == 19, "of 38 with a draft, as many as may share a step do, and no more"
    await assert_nothing_is_held(target)


async def test_a_stream_that_vanishes_in_a_round_leaves_the_engine(target: VllmTarget) -> None:
    prompt = [110] * 400
    async with target.sequence(prompt) as sequence:
        round_ = asyncio.create_task(verified(sequence, prompt, [1] * 8))
        await eventually(lambda: target.num_requests == 1)
        round_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await round_
        await assert_nothing_is_held(target)
        greedy = await greedy_by_rounds(target, prompt, 1)
        assert await verified(sequence, prompt, []) == greedy, "the sequence begins anew"
    await assert_nothing_is_held(target)


async def test_a_resume_gives_the_rest_of_the_same_text(pair: Any) -> None:
    for request in random_requests(4, seed=22, samplings=[Sampling()]):
        whole = (await generate(pair.cloud, request)).token_ids
        for shown in (0, 1, len(whole) // 2):
            resumed = replace(request, committed=tuple(whole[:shown]))
            assert (await speculate(pair.edge, pair.cloud, resumed, 4)).token_ids == whole[shown:]


@pytest.mark.parametrize("room", [1, 2, 7])
async def test_a_text_may_fill_the_context_to_its_last_token(pair: Any, room: int) -> None:
    prompt = tuple(np.random.default_rng(9).integers(0, 256, pair.target.context_tokens - room).tolist())
    request = Open(prompt=prompt, sampling=Sampling(), seed=0)
    streamed = await generate(pair.cloud, request)
    speculated = await speculate(pair.edge, pair.cloud, request, 4)
    assert streamed.token_ids == speculated.token_ids
    assert streamed.reason is speculated.reason
    await assert_nothing_is_held(pair.target)


async def test_1000_random_sessions_leave_no_block_behind(target: VllmTarget) -> None:
    await assert_nothing_is_held(target)
    choice = random.Random(0)
    places = asyncio.Semaphore(24)

    async def session(number: int) -> None:
        async with places:
            text = choice.choices(range(256), k=choice.randrange(1, 80))
            async with target.sequence(text) as sequence:
                for _ in range(choice.randrange(1, 4)):
                    draft = choice.choices(range(256), k=choice.randrange(0, 20))
                    round_ = asyncio.create_task(verified(sequence, text, draft))
                    if choice.random() < 0.1:
                        await asyncio.sleep(0.01 * choice.random())
                        round_.cancel()
                        await asyncio.gather(round_, return_exceptions=True)
                        return
                    text += await round_
                    if choice.random() < 0.02:
                        await asyncio.sleep(PARKED_S)

    await asyncio.gather(*(session(number) for number in range(1000)))
    await assert_nothing_is_held(target)


# Bad input


def misplaced(session: resident.Session, start: int) -> Callable[[Sequence[int]], int]:
    begin = session.begin

    def begin_elsewhere(draft: Sequence[int]) -> int:
        begin(draft)
        return start

    return begin_elsewhere


@pytest.mark.parametrize(
    ("start", "num_tokens"),
    [
        pytest.param(3, 2, id="a draft of an earlier start"),
        pytest.param(9, 2, id="a draft of a later start"),
        pytest.param(4, CONTEXT_TOKENS, id="a draft beyond the model's length"),
    ],
)
async def test_a_draft_that_does_not_fit_ends_its_own_session_alone(
    target: VllmTarget, start: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [120, 121, 122]
    async with target.sequence(prompt) as sequence, target.sequence([5]) as other:
        assert isinstance(sequence, ResidentSequence)
        await verified(sequence, prompt, [])
        text = [5, *await verified(other, [5], [])]
        session = sequence._session
        assert session is not None
        monkeypatch.setattr(session, "begin", misplaced(session, start))
        with pytest.raises(CloudFailed, match="gave a session up"):
            await verified(sequence, list(session.text), [1] * num_tokens)
        assert await verified(other, text, []) == await greedy_by_rounds(target, text, 1)
        greedy = await greedy_by_rounds(target, prompt, 2)
        assert await verified(sequence, prompt, greedy[:1]) == greedy, "its stream may begin anew"
    await assert_nothing_is_held(target)


async def test_a_draft_for_a_session_that_has_gone_is_nobodys(target: VllmTarget) -> None:
    async with target.sequence([6]) as other:
        text = [6, *await verified(other, [6], [])]
        gone = resident.Session("session-that-never-was", [1])
        target._sessions._sessions[gone.name] = gone
        target._sessions.verify(gone, [1, 2])
        await asyncio.sleep(0)  # the draft is on its way
        target._sessions.close(gone)
        assert await verified(other, text, []) == await greedy_by_rounds(target, text, 1)


# Where it cannot be


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of engines that would have been started."""
    configs: list[Any] = []
    monkeypatch.setattr(vllm_target, "VllmTarget", lambda config, *_: configs.append(config))
    return configs


@pytest.mark.parametrize(
    ("options", "tested", "says"),
    [
        pytest.param({}, frozenset(), "were never tried with vLLM 0.", id="a version that was never tried"),
        pytest.param(
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            resident.TESTED_VERSIONS,
            "--engine.scheduler-cls is set",
            id="a scheduler of the operator's",
        ),
    ],
)
async def test_an_engine_that_cannot_falls_back_with_a_notice(
    tiny_pair: TinyPair,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    tested: frozenset[str],
    says: str,
) -> None:
    monkeypatch.setattr(resident, "TESTED_VERSIONS", tested)
    model = str(tiny_pair.target_hf)
    load_target(model, "target", {"dtype": "float32", **options})
    assert started[0].speculative_config is None
    assert says in caplog.text
    with pytest.raises(InvalidSetting, match=says):
        load_target(model, "target", options, "resident")


@pytest.mark.parametrize(
    ("verification", "slots", "stays"),
    [
        pytest.param("rounds", {"max_num_seqs": 16}, False, id="rounds can be asked for"),
        pytest.param("resident", {"max_num_seqs": 512}, True, id="and so can sessions"),
        pytest.param("auto", {"max_num_seqs": 64}, True, id="auto takes sessions where they paid"),
        pytest.param("auto", {"max_num_seqs": 65}, False, id="not with more streams at once"),
        pytest.param("auto", {}, False, id="nor with as many as vLLM likes"),
    ],
)
async def test_the_scheme_is_the_operators_choice_or_what_was_measured_to_pay(
    tiny_pair: TinyPair,
    started: list[Any],
    caplog: pytest.LogCaptureFixture,
    verification: Any,
    slots: dict[str, int],
    stays: bool,
) -> None:
    assert why_not_resident(slots) is None
    load_target(str(tiny_pair.target_hf), "target", {"dtype": "float32", **slots}, verification)
    assert (started[0].speculative_config is not None) == stays
    told = verification == "auto" and not stays
    assert ("measured to pay with up to 64 streams" in caplog.text) == told


async def test_a_gpus_engine_has_graphs_for_the_steps_of_its_slots_unless_the_operator_says_which(
    tiny_pair: TinyPair, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def noted(model: str, options: dict[str, Any]) -> Any:
        asked.append(options)
        return engine_config(model, {"dtype": "float32"})

    monkeypatch.setattr(vllm_target, "engine_config", noted)
    monkeypatch.setattr(resident, "current_platform", SimpleNamespace(is_cuda=lambda: True))  # there is none
    chosen = {"compilation_config": {"cudagraph_capture_sizes": [8]}}
    for own in ({}, chosen):
        load_target(str(tiny_pair.target_hf), "target", {"max_num_seqs": 64, **own}, "resident")
    sizes = [options["compilation_config"]["cudagraph_capture_sizes"] for options in asked]
    tokens = resident.MAX_STEP_DRAFT_TOKENS + 1
    assert sizes == [graph_sizes(64, tokens, any_size=resident._may_look_ahead()), [8]]
    assert len(started) == 2


async def test_an_engine_whose_text_is_not_greedy_falls_back_with_a_notice(
    target: VllmTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin = resident.Session.begin

    def accept_all(self: resident.Session, draft: Sequence[int]) -> int:
        start = begin(self, draft)
        self.text += [*draft, 0]
        self.verdict.set_result([*draft, 0])
        return start

    with monkeypatch.context() as patched:
        patched.setattr(resident.Session, "begin", accept_all)
        await target.warm_up()
    assert target.verification == "rounds"
    assert "is not the model's greedy text" in caplog.text
    await target.warm_up()
    assert target.verification == "resident"
