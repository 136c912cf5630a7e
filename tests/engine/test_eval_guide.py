"""`duet eval guide` on the tiny pair: the answers of the modes themselves, from a cloud or a stored run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent import Agent
from edge_agent.edge_model import EdgeModel
from edge_agent.evaluation.items import load_items
from edge_agent.evaluation.routing import request_text
from shared.config import EdgeConfig
from tests.service import RunningServer, connection, run_duet, running_cloud
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

NUM_QUESTIONS = 4
LENGTHS = (3, 10)
MAX_TOKENS = 24
SHORT = ("--max-tokens", str(MAX_TOKENS), "--threads", "1", "--limit", str(NUM_QUESTIONS))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=512) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def run(home: Path, tiny_pair: TinyPair, service: RunningServer) -> Path:
    folder = home / "guide"
    lengths = [option for length in LENGTHS for option in ("--guidance-tokens", str(length))]
    edge = ("--edge", str(tiny_pair.draft_gguf), "--cloud", service.address)
    done = run_duet("eval", "guide", *edge, *lengths, *SHORT, "--out", str(folder), folder=home)
    assert done.returncode == 0, done.stderr.decode()
    return folder


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = map(json.loads, (folder / "rows.jsonl").read_text("utf-8").splitlines())
    return {(row["item"], row["setting"]): row for row in rows}


def test_every_question_is_answered_by_edge_cloud_and_each_length(run: Path) -> None:
    rows = rows_of(run)
    items = {item for item, _ in rows}
    assert len(items) == NUM_QUESTIONS
    assert set(rows) == {(item, s) for item in items for s in ("edge", "cloud", *map(str, LENGTHS))}
    for item in items:
        whole = rows[item, "cloud"]["target_tokens"]
        assert rows[item, "edge"]["target_tokens"] == 0
        for length in LENGTHS:
            assert rows[item, str(length)]["target_tokens"] == min(length, whole)


async def test_the_texts_are_those_of_mode_guide(
    run: Path, tiny_pair: TinyPair, service: RunningServer
) -> None:
    rows = rows_of(run)
    config = EdgeConfig(
        mode="guide", max_tokens=MAX_TOKENS, threads=1, context_tokens=512, cloud=service.address
    )
    edge = await EdgeModel.load(tiny_pair.draft_gguf, "draft", config)
    try:
        async with connection(service.address) as cloud:
            agent = Agent(config, edge=edge, cloud=cloud)
            for item in load_items("builtin", limit=NUM_QUESTIONS):
                for length in LENGTHS:
                    answer = await agent.answer(request_text(item), guidance_tokens=length)
                    assert rows[item.id, str(length)]["text"] == answer.answer
                    assert rows[item.id, str(length)]["target_tokens"] == answer.guidance_tokens
    finally:
        await edge.close()


def test_a_stored_run_gives_both_models_answers_and_no_cloud_is_asked(
    home: Path, tiny_pair: TinyPair, service: RunningServer
) -> None:
    stored, folder = home / "stored", home / "from-stored"
    edge = ("--edge", str(tiny_pair.draft_gguf))
    routing = ("--cloud", service.address, "--probes", "who", *SHORT, "--out", str(stored))
    assert run_duet("eval", "routing", *edge, *routing, folder=home).returncode == 0
    guide = ("eval", "guide", *edge, "--answers", str(stored), "--guidance-tokens", "3", "--out", str(folder))
    done = run_duet(*guide, *SHORT, "--cloud", "127.0.0.1:1", folder=home)
    assert done.returncode == 0, done.stderr.decode()
    rows = rows_of(folder)
    for line in map(json.loads, (stored / "rows.jsonl").read_text("utf-8").splitlines()):
        assert rows[line["id"], "cloud"]["text"] == line["cloud"]["text"]
        assert rows[line["id"], "edge"]["text"] == line["edge"]["text"]
    report = home / "report"
    done = run_duet("eval", "report", str(folder), "--out", str(report), folder=home)
    assert done.returncode == 0, done.stderr.decode()
    assert "tokens of guidance" in (report / "summary.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(
            ("--guidance-tokens", "24"), "leave nothing of --max-tokens 24", id="a guidance too long"
        ),
        pytest.param(("--guidance-tokens", "3", "--answers", "nowhere"), "nowhere holds no run", id="no run"),
        pytest.param(
            ("--guidance-tokens", "3", "--answers", "guide"), "is no routing run", id="another experiment"
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    home: Path, run: Path, tiny_pair: TinyPair, flags: tuple[str, ...], says: str
) -> None:
    out = ("--out", str(home / "refused"))
    done = run_duet("eval", "guide", "--edge", str(tiny_pair.draft_gguf), *flags, *SHORT, *out, folder=home)
    [line] = done.stderr.decode().splitlines()
    assert says in line
    assert done.returncode in (2, 4)
