"""Drafts that are shown before they are verified: at once, replaced by each verdict, gone at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from edge_agent.agent import Agent
from edge_agent.routing.router import load_router
from shared.config import EdgeConfig
from shared.events import Answer, Event, Provisional, Round, Routed, Text
from shared.llama.model import LlamaModel
from tests.scripted_target import ScriptedTarget
from tests.service import CONTEXT_TOKENS, connection, in_process_cloud, loaded_edge, serving
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

QUESTION = "Name the three primary colours of light."


@asynccontextmanager
async def opened(pair: TinyPair, **settings: object) -> AsyncIterator[Agent]:
    """An agent over the tiny pair, in mode `speculate` unless the settings say otherwise."""
    async with in_process_cloud(pair.target_gguf) as service, connection(service.address) as cloud:
        config = EdgeConfig.model_validate(
            {
                "mode": "speculate",
                "cloud": service.address,
                "max_tokens": 48,
                "max_draft_tokens": 4,
                "threads": 1,
                "context_tokens": CONTEXT_TOKENS,
                **settings,
            }
        )
        async with loaded_edge(pair.draft_gguf, mode=config.mode) as edge:
            auto = config.mode == "auto"
            router = load_router(edge, cloud, config, lambda: "none", every=False) if auto else None
            yield Agent(config, edge=edge, cloud=cloud, router=router)


async def events_of(agent: Agent, *, provisional: bool = True, **settings: object) -> list[Event]:
    async with aclosing(agent.ask(QUESTION, provisional=provisional, **settings)) as events:
        return [event async for event in events]


def views(events: list[Event]) -> list[str]:
    """What a view shows after each event: committed text and, behind it, what is provisional."""
    committed, pending, seen = "", "", []
    for event in events:
        if isinstance(event, Text):
            committed, pending = committed + event.text, ""
        elif isinstance(event, Provisional):
            pending = event.text
        seen.append(committed + pending)
    return seen


@pytest.mark.parametrize("proactive", [True, False])
async def test_drafts_are_shown_before_their_verdict_and_the_text_stays_the_same(
    tiny_pair: TinyPair, proactive: bool
) -> None:
    async with opened(tiny_pair, proactive=proactive) as agent:
        plain = await events_of(agent, provisional=False)
        events = await events_of(agent)
    assert not any(isinstance(event, Provisional) for event in plain)
    [answer, expected] = [next(e for e in made if isinstance(e, Answer)) for made in (events, plain)]
    assert answer.answer == expected.answer == views(events)[-1]
    first_draft = next(i for i, event in enumerate(events) if isinstance(event, Provisional) and event.text)
    first_verdict = next(i for i, event in enumerate(events) if isinstance(event, Round))
    assert first_draft < first_verdict
    came_true = [
        event.num_tokens
        for event, view in zip(events, views(events), strict=True)
        if isinstance(event, Provisional) and answer.answer.startswith(view)
    ]
    assert max(came_true) > 1


async def test_nothing_is_provisional_at_the_end(tiny_pair: TinyPair) -> None:
    async with opened(tiny_pair) as agent:
        for stop in ((), ("e",)):
            events = await events_of(agent, stop=stop)
            last_shown = [event for event in events if isinstance(event, Text | Provisional)][-1]
            assert isinstance(last_shown, Text) or last_shown == Provisional("", 0)
            assert views(events)[-1] == next(e for e in events if isinstance(e, Answer)).answer


async def test_a_rejected_draft_is_taken_back(tiny_pair: TinyPair) -> None:
    model = LlamaModel(tiny_pair.draft_gguf, "draft")
    try:
        [letter] = model.tokenize("Q")
    finally:
        model.close()
    target = ScriptedTarget(lambda text: letter)  # which the draft does not say
    async with (
        serving(target) as (address, _),
        connection(address) as cloud,
        loaded_edge(tiny_pair.draft_gguf) as edge,
    ):
        target.vocabulary = edge.model.vocabulary
        config = EdgeConfig(mode="speculate", max_tokens=6, max_draft_tokens=3)
        events = await events_of(Agent(config, edge=edge, cloud=cloud))
    shown = views(events)
    assert shown[-1] == "Q" * 6
    assert any(not view.startswith("Q") for view in shown if view)


async def test_in_auto_the_tokens_that_are_held_back_are_shown(tiny_pair: TinyPair) -> None:
    async with opened(tiny_pair, mode="auto", cloud_threshold=1.0, doubt_threshold=0.01) as agent:
        events = await events_of(agent)
    routed = [event for event in events if isinstance(event, Routed)]
    assert [event.mode for event in routed] == ["local"]
    assert routed[0].decision is not None
    first_text = next(i for i, event in enumerate(events) if isinstance(event, Text))
    assert any(isinstance(event, Provisional) and event.text for event in events[:first_text])
    assert views(events)[-1] == next(e for e in events if isinstance(e, Answer)).answer


async def test_a_mode_that_verifies_nothing_shows_nothing_provisional(tiny_pair: TinyPair) -> None:
    async with opened(tiny_pair) as agent:
        for mode in ("local", "cloud"):
            events = await events_of(agent, mode=mode)
            assert events[0] == Routed(mode)
            assert not any(isinstance(event, Provisional) for event in events)
