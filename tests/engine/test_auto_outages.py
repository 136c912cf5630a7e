"""Mode `auto` while the cloud goes and returns: no token lost, none twice, and nothing private sent later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field

import pytest

from edge_agent.agent import Agent
from edge_agent.routing.router import load_router
from shared.config import EdgeConfig
from shared.events import Answer, Event, Notice, Routed, Token
from shared.messages import Message, Open
from shared.resumption import OnOutage
from shared.sampling import Sampling
from shared.session import Origin
from tests.engine.test_survival import STEP_S
from tests.mortal import MortalCloud, mortal_clouds, tiny_target
from tests.service import CONTEXT_TOKENS, TargetAlone, connection, loaded_edge
from tests.tiny_pair import TinyPair
from tests.wiretap import wiretap

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."
SECRET = "The harbour master's unlisted number is the square of 1871."
SEED = 11
MAX_TOKENS = 60
EAGER = {"cloud_threshold": 0.0}
"""Sends all it may."""
DOUBTFUL = {"cloud_threshold": 1.0, "doubt_threshold": 0.4}
"""Begins at the edge and moves in the middle."""
AWAY_S = 0.5


@dataclass
class Asked:
    """What came of a request so far."""

    tokens: list[Token] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def num_from_cloud(self) -> int:
        return sum(token.origin is not Origin.LOCAL for token in self.tokens)

    def take(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Notice):
            self.notices.append(event.message)
        elif isinstance(event, Routed):
            self.routes.append(event.mode)
        elif isinstance(event, Answer):
            self.answer = event


@asynccontextmanager
async def automatic(pair: TinyPair, address: str, **settings: object) -> AsyncIterator[Agent]:
    """`duet ask --mode auto`, in this process."""
    config = EdgeConfig.model_validate(
        {
            "cloud": address,
            "mode": "auto",
            "threads": 1,
            "context_tokens": CONTEXT_TOKENS,
            "max_tokens": MAX_TOKENS,
            "seed": SEED,
            **settings,
        }
    )
    async with loaded_edge(pair.draft_gguf, **dict(config)) as edge, connection(address) as cloud:
        yield Agent(
            config, edge=edge, cloud=cloud, router=load_router(edge, cloud, config, lambda: "", every=False)
        )


async def ask(
    agent: Agent, question: str, then: Callable[[Asked], object] = lambda _: None, **settings: object
) -> Asked:
    """
    Args:
        then: called, and awaited, after each event.
    """
    asked = Asked()
    async with aclosing(agent.ask(question, **settings)) as events:
        async for event in events:
            asked.take(event)
            if asyncio.iscoroutine(waits := then(asked)):
                await waits
    return asked


class Outage:
    """Kills a cloud once a condition holds, and starts it again a little later."""

    def __init__(self, cloud: MortalCloud, due: Callable[[Asked], bool]) -> None:
        self._cloud, self._due = cloud, due
        self._coming_back: asyncio.Task[None] | None = None

    async def __call__(self, asked: Asked) -> None:
        if self._coming_back is None and self._due(asked):
            await asyncio.to_thread(self._cloud.kill)
            self._coming_back = asyncio.create_task(self._come_back())

    async def _come_back(self) -> None:
        await asyncio.sleep(AWAY_S)
        await asyncio.to_thread(self._cloud.start)

    async def over(self) -> None:
        assert self._coming_back is not None, "there was an outage"
        await self._coming_back


def rest_by_target(pair: TinyPair, tokens: list[Token], stands: int) -> list[int]:
    """What the target alone writes after the first tokens of an answer."""
    with closing(TargetAlone(pair.target_gguf)) as alone:
        prompt = alone.model.render_chat([Message("user", QUESTION)])
        prompt += [token.id for token in tokens[:stands]]
        return alone.complete(
            Open(prompt=tuple(prompt), sampling=Sampling(), seed=SEED, max_tokens=MAX_TOKENS - stands)
        )


@pytest.mark.parametrize("on_outage", [OnOutage.WAIT, OnOutage.CONTINUE])
async def test_an_answer_that_the_router_sent_away_survives_an_outage(
    tiny_pair: TinyPair, on_outage: OnOutage
) -> None:
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        outage = Outage(cloud, lambda asked: len(asked.tokens) >= 10)
        async with automatic(tiny_pair, cloud.address, on_outage=on_outage, **EAGER) as agent:
            asked = await ask(agent, QUESTION, outage)
        await outage.over()
    assert asked.answer is not None
    assert Origin.LOCAL not in {token.origin for token in asked.tokens}
    assert [token.id for token in asked.tokens] == rest_by_target(tiny_pair, asked.tokens, 0)


@pytest.mark.parametrize("num_verified", [0, 1, 12])
@pytest.mark.parametrize("on_outage", [OnOutage.WAIT, OnOutage.CONTINUE])
async def test_an_answer_that_late_evidence_has_moved_survives_an_outage(
    tiny_pair: TinyPair, on_outage: OnOutage, num_verified: int
) -> None:
    """What the edge had shown stands, and the rest is the target's own: none lost, none twice."""
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        outage = Outage(
            cloud, lambda asked: asked.routes[-1:] != ["local"] and asked.num_from_cloud >= num_verified
        )
        async with automatic(tiny_pair, cloud.address, on_outage=on_outage, **DOUBTFUL) as agent:
            asked = await ask(agent, QUESTION, outage)
        await outage.over()
    assert asked.routes[0] == "local"
    assert asked.routes[-1] in ("speculate", "cloud")
    origins = [token.origin is Origin.LOCAL for token in asked.tokens]
    stands = origins.count(True)
    assert origins == [True] * stands + [False] * (len(origins) - stands)
    assert [token.id for token in asked.tokens[stands:]] == rest_by_target(tiny_pair, asked.tokens, stands)


