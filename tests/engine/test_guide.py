"""Mode `guide`: the target begins the answer, the edge model finishes it, whatever tokens they use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from edge_agent.agent import Agent
from edge_agent.drafting.translated import tokens_of
from edge_agent.edge_model import EdgeModel
from edge_agent.routing.router import load_router
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.byte_tokens import ByteTokenizer
from shared.config import EdgeConfig
from shared.errors import CloudFailed, CloudUnavailable, InvalidRequest
from shared.events import Answer, Event, Notice, Routed, Token
from shared.messages import FinishReason, Message, Open, Tokens
from shared.sampling import Sampling
from shared.session import Origin
from shared.shaping import Shaping
from tests.scripted_target import ScriptedTarget
from tests.service import (
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    in_process_cloud,
    run_duet,
    serving,
)
from tests.tiny_pair import OTHER_MERGES, TARGET_SEED, TinyPair, write_tiny_model

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."
MAX_TOKENS = 40
GUIDANCE = 12


@pytest.fixture(scope="module")
def other_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has other tokens, not only other ids."""
    folder = tmp_path_factory.mktemp("merges")
    return write_tiny_model(folder, name="merges", seed=TARGET_SEED, merges=OTHER_MERGES).gguf


@pytest.fixture
async def service(tiny_pair: TinyPair) -> AsyncIterator[InProcessCloud]:
    async with in_process_cloud(tiny_pair.target_gguf) as cloud:
        yield cloud


@asynccontextmanager
async def agent_with(model: Path, address: str, **settings: object) -> AsyncIterator[Agent]:
    usual = {"mode": "guide", "guidance_tokens": GUIDANCE, "max_tokens": MAX_TOKENS, "seed": 11}
    config = EdgeConfig.model_validate(
        {"threads": 1, "context_tokens": 512, "cloud": address, **usual, **settings}
    )
    edge = await EdgeModel.load(model, model.stem, config)
    try:
        async with connection(address) as cloud:
            router = load_router(edge, cloud, config, lambda: "") if config.mode == "auto" else None
            yield Agent(config, edge=edge, cloud=cloud, router=router)
    finally:
        await edge.close()


@dataclass
class Asked:
    answer: Answer
    events: list[Event]
    rest_alone: Answer | None = None
    """What the edge model writes by itself after the prompt and a given beginning."""

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]


async def ask(model: Path, address: str, **settings: object) -> Asked:
    async with agent_with(model, address, **settings) as agent:
        events = [event async for event in agent.ask(QUESTION)]
        answer = events[-1]
        assert isinstance(answer, Answer)
        return Asked(answer, events, await rest_alone(agent, answer))


async def rest_alone(agent: Agent, answer: Answer) -> Answer | None:
    """What the edge model writes by itself after the prompt and the guidance of this answer."""
    edge = agent._edge
    assert edge is not None
    left = MAX_TOKENS - answer.guidance_tokens
    if left < 1:
        return None
    guidance = [token for token in answer.tokens if token.origin is Origin.CLOUD]
    if edge.model.name == "draft":
        begun = [token.id for token in guidance]
    else:
        by_bytes = ByteTokenizer(edge.model.vocabulary)
        begun = tokens_of(bytes_of(guidance), by_bytes, lambda run: edge.model.tokenize(run, special=False))
        assert b"".join(map(edge.model.piece, begun)) == bytes_of(guidance)
    prompt = [*edge.model.render_chat([Message("user", QUESTION)]), *begun]
    events = [event async for event in agent.complete(prompt, mode="local", max_tokens=left)]
    assert isinstance(events[-1], Answer)
    return events[-1]


def bytes_of(tokens: Sequence[Token]) -> bytes:
    return b"".join(token.piece for token in tokens)


def request(max_tokens: int = MAX_TOKENS) -> Open:
    return Open(prompt=(Message("user", QUESTION),), sampling=Sampling(), seed=11, max_tokens=max_tokens)


def origins(answer: Answer) -> list[Origin]:
    return [token.origin for token in answer.tokens]


async def test_the_answer_begins_as_the_targets_and_goes_on_as_the_edges(
    tiny_pair: TinyPair, alone: TargetAlone, service: InProcessCloud
) -> None:
    asked = await ask(tiny_pair.draft_gguf, service.address)
    answer = asked.answer
    ids = [token.id for token in answer.tokens]
    assert ids[:GUIDANCE] == alone.complete(request(GUIDANCE))
    assert asked.rest_alone is not None
    assert ids[GUIDANCE:] == [token.id for token in asked.rest_alone.tokens]
    assert origins(answer) == [Origin.CLOUD] * GUIDANCE + [Origin.LOCAL] * (len(ids) - GUIDANCE)
    assert asked.events[0] == Routed("guide")
    assert (answer.mode, answer.guidance_tokens, answer.target_passes) == ("guide", GUIDANCE, GUIDANCE)
    assert (answer.rounds, answer.policy) == (0, None)
    assert service.is_idle


