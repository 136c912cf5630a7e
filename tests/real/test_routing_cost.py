"""The router's probes on the default edge model: what they cost, and that its words are not trusted."""

from __future__ import annotations

import pytest

from edge_agent.edge_model import EdgeModel
from edge_agent.routing.probes import default_probes
from edge_agent.routing.reading import QuestionReader
from edge_agent.routing.router import load_router
from shared.config import DEFAULT_DRAFT, EdgeConfig
from shared.messages import Message
from shared.models import Registry
from shared.routing import Route
from tests.service import connection

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

QUESTION = "Which planet has the most moons?\nA. Mars\nB. Venus\nC. Saturn\nD. Mercury"
MAX_EXTRA_TOKENS = 24


async def test_a_decision_reads_the_question_and_at_most_24_tokens_more(draft_path):
    edge = await EdgeModel.load(draft_path, DEFAULT_DRAFT, EdgeConfig(context_tokens=512))
    reader = QuestionReader(edge, {})
    question = reader.question([Message("user", QUESTION)])
    await edge.run(lambda: reader.read(question, default_probes()))  # measures the priors
    edge.context.align(0, [])
    before = edge.context.num_decoded_tokens
    readings = await edge.run(lambda: reader.read(question, default_probes()))
    extra = edge.context.num_decoded_tokens - before - len(question.token_ids)
    assert [reading.probe for reading in readings] == ["confidence", "letters", "who", "rating", "bins"]
    print(f"{extra} tokens more than the question's {len(question.token_ids)}")
    assert 0 < extra <= MAX_EXTRA_TOKENS
    await edge.close()


async def test_the_shipped_calibration_applies_and_needs_no_priors_of_its_own(draft_path):
    config = EdgeConfig(context_tokens=512, cloud="127.0.0.1:1")
    edge = await EdgeModel.load(draft_path, DEFAULT_DRAFT, config)
    sha256 = Registry.load().entry(DEFAULT_DRAFT).sha256
    async with connection(config.cloud) as cloud:
        router = load_router(edge, cloud, config, lambda: str(sha256))
        routing = await router.route([Message("user", QUESTION)], private="the test says so")
    prompt = edge.model.render_chat([Message("user", QUESTION)])
    assert edge.context.num_decoded_tokens <= len(prompt) + MAX_EXTRA_TOKENS
    assert routing.decision.route is Route.LOCAL
    assert 0.0 < routing.decision.p_cloud < 1.0
    assert not any("no calibration" in reason for reason in routing.decision.reasons)
    await edge.close()
