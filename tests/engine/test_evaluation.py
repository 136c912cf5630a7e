"""`duet eval` as a user runs it, on the tiny pair: runs that survive, and equal rows however made."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.edge_model import PROBE_SEQUENCES, EdgeModel
from edge_agent.evaluation.batch import Answered, Job, answer_all
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.service import (
    CONTEXT_TOKENS,
    RunningServer,
    TargetAlone,
    clean_environment,
    command,
    run_duet,
    running_cloud,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

Row = dict[str, Any]

NUM_QUESTIONS = 8
RAY_SCRIPT = Path(__file__).parents[2] / "deploy" / "ray" / "evaluate.sh"
PROBES = ("who", "bins")
SHORT = ("--max-tokens", "8", "--threads", "1")
MADE_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=512) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def run(home: Path, tiny_pair: TinyPair, service: RunningServer) -> Path:
    """A routing run of eight questions, made by one process."""
    folder = home / "run"
    asked(home, *routing(tiny_pair, service), "--limit", str(NUM_QUESTIONS), "--out", str(folder))
    return folder


def routing(pair: TinyPair, service: RunningServer) -> tuple[str, ...]:
    return (
        *("routing", "--data", "builtin", "--probes", ",".join(PROBES), *SHORT),
        *("--edge", str(pair.draft_gguf), "--cloud", service.address),
    )


def asked(home: Path, *arguments: str) -> str:
    """What `duet eval` prints."""
    done = run_duet("eval", *arguments, folder=home)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def refused(home: Path, *arguments: str) -> str:
    """The one line in which `duet eval` says why not."""
    done = run_duet("eval", *arguments, folder=home)
    assert done.returncode == 4, done.stderr.decode()
    [line] = done.stderr.decode().splitlines()
    return line


@contextmanager
def asking(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`duet eval` on its way; killed afterwards if it still runs."""
    process = subprocess.Popen(
        [command("duet"), "eval", *arguments],
        cwd=home,
        env=clean_environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MADE_WITHIN_S
    while not condition():
        assert process.poll() is None, "it ended first"
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.001)


def num_lines(folder: Path) -> int:
    return rows_file(folder).count(b"\n")


def rows_file(folder: Path) -> bytes:
    rows = folder / "rows.jsonl"
    return rows.read_bytes() if rows.exists() else b""


def manifest_of(folder: Path) -> Path:
    return folder / "manifest.json"