async def test_guidance_crosses_tokenizers_as_text(
    other_gguf: Path, alone: TargetAlone, service: InProcessCloud
) -> None:
    asked = await ask(other_gguf, service.address)
    begun = b"".join(map(alone.model.piece, alone.complete(request(GUIDANCE))))
    assert asked.rest_alone is not None
    assert asked.rest_alone.completion_tokens > 0
    assert bytes_of(asked.answer.tokens) == begun + bytes_of(asked.rest_alone.tokens)


async def test_a_character_that_the_guidance_cuts_in_two_is_finished_by_the_edge(other_gguf: Path) -> None:
    """The scripted target writes bytes: its sixth token is the first half of a character."""
    written = "Olé, é".encode()
    prompt = QUESTION.encode()

    def next_token(text: Sequence[int]) -> int:
        return written[len(text) - len(prompt)]

    async with (
        serving(ScriptedTarget(next_token)) as (address, _),
        agent_with(other_gguf, address, guidance_tokens=len(written) - 1) as agent,
    ):
        answer = await agent.answer(QUESTION)
    assert bytes_of(answer.tokens).startswith(written[:-1])
    assert answer.guidance_tokens == len(written) - 1
    assert answer.completion_tokens > answer.guidance_tokens


async def test_a_target_that_ends_within_the_guidance_leaves_nothing_to_do(other_gguf: Path) -> None:
    written = b"Yes.\0"
    prompt = QUESTION.encode()
    async with serving(ScriptedTarget(lambda text: written[len(text) - len(prompt)])) as (address, _):
        for guidance in (5, 6, 40):
            asked = await ask(other_gguf, address, guidance_tokens=guidance)
            assert asked.answer.finish_reason is FinishReason.STOP
            assert origins(asked.answer) == [Origin.CLOUD] * 5


@pytest.mark.parametrize("guidance", [MAX_TOKENS, MAX_TOKENS + 1, 10_000])
async def test_the_limit_of_the_answer_counts_the_guidance_too(
    tiny_pair: TinyPair, alone: TargetAlone, service: InProcessCloud, guidance: int
) -> None:
    asked = await ask(tiny_pair.draft_gguf, service.address, guidance_tokens=guidance)
    assert [token.id for token in asked.answer.tokens] == alone.complete(request())
    assert set(origins(asked.answer)) == {Origin.CLOUD}
    assert asked.answer.finish_reason is FinishReason.LENGTH


class OverlongService(pb2_grpc.SpeculationServiceServicer):
    """Not a service: it never ends, whatever was asked of it."""

    def __init__(self, target: TargetAlone) -> None:
        self.target = target
        self.asked: list[pb2.Open] = []
        self.ended = asyncio.Event()

    async def Generate(
        self, request: pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb2.GenerateResponse]:
        self.asked.append(request.open)
        model = self.target.model
        prompt = model.render_chat([Message("user", QUESTION)])
        opened = pb2.Opened(model="overlong", prompt_token_ids=prompt, max_tokens=MAX_TOKENS)
        opened.vocabulary_sha256 = model.vocabulary.sha256
        yield pb2.GenerateResponse(opened=opened)
        try:
            token = model.tokenize("a")[0]
            start = 0
            while True:
                tokens = Tokens(start, (token,) * 5, (model.piece(token),) * 5)
                yield pb2.GenerateResponse(tokens=wire.encode_tokens(tokens))
                start += 5
                await asyncio.sleep(0)
        finally:
            self.ended.set()


