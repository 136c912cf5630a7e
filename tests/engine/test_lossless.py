"""Speculation gives the target's own text, token for token, whatever is drafted and however it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from shared.messages import Draft, Finished, Message, Open, Opened
from shared.sampling import Sampling
from shared.session import EdgeSession, EdgeState
from tests.service import (
    TargetAlone,
    connection,
    generate,
    in_process_cloud,
    loaded_edge,
    speculate,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

NUM_PROMPTS = 200
MAX_TOKENS = 24
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(),
    Sampling(temperature=1.0, top_k=40),
    Sampling(),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(),
    Sampling(temperature=1.0, min_p=0.02, top_k=40, top_p=0.9),
)
WORDS = (
    *("the", "a", "river", "counts", "nine", "stones", "and", "while\nprint(x)", "3.14", "<b>"),
    *("Ärger", "über", "你好", "🦀", "émigré"),
)


def random_requests(num: int, seed: int) -> list[Open]:
    """Half greedy, half sampled."""
    rng = np.random.default_rng(seed)
    return [
        Open(
            prompt=(Message("user", " ".join(rng.choice(WORDS, rng.integers(1, 13)))),),
            sampling=SAMPLINGS[i % len(SAMPLINGS)],
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            max_tokens=MAX_TOKENS,
        )
        for i in range(num)
    ]


async def test_speculate_and_cloud_give_what_the_target_gives_alone(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    num_drafted = num_accepted = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for i, request in enumerate(random_requests(NUM_PROMPTS, seed=0)):
            expected = alone.complete(request)
            streamed = await generate(cloud, request)
            speculated = await speculate(edge, cloud, request, max_draft_tokens=1 + i % 8)
            assert streamed.token_ids == expected, request
            assert speculated.token_ids == expected, request
            assert streamed.reason is speculated.reason
            num_drafted += speculated.num_drafted
            num_accepted += speculated.num_accepted
    print(f"accepted {num_accepted} of {num_drafted} draft tokens ({num_accepted / num_drafted:.0%})")
    assert 0 < num_accepted < num_drafted


async def test_a_resume_from_any_point_gives_the_rest_of_the_same_text(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    rng = np.random.default_rng(1)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(24, seed=1):
            expected = alone.complete(request)
            cut = int(rng.integers(len(expected) + 1))
            resumed = replace(request, committed=tuple(expected[:cut]))
            assert (await speculate(edge, cloud, resumed, 4)).token_ids == expected[cut:]
            assert (await generate(cloud, resumed)).token_ids == expected[cut:]


@dataclass
class Pipeline:
    """An edge that drafts on without waiting: up to `burst` drafts go out before it reads a verdict."""

    edge: EdgeModel
    cloud: Cloud
    draft_tokens: int
    burst: int
    num_drafts: int = 0
    num_verdicts: int = 0
    num_rollbacks: int = 0
    _ahead: list[int] = field(default_factory=list)
    """Draft tokens in flight."""

    async def run(self, request: Open) -> list[int]:
        session = EdgeSession()
        session.send_open()
        self._ahead = []
        async with self.cloud.speculate(request, Meter()) as stream:
            session.receive_opened(stream.opened)
            while session.state is not EdgeState.DONE:
                for i in range(self.burst):
                    if session.state is EdgeState.DRAFTING:
                        await stream.send(await self._draft(session, stream.opened, request, i))
                        self.num_drafts += 1
                message = await stream.receive()
                if isinstance(message, Finished):
                    session.receive_finished(message)
                    continue
                commit = session.receive_verdict(message)
                self._ahead = [] if commit.rolled_back else self._ahead[message.num_scored :]
                self.num_verdicts += 1
                self.num_rollbacks += commit.rolled_back
        return session.committed

    async def _draft(self, session: EdgeSession, opened: Opened, request: Open, i: int) -> Draft:
        room = opened.max_tokens - session.position - 1
        proposals = await LlamaDrafter(self.edge).propose(
            [*opened.prompt_token_ids, *session.committed, *self._ahead],
            min(self.draft_tokens, room),
            sampling=request.sampling,
            seed=request.seed,
            start=session.position,
            end_token_ids=opened.end_token_ids,
        )
        drafted = [proposal.token_id for proposal in proposals]
        self._ahead += drafted
        ends = not drafted or drafted[-1] in opened.end_token_ids
        # Now and then the edge waits, so that bonus tokens occur too.
        return session.send_draft(drafted, more=not ends and i < self.burst - 1)


@pytest.mark.parametrize(("draft_tokens", "burst"), [(1, 4), (3, 3), (2, 50)])
async def test_drafts_that_do_not_wait_for_verdicts_give_the_same_text(
    tiny_pair: TinyPair, alone: TargetAlone, draft_tokens: int, burst: int
) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        pipeline = Pipeline(edge, cloud, draft_tokens, burst)
        for request in random_requests(24, seed=2):
            assert await pipeline.run(request) == alone.complete(request), request
        assert pipeline.num_rollbacks > 0
        assert pipeline.num_drafts > pipeline.num_verdicts, "drafts that wait together share a verdict"