def rows_of(folder: Path) -> dict[str, Row]:
    """Rows by id; each is there once."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    counts = Counter(row["id"] for row in rows)
    assert max(counts.values()) == 1
    return {row["id"]: row for row in rows}


def same(made: dict[str, Row], expected: dict[str, Row]) -> bool:
    """Whether rows hold the same findings; what finding them cost depends on what the cache held.

    Numbers are rounded in the rows, so that the kernels' rounding may move them by one in the last place.
    """
    found, wanted = dict(_leaves(made)), dict(_leaves(expected))
    numbers = {place for place, value in wanted.items() if isinstance(value, float)}
    assert found.keys() == wanted.keys()
    assert {p: v for p, v in found.items() if p not in numbers} == {
        place: value for place, value in wanted.items() if place not in numbers
    }
    return [found[p] for p in numbers] == pytest.approx([wanted[p] for p in numbers], abs=1.01e-3)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in ("seconds", "num_evaluated"):
                yield from _leaves(part, f"{place}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{place}.{number}")
    else:
        yield place, value


# Routing


def test_routing_makes_a_row_a_question_with_both_answers_and_every_probe(run: Path) -> None:
    rows = rows_of(run)
    assert len(rows) == NUM_QUESTIONS
    for row in rows.values():
        assert set(row["values"]) == set(row["estimates"]) == set(PROBES)
        for answer in (row["edge"], row["cloud"]):
            assert 1 <= answer["tokens"] <= 8
            assert isinstance(answer["correct"], bool)


def test_the_manifest_says_what_was_asked_and_by_what(run: Path) -> None:
    manifest = json.loads(manifest_of(run).read_text("utf-8"))
    assert {"prompts_sha256", "items_sha256", "edge", "cloud", "probes"} <= manifest["identity"].keys()
    assert all("{question}" in prompt for prompt in manifest["about"]["prompts"].values())
    assert {"who", "ten-times"} <= manifest["about"]["prompts"].keys()
    assert manifest["about"]["versions"]["llama-cpp-python"]


def test_two_workers_make_the_rows_of_one(
    home: Path, tiny_pair: TinyPair, service: RunningServer, run: Path
) -> None:
    folder = home / "two-workers"
    arguments = ("--limit", str(NUM_QUESTIONS), "--workers", "2", "--out", str(folder))
    asked(home, *routing(tiny_pair, service), *arguments)
    assert same(rows_of(folder), rows_of(run))


def test_workers_on_ray_make_the_rows_of_one(
    home: Path, tiny_pair: TinyPair, service: RunningServer, run: Path
) -> None:
    folder = home / "ray"
    _, *arguments = routing(tiny_pair, service)
    done = subprocess.run(
        ["bash", RAY_SCRIPT, *arguments, "--limit", str(NUM_QUESTIONS), "--workers", "2", "--out", folder],
        cwd=home,
        env=clean_environment(home, {"DUET": command("duet"), "RAY_ADDRESS": "local"}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert same(rows_of(folder), rows_of(run))


# Runs that survive


def test_kills_again_and_again_cost_no_finished_question(
    home: Path, tiny_pair: TinyPair, service: RunningServer
) -> None:
    folder = home / "killed"
    arguments = (*routing(tiny_pair, service), "--parallel", "1", "--limit", "60", "--out", str(folder))
    finished = b""
    for num_rows in (0, 2, 9, 10, 35):  # 0: the manifest is there, and no row yet
        with asking(home, *arguments) as process:
            wait_for(process, lambda n=num_rows: num_lines(folder) >= n and manifest_of(folder).exists())
            process.kill()
            process.wait()
        left = rows_file(folder)
        assert left.startswith(finished)
        finished = left[: left.rfind(b"\n") + 1]
        assert num_rows <= finished.count(b"\n") < 60
    asked(home, *arguments)
    assert rows_file(folder).startswith(finished)
    assert len(rows_of(folder)) == 60


def with_cloud_killed(home: Path, pair: TinyPair, folder: Path, *arguments: str) -> dict[str, Row]:
    """Rows of a run whose cloud is killed after the first of them and comes back once it is missed."""
    flags = {"cache_type": "f32", "context_tokens": 512}
    with running_cloud(pair.target_gguf, **flags) as cloud:
        places = ("--edge", str(pair.draft_gguf), "--cloud", cloud.address, "--out", str(folder))
        with asking(home, *arguments, *SHORT, *places) as process:
            wait_for(process, lambda: num_lines(folder) >= 2)
            cloud.process.kill()
            cloud.process.wait()
            finished = (folder / "rows.jsonl").read_bytes()
            assert process.stderr is not None
            assert "waiting 1 s for the cloud" in next(process.stderr)
            with running_cloud(pair.target_gguf, **flags, listen=cloud.address):
                process.communicate(timeout=MADE_WITHIN_S)
            assert process.returncode == 0
    assert (folder / "rows.jsonl").read_bytes().startswith(finished[: finished.rfind(b"\n") + 1])
    return rows_of(folder)


def test_routing_waits_for_a_cloud_that_goes_away_and_loses_nothing(
    home: Path, tiny_pair: TinyPair, run: Path
) -> None:
    arguments = ("routing", "--probes", ",".join(PROBES), "--parallel", "1")
    rows = with_cloud_killed(home, tiny_pair, home / "routing-cloud-killed", *arguments)
    assert len(rows) == 60
    assert same({name: rows[name] for name in rows_of(run)}, rows_of(run))


def test_speculation_waits_for_a_cloud_that_goes_away_and_loses_nothing(
    home: Path, tiny_pair: TinyPair
) -> None:
    rows = with_cloud_killed(
        home, tiny_pair, home / "speculation-cloud-killed", "speculation", "--limit", "20"
    )
    assert set(Counter(row["setting"] for row in rows.values()).values()) == {20}
    assert all(row["agreement"] == 1.0 for row in rows.values() if row["policy"] == "lossless")


def test_a_policy_that_the_cloud_does_not_grant_is_no_setting_of_a_run(
    home: Path, tiny_pair: TinyPair, service: RunningServer
) -> None:
    line = refused(
        home,
        *("speculation", "--policy", "judge", "--limit", "1", *SHORT, "--out", str(home / "not-granted")),
        *("--edge", str(tiny_pair.draft_gguf), "--cloud", service.address),
    )
    assert "does not verify by policy judge" in line


def test_an_edge_file_that_changed_is_refused(
    home: Path, tiny_pair: TinyPair, service: RunningServer
) -> None:
    edge, folder = home / "edge.gguf", home / "edge-changed"
    arguments = (
        "routing",
        "--edge",
        str(edge),
        "--probes",
        "who",
        "--limit",
        "1",
        *SHORT,
        "--out",
        str(folder),
    )
    shutil.copy(tiny_pair.draft_gguf, edge)
    asked(home, *arguments, "--no-answer")
    shutil.copy(tiny_pair.target_gguf, edge)
    before = (folder / "rows.jsonl").read_bytes()
    assert "holds another run: edge.sha256 was" in refused(home, *arguments, "--no-answer")
    assert (folder / "rows.jsonl").read_bytes() == before


def test_a_cloud_with_another_model_is_refused(home: Path, tiny_pair: TinyPair, run: Path) -> None:
    with running_cloud(tiny_pair.draft_gguf, context_tokens=512) as other:
        line = refused(home, *routing(tiny_pair, other), "--limit", "20", "--out", str(run))
    assert 'cloud was "target" and is "draft"' in line
    assert num_lines(run) == NUM_QUESTIONS


# Answers that share passes


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_that_share_passes_are_those_of_the_model_alone(
    tiny_pair: TinyPair, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature)
    with closing(TargetAlone(tiny_pair.draft_gguf)) as alone:
        model = LlamaModel(tiny_pair.draft_gguf, "draft")
        prompts = [
            tuple(model.render_chat([Message("user", f"Question {i}" + " and more" * i)])) for i in range(9)
        ]
        jobs = [Job(str(i), prompt, 4 + 5 * i, sampling, seed=i) for i, prompt in enumerate(prompts)]
        context = LlamaContext(
            model,
            num_sequences=1 + PROBE_SEQUENCES + 4,
            context_tokens=CONTEXT_TOKENS,
            cache_tokens=8 * CONTEXT_TOKENS,
            rollback_tokens=0,
            threads=1,
            cache_type="f32",
        )
        found: dict[str, Answered] = {}
        answer_all(EdgeModel(model, context), jobs, lambda job, answer: found.update({job.key: answer}))
        assert not any(context.cached)
        context.close()
        model.close()
        for job in jobs:
            request = Open(prompt=job.prompt_ids, sampling=sampling, seed=job.seed, max_tokens=job.max_tokens)
            token_ids = alone.complete(request)
            answer = found[job.key]
            assert answer.text == alone.shown(token_ids)
            assert list(answer.token_ids) == token_ids
            assert answer.num_tokens == len(token_ids) == len(answer.logprobs)
            assert answer.censored == (token_ids[-1] not in alone.model.end_token_ids)
            likely = [logprob for _, logprob in alone.judged(request, token_ids)]
            assert answer.logprobs == pytest.approx(likely, abs=1e-3)


# Length, speculation, report


@pytest.fixture(scope="module")
def lengths(home: Path, tiny_pair: TinyPair) -> Path:
    folder = home / "length"
    arguments = ("--edge", str(tiny_pair.draft_gguf), "--probes", "bins", "--limit", "3", *SHORT)
    asked(home, "length", *arguments, "--temperature", "0", "--temperature", "0.7", "--out", str(folder))
    return folder


@pytest.fixture(scope="module")
def speculation(home: Path, tiny_pair: TinyPair, service: RunningServer) -> Path:
    folder = home / "speculation"
    arguments = ("--edge", str(tiny_pair.draft_gguf), "--cloud", service.address, "--limit", "3")
    drafts = ("--draft-tokens", "2", "--draft-tokens", "4", "--fallback", "0", "--fallback", "0.3")
    asked(
        home,
        *("speculation", *arguments, *drafts, "--max-tokens", "24", "--threads", "1", "--out", str(folder)),
    )
    return folder


def test_length_asks_every_question_under_every_condition(lengths: Path) -> None:
    rows = rows_of(lengths)
    conditions = Counter((row["prompt"], row["temperature"], row["seed"]) for row in rows.values())
    assert conditions == {
        (prompt, temperature, seed): 3
        for prompt in ("plain", "words-first-line")
        for temperature, seed in ((0.0, 0), (0.7, 0), (0.7, 1))
    }
    assert all(row["values"].keys() == {"bins"} for row in rows.values())
    assert all(0 <= row["tokens"] <= 8 for row in rows.values())


def test_lossless_speculation_gives_the_stream_in_no_more_target_passes(speculation: Path) -> None:
    rows = rows_of(speculation)
    by_setting = Counter(row["setting"] for row in rows.values())
    assert set(by_setting.values()) == {3}
    assert {name for name in by_setting if name.startswith("lossless")} == {
        *("lossless-2", "lossless-4", "lossless-2-fb0.3", "lossless-4-fb0.3")
    }
    lossless = [row for row in rows.values() if row["policy"] == "lossless"]
    for row in lossless:
        stream = rows[f"{row['item']}|cloud"]
        assert row["agreement"] == stream["agreement"] == 1.0
        assert row["committed"] == stream["committed"]
        assert row["target_passes"] <= stream["target_passes"]
    assert sum(row["accepted"] for row in lossless) > 0
    assert sum(row["rejections"] for row in lossless) > 0


def test_a_report_on_these_runs_is_written(home: Path, run: Path, lengths: Path, speculation: Path) -> None:
    asked(home, "report", str(run), str(lengths), str(speculation), "--out", "page")
    markdown = (home / "page" / "summary.md").read_text("utf-8")
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == [
        "## Routing",
        "## Answer length",
        "## Speculation",
    ]
    assert (home / "page" / "index.html").stat().st_size > 10_000
