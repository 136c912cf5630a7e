"""What an answer does while the cloud is away, and what the link's own faults do to it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from benchmarks.link_proxy import LinkProxy, Phase, Schedule
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud
from edge_agent.resume import TargetStreams
from edge_agent.steps import Drafted, Step
from shared.errors import CloudError, CloudUnavailable
from shared.events import Notice, Token
from shared.messages import FinishReason
from shared.resumption import OnOutage
from shared.session import Origin
from tests.engine.test_survival import (
    NUM_WORKERS,
    STEP_S,
    Expected,
    Killer,
    Tally,
    begun,
    expected_answers,
    follow,
    target_streams,
)
from tests.mortal import MortalCloud, mortal_clouds, tiny_target
from tests.service import TargetAlone, connection, loaded_edge, together
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

DEAD_LINK_S = 1.0
KIB_PER_S = 8 * 1024 / 1e6
"""In megabits."""
LINK_FAULTS = {
    "outages": [Phase(for_s=0.5), Phase(for_s=0.4, outage=True)] * 6,
    "resets": [Phase(for_s=0.2), Phase(for_s=0.01, outage=True)] * 15,
    "stalls of 2 s": [Phase(for_s=6.0, stalls_per_s=1.0, stall_ms=2000.0)],
    "1 KiB a second": [Phase(for_s=8.0, mbit_per_s=KIB_PER_S)],
}
ALL_FAULTS = [
    *(phase for name in ("outages", "resets") for phase in LINK_FAULTS[name][:6]),
    Phase(for_s=3.0, stalls_per_s=1.0, stall_ms=2000.0),
    Phase(for_s=3.0, mbit_per_s=KIB_PER_S),
]


@pytest.fixture(scope="module")
def expected(alone: TargetAlone) -> list[Expected]:
    """Long answers, so that they can be interrupted."""
    return [each for each in expected_answers(alone, 24, seed=7) if len(each.token_ids) > 40]


def streams_that(edge: EdgeModel, cloud: Cloud, on_outage: OnOutage, patience_s: float) -> TargetStreams:
    streams = target_streams(edge, cloud, patience_s=patience_s)
    return replace(
        streams, config=streams.config.model_copy(update={"on_outage": on_outage}), show_drafts=True
    )


async def broken_off(streams: TargetStreams, expected: Expected, break_it: object) -> list[Step]:
    """All steps of an answer whose cloud goes after ten tokens."""
    steps: list[Step] = []
    async with aclosing(streams.speculate(expected.request, may_stream=False)) as made:
        async for step in made:
            steps.append(step)
            if isinstance(step, Token) and sum(isinstance(s, Token) for s in steps) == 10:
                await asyncio.to_thread(break_it)
    return steps


async def kill_in_the_middle(
    streams: TargetStreams, expected: Expected, tally: Tally, cloud: MortalCloud
) -> None:
    async for _ in follow(streams.speculate(expected.request, may_stream=False), expected, tally):
        if tally.num_tokens == 10:
            cloud.kill()
            tally.killed_at_s = time.monotonic()


def token_ids(steps: list[Step], *, local: bool) -> list[int]:
    return [s.id for s in steps if isinstance(s, Token) and (s.origin is Origin.LOCAL) is local]


async def test_without_a_cloud_the_edge_ends_the_answer_and_says_which_part_is_its_own(
    tiny_pair: TinyPair, expected: list[Expected]
) -> None:
    each = expected[0]
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        async with loaded_edge(tiny_pair.draft_gguf) as edge, connection(cloud.address) as remote:
            streams = streams_that(edge, remote, OnOutage.CONTINUE, patience_s=1.5)
            steps = await broken_off(streams, each, cloud.kill)
    verified, own = token_ids(steps, local=False), token_ids(steps, local=True)
    assert verified == each.token_ids[: len(verified)]
    assert own
    assert isinstance(steps[-1], FinishReason)
    shown = [step for step in steps if isinstance(step, Drafted)]
    assert len(shown[-1].pieces) == len(own), "they were shown as provisional first"
    notices = [step.message for step in steps if isinstance(step, Notice)]
    assert "goes on until the cloud is back" in notices[0]
    assert f"the last {len(own)} tokens are the edge model's own" in notices[-1]
    kinds = [step.origin is Origin.LOCAL for step in steps if isinstance(step, Token)]
    assert kinds == sorted(kinds), "nothing verified follows what is not"


@pytest.mark.parametrize(
    ("on_outage", "at_least_s", "at_most_s"),
    [
        pytest.param(OnOutage.WAIT, 1.5, 20.0, id="wait: when the patience ends"),
        pytest.param(OnOutage.STOP, 0.0, 1.4, id="stop: at once"),
    ],
)
async def test_an_answer_that_must_not_go_on_alone_fails_and_what_is_committed_stands(
    tiny_pair: TinyPair, expected: list[Expected], on_outage: OnOutage, at_least_s: float, at_most_s: float
) -> None:
    tally = Tally()
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        async with loaded_edge(tiny_pair.draft_gguf) as edge, connection(cloud.address) as remote:
            streams = streams_that(edge, remote, on_outage, patience_s=1.5)
            with pytest.raises(CloudUnavailable):
                await kill_in_the_middle(streams, expected[0], tally, cloud)
            assert at_least_s <= time.monotonic() - tally.killed_at_s <= at_most_s
    assert tally.num_twice == 0


async def test_a_connection_that_is_open_and_dead_is_noticed_in_the_time_that_is_set(
    tiny_pair: TinyPair, expected: list[Expected]
) -> None:
    tally = Tally()
    gap_s = last = 0.0
    with mortal_clouds(2, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as clouds:
        addresses = ",".join(cloud.address for cloud in clouds)
        remote = Cloud(addresses, connect_timeout_s=5.0, silence_timeout_s=60.0, dead_link_s=DEAD_LINK_S)
        async with loaded_edge(tiny_pair.draft_gguf) as edge, remote:
            streams = streams_that(edge, remote, OnOutage.WAIT, patience_s=30.0)
            async for _ in follow(
                streams.speculate(expected[0].request, may_stream=False), expected[0], tally
            ):
                gap_s, last = max(gap_s, time.monotonic() - (last or time.monotonic())), time.monotonic()
                if tally.num_tokens == 10:
                    clouds[0].freeze()
        clouds[0].thaw()
    print(f"a dead connection cost {gap_s:.2f} s, dead_link_s is {DEAD_LINK_S:g}: {tally}")
    assert (tally.num_lost, tally.num_twice) == (0, 0)
    assert gap_s < 2 * DEAD_LINK_S


async def test_a_replica_of_another_model_does_not_take_an_answer_over(
    tiny_pair: TinyPair, expected: list[Expected]
) -> None:
    tally = Tally()
    with (
        mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [right],
        mortal_clouds(1, tiny_target(tiny_pair.draft_gguf, step_s=STEP_S)) as [other],
    ):
        async with (
            loaded_edge(tiny_pair.draft_gguf) as edge,
            connection(f"{right.address},{other.address}") as remote,
        ):
            streams = streams_that(edge, remote, OnOutage.WAIT, patience_s=1.5)
            with pytest.raises(CloudError):
                await kill_in_the_middle(streams, expected[0], tally, right)
    assert tally.num_twice == 0
    assert tally.num_tokens >= 10


async def follow_through(
    pair: TinyPair, address: str, expected: list[Expected], seconds: float, token: object = None
) -> Tally:
    """Answers of all kinds for so long, each to its end."""
    tally = Tally()
    ends_s = time.monotonic() + seconds
    async with loaded_edge(pair.draft_gguf) as edge, connection(address) as cloud:

        async def work(worker: int) -> None:
            i = worker
            while time.monotonic() < ends_s:
                streams = target_streams(edge, cloud, i)
                each = expected[i % len(expected)]

                def make(streams: TargetStreams = streams, each: Expected = each, i: int = i) -> object:
                    if i % 3 == 2:
                        return streams.cloud(each.request)
                    return streams.speculate(each.request, may_stream=False)

                async with aclosing(await begun(cloud, make)) as steps:
                    async for _ in follow(steps, each, tally):
                        if token is not None:
                            token()
                i += NUM_WORKERS

        await together(*(work(worker) for worker in range(NUM_WORKERS)))
    return tally


@pytest.mark.parametrize("fault", LINK_FAULTS)
async def test_faults_of_the_link_lose_no_token_and_repeat_none(
    tiny_pair: TinyPair, expected: list[Expected], fault: str
) -> None:
    phases = LINK_FAULTS[fault]
    seconds = sum(phase.for_s for phase in phases)
    schedule = Schedule(phases=(*phases, Phase()))
    with mortal_clouds(1, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as [cloud]:
        async with LinkProxy(schedule, listen="127.0.0.1:0", to=cloud.address) as link:
            tally = await follow_through(tiny_pair, link.address, expected, seconds)
    print(f"{fault}: {tally}")
    assert tally.num_streams > 0
    assert (tally.num_lost, tally.num_twice) == (0, 0)


@pytest.mark.parametrize(
    "repeats", [1, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
async def test_answers_are_the_targets_own_under_all_faults_at_once(
    tiny_pair: TinyPair, alone: TargetAlone, repeats: int
) -> None:
    """The lossless property of tests/engine/test_lossless.py, with kills and hand-overs on a failing link."""
    expected = expected_answers(alone, 24, seed=11)
    phases = ALL_FAULTS * repeats
    schedule = Schedule(phases=(*phases, Phase()))
    with mortal_clouds(2, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as clouds:
        async with LinkProxy(schedule, listen="127.0.0.1:0", to=clouds[0].address) as link:
            killer = Killer(clouds, num_kills=1000, seed=5)
            killing = asyncio.create_task(killer.run())
            try:
                tally = await follow_through(
                    tiny_pair,
                    f"{link.address},{clouds[1].address}",
                    expected,
                    sum(phase.for_s for phase in phases),
                    killer.token,
                )
            finally:
                killing.cancel()
                await asyncio.gather(killing, return_exceptions=True)
    print(f"all faults at once: {tally}")
    assert tally.num_streams > 0
    assert tally.num_resumed > 0
    assert (tally.num_lost, tally.num_twice) == (0, 0)
