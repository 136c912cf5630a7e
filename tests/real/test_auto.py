"""Mode `auto` on the real pair, with the shipped calibration and a live cloud."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edge_agent.agent import Agent
from edge_agent.edge_model import EdgeModel
from edge_agent.routing.router import load_router
from shared.config import DEFAULT_DRAFT, EdgeConfig
from shared.controller import Way
from shared.events import Answer, Event, Notice, Text
from shared.models import Registry
from shared.session import Origin
from tests.service import connection

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

PLAIN = "What is the capital of France?"
EXAM = "Which of these is a noble gas?\nA. Oxygen\nB. Neon\nC. Nitrogen\nD. Chlorine"
PROOF = "Prove that the square root of two is irrational."


@dataclass(frozen=True)
class Asked:
    answer: Answer
    events: list[Event]

    @property
    def shown(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))


async def ask(address: str, draft_path, question: str, **settings: object) -> Asked:
    raw = {"cloud": address, "context_tokens": 1024, "max_tokens": 48, "seed": 1, "threads": 2}
    config = EdgeConfig.model_validate(raw | settings)
    sha256 = str(Registry.load().entry(DEFAULT_DRAFT).sha256)
    edge = await EdgeModel.load(draft_path, DEFAULT_DRAFT, config)
    try:
        async with connection(address) as cloud:
            router = load_router(edge, cloud, config, lambda: sha256)
            events = [e async for e in Agent(config, edge=edge, cloud=cloud, router=router).ask(question)]
    finally:
        await edge.close()
    assert isinstance(events[-1], Answer)
    asked = Asked(events[-1], events)
    assert asked.shown == asked.answer.answer  # nothing that was shown was taken back
    assert not [event for event in events if isinstance(event, Notice)]
    decision = asked.answer.decision
    assert decision is not None
    print(f"{decision.route.value}: {'; '.join(decision.reasons)}\n{asked.answer.answer}")
    return asked


async def test_a_plain_fact_stays_here(real_cloud, draft_path):
    asked = await ask(real_cloud.address, draft_path, PLAIN)
    assert asked.answer.mode == "local"
    assert {token.origin for token in asked.answer.tokens} == {Origin.LOCAL}
    assert asked.answer.cloud_model is None
    assert "Paris" in asked.answer.answer


async def test_a_question_above_the_threshold_gets_the_targets_answer(real_cloud, draft_path):
    asked = await ask(real_cloud.address, draft_path, EXAM, cloud_threshold=0.2)
    # An unmeasured pair begins with the cloud's own stream; where that suffices, it stays the mode.
    assert asked.answer.mode == ("speculate" if asked.answer.rounds else "cloud")
    assert asked.answer.tokens[0].origin is Origin.CLOUD
    assert Origin.LOCAL not in {token.origin for token in asked.answer.tokens}
    assert asked.answer.speed is not None
    assert asked.answer.speed.ways[0].plan.way is Way.CLOUD
    assert asked.answer.cloud_model is not None


async def test_late_evidence_moves_a_running_answer_and_what_was_shown_stands(real_cloud, draft_path):
    local = await ask(real_cloud.address, draft_path, PROOF, doubt_threshold=0.0)
    assert local.answer.mode == "local"
    moved = await ask(real_cloud.address, draft_path, PROOF, doubt_threshold=0.8)
    assert moved.answer.mode == "speculate"
    assert moved.answer.decision is not None
    assert any("late evidence" in reason for reason in moved.answer.decision.reasons)
    origins = [token.origin for token in moved.answer.tokens]
    stands = origins.count(Origin.LOCAL)
    assert 0 < stands < len(origins)
    assert set(origins[:stands]) == {Origin.LOCAL}  # all at the beginning, as the edge wrote them
    assert moved.answer.tokens[:stands] == local.answer.tokens[:stands]
    assert set(origins[stands:]) <= {Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS}
    [first] = {event.origin for event in moved.events[:3] if isinstance(event, Text)}
    assert first is Origin.LOCAL
