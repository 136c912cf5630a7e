"""The Python API, and every example of docs/python.md, on the tiny pair."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import edge_agent
from edge_agent import Answer, Message, Routed, SyncAgent, Text
from shared.errors import CloudUnavailable, InvalidRequest, UnknownSetting
from tests.service import RunningServer, clean_environment, running_cloud
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def cloud(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, context_tokens=512) as cloud:
        yield cloud


@pytest.fixture
def agent(tiny_pair: TinyPair, cloud: RunningServer) -> Iterator[SyncAgent]:
    with SyncAgent.open(
        model=str(tiny_pair.draft_gguf), cloud=cloud.address, context_tokens=512, max_tokens=16, threads=1
    ) as agent:
        yield agent


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_page_runs(
    tiny_pair: TinyPair, cloud: RunningServer, tmp_path: Path, example: str
) -> None:
    env = {"DUET_MODEL": str(tiny_pair.draft_gguf), "DUET_CLOUD": cloud.address, "DUET_CONTEXT_TOKENS": "512"}
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=clean_environment(tmp_path, env),
        capture_output=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr.decode()) == (0, "")
    assert ran.stdout.strip()


def test_the_import_is_light() -> None:
    code = "import sys, edge_agent; print({'grpc', 'llama_cpp', 'pydantic', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_every_name_that_is_offered_is_there_and_no_other() -> None:
    for name in edge_agent.__all__:
        assert getattr(edge_agent, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        _ = edge_agent.Agnet


def test_the_same_events_without_asyncio(agent: SyncAgent) -> None:
    events = list(agent.chat([Message("user", "hi")], mode="speculate"))
    assert events[0] == Routed("speculate")
    assert isinstance(events[-1], Answer)
    text = "".join(event.text for event in events if isinstance(event, Text))
    assert text == events[-1].answer == agent.answer("hi", mode="cloud").answer


def test_an_iteration_that_is_left_ends_its_request(agent: SyncAgent) -> None:
    for _ in range(3):  # there is one slot: a request that went on would keep it
        with closing(agent.ask("hi", mode="local", max_tokens=400)) as events:
            next(events)
    assert agent.answer("hi", mode="local").completion_tokens == 16


def test_threads_share_an_agent(agent: SyncAgent) -> None:
    alone = [agent.answer(f"Count to {i}", mode="local").answer for i in range(4)]
    together = [""] * 4

    def ask(i: int) -> None:
        together[i] = agent.answer(f"Count to {i}", mode="local").answer

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_plain_text_goes_on(agent: SyncAgent) -> None:
    *_, answer = agent.complete("Once upon", mode="speculate", max_tokens=4)
    assert isinstance(answer, Answer)
    assert answer.completion_tokens == 4


def test_what_a_request_may_not_change_is_named(agent: SyncAgent) -> None:
    for change, message in (
        ({"model": "x"}, "model is fixed once the agent is open"),
        ({"speed": 1}, "speed is not known"),
        ({"max_tokens": 0}, "max_tokens = 0 cannot be used"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            agent.answer("hi", **change)


def test_what_cannot_be_opened_says_why(tiny_pair: TinyPair) -> None:
    with pytest.raises(UnknownSetting, match="temprature"), SyncAgent.open(temprature=1):
        pass
    with pytest.raises(CloudUnavailable), SyncAgent.open(mode="cloud", cloud="127.0.0.1:1"):
        pass
    with (
        SyncAgent.open(mode="local", model=str(tiny_pair.draft_gguf), context_tokens=256) as agent,
        pytest.raises(InvalidRequest, match="needs a cloud"),
    ):
        agent.answer("hi", mode="cloud")
