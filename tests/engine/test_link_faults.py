"""The ways over a link that delays, stalls and breaks: still the target's text, and nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from benchmarks.link_proxy import LinkProxy, Phase, Schedule
from edge_agent.drafting.drafters import Drafters
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from edge_agent.resume import TargetStreams
from edge_agent.speeds import Speeds
from edge_agent.steps import Resumed, Step
from shared.config import EdgeConfig
from shared.errors import CloudUnavailable
from shared.events import Token
from shared.messages import Open
from shared.resumption import OnOutage
from shared.session import Origin
from tests.engine.test_lossless import random_requests
from tests.service import TargetAlone, connection, eventually, in_process_cloud, loaded_edge, unobserved
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

MAX_TOKENS = 60
STEP_S = 0.004
STALLING = Schedule(
    seed=1, phases=(Phase(rtt_ms=12, jitter_ms=8, mbit_per_s=2, stalls_per_s=4, stall_ms=40),)
)
BREAKING = Schedule(
    phases=(*(Phase(for_s=0.25, rtt_ms=6, jitter_ms=2), Phase(for_s=0.08, outage=True)) * 8, Phase(rtt_ms=6))
)
WAYS = (
    {"proactive": True, "max_draft_tokens": 2, "max_in_flight_tokens": 16},
    {"proactive": False, "max_draft_tokens": 4},
    {},
)
"""Two that are set, and what the controller chooses."""


def requests(num: int, seed: int) -> list[Open]:
    return [replace(request, max_tokens=MAX_TOKENS) for request in random_requests(num, seed)]


async def steps_of(
    edge: EdgeModel, cloud: Cloud, request: Open, speeds: Speeds, settings: dict[str, object]
) -> list[Step]:
    streams = TargetStreams(
        edge=edge,
        drafters=Drafters(edge),
        remote=cloud,
        config=EdgeConfig.model_validate({"on_outage": OnOutage.WAIT, **settings}),
        speeds=speeds,
        meter=Meter(),
        observed=unobserved(),
    )
    made: list[Step] = []
    while True:
        try:
            async with aclosing(streams.speculate(request, may_stream=True)) as steps:
                async for step in steps:
                    made.append(step)
            return made
        except CloudUnavailable:  # an answer that cannot even begin is an error, as it should be
            assert not made
            await cloud.back()


def tokens(steps: Sequence[Step]) -> list[int]:
    return [step.id for step in steps if isinstance(step, Token)]


async def test_delays_and_stalls_change_no_token(tiny_pair: TinyPair, alone: TargetAlone) -> None:
    origins: set[Origin] = set()
    async with (
        in_process_cloud(tiny_pair.target_gguf, step_s=STEP_S) as service,
        LinkProxy(STALLING, listen="127.0.0.1:0", to=service.address) as link,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(link.address) as cloud,
    ):
        speeds = Speeds()
        for i, request in enumerate(requests(9, seed=31)):
            steps = await steps_of(edge, cloud, request, speeds, WAYS[i % len(WAYS)])
            assert tokens(steps) == alone.complete(request), request
            origins |= {step.origin for step in steps if isinstance(step, Token)}
        await eventually(lambda: service.is_idle)
    assert {Origin.ACCEPTED, Origin.CORRECTION} <= origins


@pytest.mark.parametrize("on_outage", list(OnOutage)[:2], ids=lambda each: str(each.value))
async def test_outages_in_the_middle_of_answers_change_no_token(
    tiny_pair: TinyPair, alone: TargetAlone, on_outage: OnOutage
) -> None:
    num_resumed = 0
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=8, step_s=STEP_S) as service,
        LinkProxy(BREAKING, listen="127.0.0.1:0", to=service.address) as link,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(link.address) as cloud,
    ):
        speeds = Speeds()
        for i, request in enumerate(requests(12, seed=32)):
            settings = {**WAYS[i % len(WAYS)], "on_outage": on_outage}
            steps = await steps_of(edge, cloud, request, speeds, settings)
            assert tokens(steps) == alone.complete(request), request
            num_resumed += sum(isinstance(step, Resumed) for step in steps)
        await eventually(lambda: service.is_idle)
    print(f"{num_resumed} resumed")
    assert num_resumed > 0