async def test_guidance_beyond_its_cap_is_cut_off_and_its_stream_ended(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    service = OverlongService(alone)
    server = grpc.aio.server()
    pb2_grpc.add_SpeculationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        asked = await ask(tiny_pair.draft_gguf, f"127.0.0.1:{port}")
        await asyncio.wait_for(service.ended.wait(), 10.0)
    finally:
        await server.stop(None)
    assert asked.answer.guidance_tokens == GUIDANCE
    assert Origin.LOCAL in origins(asked.answer)
    [opened] = service.asked
    assert opened.limits.max_tokens == opened.predicted_length == GUIDANCE


async def test_without_a_cloud_the_mode_fails_as_others_do(tiny_pair: TinyPair) -> None:
    async with agent_with(tiny_pair.draft_gguf, "127.0.0.1:1") as agent:
        with pytest.raises(CloudUnavailable, match=r"127\.0\.0\.1:1"):
            await agent.answer(QUESTION)


def breaks_after(num_tokens: int) -> ScriptedTarget:
    prompt = QUESTION.encode()

    def next_token(text: Sequence[int]) -> int:
        if len(text) == len(prompt) + num_tokens:
            raise CloudFailed("the target caught fire")
        return ord("a") + len(text) % 26

    return ScriptedTarget(next_token)


async def test_a_cloud_that_is_lost_while_it_guides_leaves_the_answer_to_the_edge(other_gguf: Path) -> None:
    async with serving(breaks_after(5)) as (address, servicer):
        asked = await ask(other_gguf, address)
        assert asked.answer.guidance_tokens == 5
        assert Origin.LOCAL in origins(asked.answer)
        [notice] = asked.notices
        assert notice.startswith(f"the edge model goes on after 5 of {GUIDANCE} tokens of guidance")
        assert servicer.num_streams == 0


async def test_on_outage_stop_keeps_what_was_shown_and_fails(other_gguf: Path) -> None:
    async with (
        serving(breaks_after(5)) as (address, _),
        agent_with(other_gguf, address, on_outage="stop") as agent,
        aclosing(agent.ask(QUESTION)) as events,
    ):
        shown = [await anext(events) for _ in range(6)]
        assert sum(isinstance(event, Token) for event in shown) >= 2
        with pytest.raises(CloudFailed, match="caught fire"):
            [event async for event in events]


async def test_an_answer_that_is_left_frees_its_slots(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    async with agent_with(tiny_pair.draft_gguf, service.address) as agent:
        for leave_at in (3, GUIDANCE, GUIDANCE + 3):
            num_tokens = 0
            async with aclosing(agent.ask(QUESTION)) as events:
                async for event in events:
                    num_tokens += isinstance(event, Token)
                    if num_tokens == leave_at:
                        break
            await eventually(lambda: service.is_idle)
            assert agent._edge is not None
            assert agent._edge.num_free_slots == 1


async def test_a_private_prompt_gets_no_guidance(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    async with agent_with(tiny_pair.draft_gguf, service.address) as agent:
        with pytest.raises(InvalidRequest, match="mode guide would send it away"):
            await agent.answer(QUESTION, private=True)
    assert service.target.num_jobs == 0


async def test_under_a_shaping_the_target_writes_alone(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    async with agent_with(tiny_pair.draft_gguf, service.address) as agent:
        answer = await agent.answer(QUESTION, shaping=Shaping(presence_penalty=1.0))
    assert answer.mode == "cloud"
    assert answer.reason is not None
    assert set(origins(answer)) == {Origin.CLOUD}
    assert answer.guidance_tokens == 0


async def test_auto_lets_the_target_begin_what_it_may_not_finish_for_the_money(
    tiny_pair: TinyPair, alone: TargetAlone, service: InProcessCloud
) -> None:
    budget = {"mode": "auto", "cloud_threshold": 0.0, "cloud_price": 1.0, "max_price": GUIDANCE / 1000}
    asked = await ask(tiny_pair.draft_gguf, service.address, **budget)
    answer = asked.answer
    assert answer.decision is not None
    assert (answer.mode, answer.decision.route.value) == ("guide", "guide")
    assert answer.guidance_tokens == GUIDANCE
    assert [token.id for token in answer.tokens][:GUIDANCE] == alone.complete(request(GUIDANCE))
    assert "over the budget" in "; ".join(answer.decision.reasons)


async def test_auto_does_without_guidance_where_the_cloud_is_busy(tiny_pair: TinyPair) -> None:
    budget = {"mode": "auto", "cloud_threshold": 0.0, "cloud_price": 1.0, "max_price": GUIDANCE / 1000}
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, max_wait_s=0.05) as service,
        service.servicer._guards.places.place("someone"),
    ):
        asked = await ask(tiny_pair.draft_gguf, service.address, **budget)
    assert asked.answer.guidance_tokens == 0
    assert set(origins(asked.answer)) == {Origin.LOCAL}


def test_the_command_shows_who_began_and_who_finished(tiny_pair: TinyPair, tmp_path: Path) -> None:
    async def run() -> tuple[str, dict[str, object]]:
        async with in_process_cloud(tiny_pair.target_gguf) as service:
            env = {
                "DUET_MODEL": str(tiny_pair.draft_gguf),
                "DUET_CLOUD": service.address,
                "DUET_THREADS": "1",
            }
            flags = ("ask", "--mode", "guide", "--guidance-tokens", "6", "--max-tokens", "16", QUESTION)
            seen = await asyncio.to_thread(run_duet, *flags, "--show-origin", folder=tmp_path, env=env)
            read = await asyncio.to_thread(run_duet, *flags, "--json", folder=tmp_path, env=env)
            assert (seen.returncode, seen.stderr, read.returncode) == (0, b"", 0)
            return seen.stdout.decode(), json.loads(read.stdout)

    seen, read = asyncio.run(run())
    assert seen.splitlines()[-1] == "cloud 6 · edge 10"
    assert (read["mode"], read["guidance_tokens"]) == ("guide", 6)


async def test_the_same_request_gets_the_same_answer(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    async with agent_with(tiny_pair.draft_gguf, service.address, temperature=0.8) as agent:
        first = await agent.answer(QUESTION)
        again = await agent.answer(QUESTION)
    assert [replace(token, logprob=None) for token in first.tokens] == [
        replace(token, logprob=None) for token in again.tokens
    ]
