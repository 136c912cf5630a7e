"""Ways to the target's own answer, changed in the middle of it by a controller that measures real streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.auto import with_fallbacks
from edge_agent.drafting.drafters import Drafters
from edge_agent.edge_model import EdgeModel
from edge_agent.fastest import fastest
from edge_agent.remote import Cloud, Meter
from edge_agent.resume import TargetStreams
from edge_agent.speeds import Speeds, speeds_file
from edge_agent.steps import Step
from shared.config import EdgeConfig
from shared.controller import Chosen, Plan, SpeedController, Way
from shared.events import Answer, Round, Token
from shared.messages import FinishReason, Open
from shared.routing import Decision, Route
from shared.sampling import Sampling
from shared.session import Origin
from tests.engine.test_lossless import random_requests
from tests.service import (
    TargetAlone,
    connection,
    eventually,
    in_process_cloud,
    loaded_edge,
    run_duet,
    unobserved,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

PLANS = (
    Plan(Way.CLOUD, 0, 0, None, "best"),
    Plan(Way.STOP_AND_WAIT, 3, 3, None, "best"),
    Plan(Way.PROACTIVE, 2, 9, None, "best"),
    Plan(Way.CLOUD, 0, 0, None, "best"),
    Plan(Way.PROACTIVE, 1, 4, None, "best"),
    Plan(Way.STOP_AND_WAIT, 5, 5, None, "best"),
)


class Restless(SpeedController):
    """Measures as it should, and takes another way after every few observations."""

    def __init__(self, plans: Sequence[Plan], every: int) -> None:
        super().__init__()
        self._plans, self._every = plans, every

    def plan(self) -> Plan:
        return next(islice(cycle(self._plans), self._num_observed // self._every, None))


class Scripted(Speeds):
    def __init__(self, controller: SpeedController) -> None:
        super().__init__()
        self._controller = controller


def config(**settings: object) -> EdgeConfig:
    return EdgeConfig.model_validate({"threads": 1, "context_tokens": 512, **settings})


async def made(
    edge: EdgeModel,
    cloud: Cloud,
    request: Open,
    speeds: Speeds,
    *,
    may_stream: bool = True,
    **settings: object,
) -> list[Step]:
    steps = fastest(
        Drafters(edge), cloud, request, config(**settings), speeds, Meter(), may_stream=may_stream
    )
    async with aclosing(steps):
        return [step async for step in steps]


def tokens(steps: Sequence[Step]) -> list[int]:
    return [step.id for step in steps if isinstance(step, Token)]


# The same text, whatever the ways


@pytest.mark.parametrize("every", [1, 2, 5])
async def test_an_answer_that_changes_its_way_is_the_targets_own(
    tiny_pair: TinyPair, alone: TargetAlone, every: int
) -> None:
    num_ways, origins = 0, set()
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(16, seed=21):
            # Long enough for several looks at the stream, 8 tokens each.
            request = replace(request, max_tokens=60)
            steps = await made(edge, cloud, request, Scripted(Restless(PLANS, every)))
            assert tokens(steps) == alone.complete(request), request
            assert isinstance(steps[-1], FinishReason)
            chosen = [step for step in steps if isinstance(step, Chosen)]
            num_ways = max(num_ways, len(chosen))
            positions = [step.position for step in chosen]
            assert positions == sorted(positions)
            assert positions[0] == 0
            origins |= {step.origin for step in steps if isinstance(step, Token)}
        await eventually(lambda: service.is_idle)
    assert num_ways >= 3
    assert {Origin.CLOUD, Origin.ACCEPTED, Origin.CORRECTION} <= origins


async def test_a_resumed_answer_goes_on_in_any_way(tiny_pair: TinyPair, alone: TargetAlone) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for cut, request in enumerate(random_requests(8, seed=22)):
            expected = alone.complete(request)
            resumed = replace(request, committed=tuple(expected[:cut]))
            steps = await made(edge, cloud, resumed, Scripted(Restless(PLANS, 1)))
            assert tokens(steps) == expected[cut:]


@pytest.mark.parametrize("num_before", [0, 3, 12, 30])
async def test_leaving_in_the_middle_frees_every_slot(tiny_pair: TinyPair, num_before: int) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, step_s=0.002) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(6, seed=23):
            steps = fastest(
                Drafters(edge),
                cloud,
                request,
                config(),
                Scripted(Restless(PLANS, 1)),
                Meter(),
                may_stream=True,
            )
            async with aclosing(steps):
                seen = 0
                async for step in steps:
                    seen += isinstance(step, Token)
                    if seen >= num_before:
                        break
            await eventually(lambda: service.is_idle)
            await eventually(edge._worker._thread._work_queue.empty)


# What is measured, and what follows


async def test_the_first_answer_measures_every_way_and_the_next_knows_them(
    tiny_pair: TinyPair, alone: TargetAlone
) -> None:
    speeds = Speeds()
    request = replace(random_requests(1, seed=24)[0], sampling=Sampling(), max_tokens=120)
    async with (
        in_process_cloud(tiny_pair.target_gguf, step_s=0.004) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        first = await made(edge, cloud, request, speeds)
        assert tokens(first) == alone.complete(request)
        ways = [step.plan for step in first if isinstance(step, Chosen)]
        assert [plan.why for plan in ways[:2]] == ["warm-up", "warm-up"]
        assert [plan.way for plan in ways[:2]] == [Way.CLOUD, Way.STOP_AND_WAIT]
        second = await made(edge, cloud, request, speeds)
        assert tokens(second) == alone.complete(request)
        assert next(step for step in second if isinstance(step, Chosen)).plan.why in ("best", "kept")
    measured = speeds.report(()).measured
    for name in ("draft_ms", "round_trip_ms", "stream_ms"):
        assert measured[name] > 0, name
    assert measured["stream_ms"] >= 4
    assert set(measured["tokens_per_s"]) == {"cloud", "stop_and_wait", "proactive"}


async def test_without_the_stream_only_drafts_are_tried(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(6, seed=25):
            steps = await made(edge, cloud, request, Speeds(), may_stream=False)
            assert Origin.CLOUD not in {step.origin for step in steps if isinstance(step, Token)}


async def test_what_the_user_set_is_kept(tiny_pair: TinyPair) -> None:
    speeds = Speeds()
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        for request in random_requests(8, seed=26):
            steps = await made(
                edge, cloud, request, speeds, may_stream=False, max_draft_tokens=3, proactive=False
            )
            assert max(step.num_drafted for step in steps if isinstance(step, Round)) == 3
            [chosen] = [step for step in steps if isinstance(step, Chosen)]
            assert chosen.plan == Plan(Way.STOP_AND_WAIT, 3, 3, None, "set")


async def test_two_answers_at_once_do_not_share_a_plan(tiny_pair: TinyPair) -> None:
    speeds = Speeds()
    choices = config().choices(stream=True)
    with speeds.answer(choices) as first, speeds.answer(choices) as second:
        assert first is not second
        second.observe_round_trip(9.0)
    with speeds.answer(choices) as third:
        assert third is first
        assert third.measured()["round_trip_ms"] is None


async def test_the_route_speculate_may_become_the_stream_and_says_so(tiny_pair: TinyPair) -> None:
    decision = Decision(route=Route.SPECULATE, p_cloud=1.0, predicted_tokens=40, reasons=("hard",))
    request = replace(random_requests(1, seed=27)[0], sampling=Sampling(), max_tokens=6)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        streams = TargetStreams(
            edge=edge,
            drafters=Drafters(edge),
            remote=cloud,
            config=config(),
            speeds=Speeds(),
            meter=Meter(),
            observed=unobserved(),
        )
        async with aclosing(with_fallbacks(edge, streams, request, decision)) as steps:
            made_of = [step async for step in steps]
    # 6 tokens are fewer than a look at the stream, with which an unmeasured pair begins.
    assert {step.origin for step in made_of if isinstance(step, Token)} == {Origin.CLOUD}
    assert [step.plan.way for step in made_of if isinstance(step, Chosen)] == [Way.CLOUD]


# Between processes


async def test_speeds_are_kept_in_a_file_for_the_next_process(tiny_pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "speeds" / "pair.json"
    request = replace(random_requests(1, seed=28)[0], sampling=Sampling(), max_tokens=120)
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf) as edge,
        connection(service.address) as cloud,
    ):
        await made(edge, cloud, request, Speeds(file))
        steps = await made(edge, cloud, request, Speeds(file))
        assert next(step for step in steps if isinstance(step, Chosen)).plan.why != "warm-up"
        assert len(file.read_bytes()) < 10_000
        assert [path.name for path in file.parent.iterdir()] == [file.name]

        saved = json.loads(file.read_text())
        file.write_text(json.dumps({**saved, "cloud_model": "another"}))
        steps = await made(edge, cloud, request, Speeds(file))
        assert [step.plan.why for step in steps if isinstance(step, Chosen)][1] == "warm-up"
        assert json.loads(file.read_text())["cloud_model"] == saved["cloud_model"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"state": {"draft_s": [-1]}}', b"[]"])
def test_a_file_that_cannot_be_read_is_started_anew(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pair.json"
    file.write_bytes(content)
    with Speeds(file).answer(config().choices(stream=True)) as controller:
        assert not controller.is_warm
    assert json.loads(file.read_text())["state"]["draft_s"] == []


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with Speeds(tmp_path / "file" / "pair.json").answer(config().choices(stream=True)):
        pass


def test_each_pair_address_and_policy_has_a_file_of_its_own() -> None:
    named = [
        config(),
        config(model="another"),
        config(cloud="127.0.0.1:1"),
        config(policy="bild"),
        config(drafters=("model", "lookup")),
    ]
    assert len({speeds_file(each) for each in named}) == len(named)


# What a user sees


async def test_an_answer_reports_its_ways(tiny_pair: TinyPair) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf) as service,
        loaded_edge(tiny_pair.draft_gguf, mode="speculate") as edge,
        connection(service.address) as cloud,
    ):
        agent = Agent(config(mode="speculate", max_tokens=60, seed=1), edge=edge, cloud=cloud)
        async with aclosing(agent.ask("Tell me a story.")) as events:
            [answer] = [event async for event in events if isinstance(event, Answer)]
    assert answer.speed is not None
    assert answer.speed.ways[0].position == 0
    assert answer.speed.measured["acceptance_rate"] > 0
    assert any(line.startswith("chosen: ") for line in answer.speed.explanation)


async def test_explain_says_why_on_standard_error_and_keeps_the_answer_clean(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    async with in_process_cloud(tiny_pair.target_gguf) as service:
        flags = ("--mode", "speculate", "--cloud", service.address, "--model", str(tiny_pair.draft_gguf))
        plain, explained = [
            await asyncio.to_thread(
                run_duet, "ask", "Tell me a story.", *flags, "--seed", "1", *extra, folder=tmp_path
            )
            for extra in ((), ("--explain",))
        ]
    assert explained.returncode == 0
    assert explained.stdout == plain.stdout
    assert plain.stderr == b""
    lines = explained.stderr.decode().splitlines()
    assert all(line.startswith("duet: ") for line in lines)
    for part in ("from token 0 on: ", "a round trip takes ", "of draft tokens agree", "chosen: "):
        assert any(part in line for line in lines), part