async def test_doubt_that_finds_the_cloud_gone_ends_the_answer_here_and_says_so(tiny_pair: TinyPair) -> None:
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        async with automatic(tiny_pair, cloud.address, **DOUBTFUL) as agent:
            alone = await ask(agent, QUESTION, doubt_threshold=0.0)

            def kill(asked: Asked) -> None:
                if asked.routes and cloud.runs:
                    cloud.kill()

            asked = await ask(agent, QUESTION, kill)
    assert asked.routes == ["local"]
    assert [token.id for token in asked.tokens] == [token.id for token in alone.tokens]
    assert any("the cloud cannot help" in notice for notice in asked.notices)


@pytest.mark.parametrize("on_outage", list(OnOutage))
async def test_a_private_prompt_is_not_sent_later_when_the_cloud_is_back(
    tiny_pair: TinyPair, on_outage: OnOutage
) -> None:
    """Asked while the cloud is away, answered while it comes back, followed by a prompt that may leave."""
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=0.0)) as [cloud]:
        async with (
            wiretap(cloud.address) as tap,
            automatic(tiny_pair, tap.address, on_outage=on_outage, **EAGER) as agent,
        ):
            await ask(agent, QUESTION)
            assert QUESTION.encode() in tap.received, "the tap sees what is sent"
            cloud.kill()
            assert (await ask(agent, QUESTION)).routes == ["local"]
            before = tap.num_call_bytes
            assert before > 0

            async def bring_back(asked: Asked) -> None:
                if len(asked.tokens) == 10 and not cloud.runs:
                    await asyncio.to_thread(cloud.start)

            private = await ask(agent, SECRET, bring_back, private=True)
            assert private.routes == ["local"]
            assert cloud.runs
            await asyncio.sleep(1.0)  # anything that waited for the cloud would have found it
            assert tap.num_call_bytes == before
            later = await ask(agent, "And now?")
            assert later.num_from_cloud > 0
    assert SECRET.encode() not in tap.received
    assert private.answer is not None
    assert private.answer.answer.encode() not in tap.received
