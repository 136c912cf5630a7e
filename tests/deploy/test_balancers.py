"""nginx and Envoy, real ones, as deploy/loadbalancer configures them, in front of two replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from benchmarks.balancers import envoy, nginx
from edge_agent.remote import Cloud, Meter
from shared.messages import Message, Open, Opened
from shared.sampling import Sampling
from tests.engine.test_survival import STEP_S, expected_answers, run_under
from tests.mortal import ForgetfulTarget, MortalCloud, mortal_clouds, tiny_target
from tests.service import TargetAlone

BALANCERS = [pytest.param(nginx, id="nginx"), pytest.param(envoy, id="Envoy")]
NUM_CHATS = 24


@pytest.fixture(scope="module")
def two_replicas() -> Iterator[list[str]]:
    """Scripted ones, which say who they are."""
    clouds = [MortalCloud(partial(NamedTarget, name)) for name in ("one", "other")]
    try:
        for cloud in clouds:
            cloud.start()
        yield [cloud.address for cloud in clouds]
    finally:
        for cloud in clouds:
            cloud.close()


class NamedTarget(ForgetfulTarget):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def chat(number: int, num_turns: int = 1) -> Open:
    turns = [Message("user", f"Question {number}")]
    for turn in range(1, num_turns):
        turns += [Message("assistant", "Yes."), Message("user", f"And {turn}?")]
    return Open(prompt=tuple(turns), sampling=Sampling(), seed=1, max_tokens=2)


async def who_answers(cloud: Cloud, request: Open) -> str:
    async for message in cloud.generate(request, Meter()):
        if isinstance(message, Opened):
            return message.model
    raise AssertionError("the stream was not opened")


async def homes(cloud: Cloud, num_turns: int = 1) -> list[str]:
    """Which replica answers each of the chats."""
    return [await who_answers(cloud, chat(number, num_turns)) for number in range(NUM_CHATS)]


@pytest.mark.parametrize("balancer", BALANCERS)
async def test_the_turns_of_a_chat_stay_on_one_replica_and_chats_are_spread(balancer, two_replicas, tmp_path):
    with balancer(two_replicas, tmp_path / "b") as running:
        async with running.cloud() as cloud:
            first = await homes(cloud)
            assert await homes(cloud, num_turns=2) == first
            assert await homes(cloud, num_turns=5) == first
    spread = Counter(first)
    assert min(spread["one"], spread["other"]) >= NUM_CHATS // 6


async def test_taking_a_replica_out_of_nginx_moves_only_its_own_chats(two_replicas, tmp_path):
    with nginx(two_replicas, tmp_path / "b") as running:
        async with running.cloud() as cloud:
            before = await homes(cloud)
            running.reload(two_replicas[:1])
            while set(await homes(cloud)) != {"one"}:
                pass  # old workers of nginx still take what comes on old connections
            running.reload(two_replicas)
            while "other" not in await homes(cloud):
                pass
            assert await homes(cloud) == before


@pytest.mark.engine
@pytest.mark.parametrize("balancer", BALANCERS)
async def test_replicas_that_are_killed_or_drain_behind_it_cost_no_token(balancer, tiny_pair, tmp_path: Path):
    with closing(TargetAlone(tiny_pair.target_gguf)) as alone:
        expected = expected_answers(alone, 12, seed=12)
    with (
        mortal_clouds(2, tiny_target(tiny_pair.target_gguf, step_s=STEP_S)) as clouds,
        balancer([cloud.address for cloud in clouds], tmp_path / "b") as running,
    ):
        tally = await run_under(clouds, running.cloud, tiny_pair, expected, num_kills=10, seed=3)
    print(f"{balancer.__name__}: {tally}")
    assert (tally.num_lost, tally.num_twice) == (0, 0)
    assert tally.num_resumed >= 3
