"""Runs of `duet eval` on disk: what survives, what is refused, and what is made of them without a model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_agent.evaluation import cloud_answers, runs
from edge_agent.evaluation.cloud_answers import CloudAnswers
from edge_agent.evaluation.collect import collect
from edge_agent.evaluation.crossfit import SINGLE
from edge_agent.evaluation.feature_sets import feature_sets, with_course
from edge_agent.evaluation.items import Item, Kind
from edge_agent.evaluation.pairing import pair_runs
from edge_agent.evaluation.plan import Examine, Unit
from edge_agent.evaluation.runs import Row, Run, read_run
from edge_agent.evaluation.speculation import agreement, grid
from edge_agent.remote import Meter
from shared.errors import (
    CloudFailed,
    CloudOverloaded,
    CloudUnavailable,
    InvalidRequest,
    ModelFileInvalid,
    VerifyTimeout,
)
from shared.messages import Finished, FinishReason, Message, Open, Opened, Policy, Tokens, Usage
from tests.eval_runs import routing_rows, write_run

IDENTITY = {"experiment": "routing", "edge": {"model": "small", "sha256": "ab"}, "probes": ["who"]}


def opened(folder: Path, **changes: Any) -> Run:
    return Run.open(folder, {**IDENTITY, **changes}, {"started": "today"})


def lines_of(folder: Path) -> list[str]:
    return (folder / "rows.jsonl").read_text("utf-8").splitlines()


class FakePlan:
    """A fake experiment: notes what it was asked, and fails at the question `fails_at`."""

    experiment = "fake"
    num_parallel = 1

    def __init__(self, fails_at: str = "", loads: bool = True) -> None:
        self.asked: list[str] = []
        self._fails_at = fails_at
        self._loads = loads

    def identity(self) -> dict[str, object]:
        return dict(IDENTITY)

    def units(self, items: Sequence[Item]) -> list[Unit]:
        return [Unit(item.id, item) for item in items]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Examine]:
        if not self._loads:
            raise ModelFileInvalid("no model")
        yield self._rows

    async def _rows(self, units: Sequence[Unit]) -> AsyncGenerator[Row, None]:
        for unit in units:
            if unit.id == self._fails_at:
                raise CloudUnavailable("the cloud is away")
            self.asked.append(unit.id)
            yield {"id": unit.id}


def ask(folder: Path, num: int, plan: FakePlan, num_workers: int = 1) -> list[str]:
    """Run the fake experiment over the first questions; returns what it asked in this process."""
    items = [Item(id=f"q{i:02}", kind=Kind.OPEN, turns=("?",)) for i in range(num)]
    with opened(folder) as run:
        asyncio.run(collect(run, plan, plan.units(items), num_workers=num_workers, ray=False))
    return plan.asked


# Rows


def test_rows_come_back_in_the_order_of_their_ids(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append({"id": "b", "text": "zwei\n\u2028 Zeilen"})
        run.append({"id": "a"})
    manifest, rows = read_run(tmp_path / "run")
    assert manifest == {"identity": IDENTITY, "about": {"started": "today"}}
    assert rows == [{"id": "a"}, {"id": "b", "text": "zwei\n\u2028 Zeilen"}]


def test_a_row_can_be_read_as_soon_as_it_is_appended(tmp_path):
    with opened(tmp_path) as run:
        run.append({"id": "a"})
        assert read_run(tmp_path)[1] == [{"id": "a"}]


@pytest.mark.parametrize("torn", ['{"id": "q01", "val', '{"id": "q01"}', "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_its_question_asked_again(tmp_path, torn):
    ask(tmp_path, 1, FakePlan())
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(torn)
    assert read_run(tmp_path)[1] == [{"id": "q00"}]
    assert ask(tmp_path, 3, FakePlan()) == ["q01", "q02"]
    assert lines_of(tmp_path) == ['{"id": "q00"}', '{"id": "q01"}', '{"id": "q02"}']


def test_what_was_finished_before_a_failure_is_not_asked_again(tmp_path):
    with pytest.raises(CloudUnavailable):
        ask(tmp_path, 40, FakePlan(fails_at="q20"))
    assert ask(tmp_path, 40, FakePlan()) == [f"q{i}" for i in range(20, 40)]
    assert len(lines_of(tmp_path)) == 40


def test_a_larger_limit_goes_on_with_a_run(tmp_path):
    assert len(ask(tmp_path, 20, FakePlan())) == 20
    assert ask(tmp_path, 23, FakePlan()) == ["q20", "q21", "q22"]


def test_a_run_that_is_complete_loads_no_model(tmp_path):
    ask(tmp_path, 2, FakePlan())
    assert ask(tmp_path, 2, FakePlan(loads=False)) == []


def test_what_workers_finished_before_one_of_them_failed_is_kept(tmp_path):
    with pytest.raises(CloudUnavailable, match="the cloud is away"):
        ask(tmp_path, 32, FakePlan(fails_at="q20"), num_workers=2)
    assert {row["id"] for row in read_run(tmp_path)[1]} == {f"q{i:02}" for i in range(20)}
    assert ask(tmp_path, 32, FakePlan()) == [f"q{i}" for i in range(20, 32)]


def test_workers_that_cannot_start_say_why(tmp_path):
    with pytest.raises(ModelFileInvalid, match="no model"):
        ask(tmp_path, 4, FakePlan(loads=False), num_workers=2)


def test_a_number_that_json_does_not_know_is_not_written(tmp_path):
    with opened(tmp_path) as run:
        with pytest.raises(ValueError, match="JSON"):
            run.append({"id": "a", "value": float("nan")})
        assert run.done == set()
        run.append({"id": "b"})
    assert lines_of(tmp_path) == ['{"id": "b"}']


@pytest.mark.parametrize("line", ["{}", "[1]", "7", "not JSON", '{"id": "b"', ""])
def test_an_unreadable_line_is_named_by_file_and_number(tmp_path, line):
    ask(tmp_path, 1, FakePlan())
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(f'{line}\n{{"id": "c"}}\n')
    for read in (read_run, opened):
        with pytest.raises(InvalidRequest, match=r"rows\.jsonl, line 2 is not a row of a run"):
            read(tmp_path)


# Manifests


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edge": {"model": "small", "sha256": "cd"}}, 'edge.sha256 was "ab" and is "cd"'),
        ({"edge": {"model": "large", "sha256": "ab"}}, 'edge.model was "small" and is "large"'),
        ({"probes": ["who", "bins"]}, 'probes was ["who"] and is ["who", "bins"]'),
        ({"cloud": "target"}, 'cloud was null and is "target"'),
        ({"probes": ["x" * 99]}, 'is ["xxx'),
    ],
)
def test_the_folder_of_another_run_is_refused_with_what_differs(tmp_path, changes, said):
    ask(tmp_path, 1, FakePlan())
    with pytest.raises(InvalidRequest) as refusal:
        opened(tmp_path, **changes)
    message = str(refusal.value)
    assert said in message
    assert "Choose another --out" in message
    assert len(message.replace(str(tmp_path), "")) < 200
    assert "\n" not in message
    assert ask(tmp_path, 1, FakePlan()) == []


def test_rows_without_a_manifest_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(InvalidRequest, match="rows without a manifest; choose another --out"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"manifest\.json cannot be read; choose another --out"):
        opened(tmp_path)


def test_a_kill_while_the_manifest_is_written_leaves_no_half_of_one(tmp_path, monkeypatch):
    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path)
    assert ask(tmp_path, 1, FakePlan()) == ["q00"]


def test_a_folder_without_a_run_cannot_be_read(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no run"):
        read_run(tmp_path)


def test_a_folder_that_another_process_writes_to_is_refused_until_it_ends(tmp_path):
    write = (
        "import sys; from pathlib import Path; from edge_agent.evaluation.runs import Run\n"
        f"run = Run.open(Path(sys.argv[1]), {IDENTITY!r}, {{}})\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", write, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(InvalidRequest, match=r"another process writes to .*; wait for it, or choose"):
            opened(tmp_path)
        other.kill()
    opened(tmp_path).close()


def test_a_refused_folder_is_not_kept_locked(tmp_path):
    ask(tmp_path, 1, FakePlan())
    with pytest.raises(InvalidRequest):
        opened(tmp_path, probes=[])
    opened(tmp_path).close()


# Pairs


def run_alone(folder: Path, model: str, rows: list[Row], **identity: Any) -> Path:
    """A routing run of one model without a cloud."""
    alone = [{**row, "cloud": None} for row in rows]
    return write_run(
        folder,
        **{"experiment": "routing", "rows": alone, "cloud": None, "max_answer_tokens": 512}
        | {"edge": {"model": model, "sha256": f"sha of {model}"}, **identity},
    )


def test_a_pair_has_the_edges_rows_with_the_other_models_answers(tmp_path):
    edge_rows, cloud_rows = routing_rows(6), routing_rows(6, seed=1)[1:]
    edge_rows[2]["edge"] = None
    edge = run_alone(tmp_path / "edge", "small", edge_rows)
    cloud = run_alone(tmp_path / "cloud", "large", cloud_rows)
    by_id = {row["id"]: row for row in cloud_rows}
    expected = {
        row["id"]: {**row, "cloud": by_id[row["id"]]["edge"]}
        for row in edge_rows
        if row["id"] in by_id and row["edge"] is not None
    }
    assert len(expected) == 4
    assert pair_runs(edge, cloud, tmp_path / "pair") == 4
    manifest, rows = read_run(tmp_path / "pair")
    assert {row["id"]: row for row in rows} == expected
    assert manifest["identity"]["edge"]["model"] == "small"
    assert manifest["identity"]["cloud"] == "large"
    assert manifest["identity"]["cloud_sha256"] == "sha of large"


def test_a_pair_whose_runs_have_grown_grows_with_them(tmp_path):
    rows = routing_rows(6)
    for num in (3, 6):
        both = [run_alone(tmp_path / f"{model} {num}", model, rows[:num]) for model in ("small", "large")]
        assert pair_runs(*both, tmp_path / "pair") == num


@pytest.mark.parametrize(
    ("identity", "differs"),
    [
        ({"items_sha256": "56" * 32}, "items_sha256"),
        ({"max_answer_tokens": 256}, "max_answer_tokens"),
        ({"letter_request_sha256": "78" * 32}, "letter_request_sha256"),
    ],
)
def test_runs_over_other_data_or_with_other_answers_are_no_pair(tmp_path, identity, differs):
    rows = routing_rows(3)
    edge = run_alone(tmp_path / "edge", "small", rows)
    cloud = run_alone(tmp_path / "cloud", "large", rows, **identity)
    with pytest.raises(InvalidRequest, match=f"differ in {differs}; pair two routing runs"):
        pair_runs(edge, cloud, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("experiments", [("length", "length"), ("routing", "length"), ("length", "routing")])
def test_runs_of_another_experiment_are_no_pair(tmp_path, experiments):
    both = [run_alone(tmp_path / f"{i}", "a model", [], experiment=e) for i, e in enumerate(experiments)]
    with pytest.raises(InvalidRequest, match="is no routing run"):
        pair_runs(*both, tmp_path / "pair")


def test_answers_that_count_by_letter_are_not_paired_with_answers_in_words(tmp_path):
    """Multiple choice counts by letter in a run without a cloud, and by words in one with a cloud."""
    rows = routing_rows(3)
    edge = write_run(tmp_path / "edge", "routing", rows, max_answer_tokens=512)
    cloud = run_alone(tmp_path / "cloud", "large", rows)
    with pytest.raises(InvalidRequest, match=r"only one of .* was asked beside a cloud"):
        pair_runs(edge, cloud, tmp_path / "pair")


# Sets of signals


def test_the_course_of_an_answer_becomes_features_of_its_beginnings_and_of_all_of_it():
    row = routing_rows(1)[0]
    row["edge"]["logprobs"] = [-1.0] * 16 + [-3.0] * 24
    [found] = with_course([row])
    course = {name: value for name, value in found["features"].items() if name.startswith("answer.")}
    assert course == pytest.approx(
        {
            "answer.first-16.mean": -1.0,
            "answer.first-16.lowest": -1.0,
            "answer.first-32.mean": -2.0,
            "answer.first-32.lowest": -3.0,
            "answer.first-64.mean": -2.2,
            "answer.first-64.lowest": -3.0,
            "answer.whole.mean": -2.2,
            "answer.whole.lowest": -3.0,
            "answer.tokens.log": np.log(40),
        }
    )


@pytest.mark.parametrize("edge", [None, {"correct": True}, {"correct": True, "logprobs": []}])
def test_an_answer_without_a_course_adds_no_feature(edge):
    row = {**routing_rows(1)[0], "edge": edge}
    assert with_course([row]) == [row]


def test_signals_are_compared_alone_by_kind_and_together():
    before = {
        *("who", "who.margin", "who-prompt", "rating-few-shot", "confidence-draft.mean"),
        *("prompt_tokens.log", "shape.digits"),
    }
    rows = routing_rows(2)
    for number, row in enumerate(rows):
        row["features"] = {**dict.fromkeys(before, float(number)), "same in all rows": 1.0}
        row["edge"]["logprobs"] = [-1.0 - number] * 20
    sets = feature_sets(with_course(rows))
    assert sets["prompt length"] == ["prompt_tokens.log"]
    assert set(sets["shape"]) == {"prompt_tokens.log", "shape.digits"}
    assert set(sets["who"]) == {"who", "who.margin"}
    assert set(sets["suffix probes"]) == {"who", "who.margin"}
    assert set(sets["prompt-form probes"]) == {"who-prompt", "rating-few-shot"}
    assert set(sets["all before the answer"]) == set(sets[SINGLE]) == before
    seen = set(sets["and 16 tokens of the answer"]) - before
    assert seen == {"answer.first-16.mean", "answer.first-16.lowest"}
    assert {*sets["and 16 tokens of the answer"], "answer.whole.mean"} <= set(sets["and the whole answer"])


def test_sets_without_a_feature_are_left_out():
    rows = [{**row, "features": {"who": row["features"]["who"]}} for row in routing_rows(2)]
    assert feature_sets(rows) == {
        name: ["who"]
        for name in ("who", SINGLE, "suffix probes", "suffix probes and shape", "all before the answer")
    }


# Speculation


@pytest.mark.parametrize(
    ("tokens", "reference", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 1.0, id="equal texts agree"),
        pytest.param([1, 2], [1, 2, 3, 4], 1.0, id="what only one of them has does not count"),
        pytest.param([1, 9, 3, 9], [1, 2, 3], 2 / 3, id="positions are compared, not sets"),
        pytest.param([9], [1], 0.0, id="nothing in common"),
        pytest.param([], [1], 1.0, id="nothing contradicts an empty text"),
    ],
)
def test_agreement_is_the_share_of_equal_positions(tokens, reference, expected):
    assert agreement(tokens, reference) == pytest.approx(expected)


def test_a_grid_has_every_combination_and_no_threshold_that_means_nothing():
    settings = grid([Policy.LOSSLESS, Policy.BILD], [4, 8], [0.0, 0.5], [2.0, 5.0])
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names)
    assert set(names) == {
        *("lossless-4", "lossless-4-fb0.5", "lossless-8", "lossless-8-fb0.5"),
        *("bild-4-rb2", "bild-4-rb5", "bild-4-fb0.5-rb2", "bild-4-fb0.5-rb5"),
        *("bild-8-rb2", "bild-8-rb5", "bild-8-fb0.5-rb2", "bild-8-fb0.5-rb5"),
    }


def test_a_setting_that_is_named_twice_is_tried_once():
    assert len(grid([Policy.LOSSLESS], [4, 4], [0.0], [3.0])) == 1


# A cloud that is away


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(cloud_answers, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(
            cloud_answers, "asyncio", SimpleNamespace(Semaphore=asyncio.Semaphore, sleep=self._sleep)
        )

    async def _sleep(self, pause_s: float) -> None:
        self.slept.append(pause_s)
        await asyncio.sleep(0)  # others begin meanwhile
        self.now_s += pause_s


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class FakeCloud:
    """A fake: plays a script, one entry an attempt. An error is raised after `Opened` and a first token."""

    def __init__(self, clock: Clock, *script: Exception | list[Any], model: str = "target") -> None:
        self._clock = clock
        self._script = list(script)
        self._model = model
        self.requests: list[Open] = []
        self.num_open = self.most_open = 0
        self.answer_takes_s = 0.0

    async def generate(self, request: Open, meter: Meter) -> AsyncGenerator[Any, None]:
        self.requests.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            step = self._script.pop(0) if self._script else told("yes")
            yield Opened(
                model=self._model,
                prompt_token_ids=(),
                end_token_ids=frozenset(),
                sampling=request.sampling,
                max_tokens=9,
                max_draft_tokens=8,
                vocabulary_sha256="",
            )
            if isinstance(step, Exception):
                yield Tokens(0, (1,), (b"lost ",))
                raise step
            await self._clock._sleep(self.answer_takes_s)
            for message in step:
                yield message
        finally:
            self.num_open -= 1


def told(text: str, reason: FinishReason = FinishReason.STOP) -> list[Any]:
    pieces = tuple(bytes([byte]) for byte in text.encode())
    usage = Usage(prompt_tokens=1, completion_tokens=len(pieces), rounds=0, target_tokens=len(pieces))
    return [Tokens(0, tuple(range(len(pieces))), pieces), Finished(reason, usage)]


def answers_of(cloud: FakeCloud, *, patience_s: float = 60.0, num_streams: int = 4) -> CloudAnswers:
    return CloudAnswers(cloud, model="target", num_streams=num_streams, patience_s=patience_s)


async def test_an_answer_is_the_text_its_tokens_and_whether_it_was_cut(clock):
    cloud = FakeCloud(clock, told("für"), told("fü", FinishReason.LENGTH))
    answers = answers_of(cloud)
    whole, cut = await answers.answer("why?", 9), await answers.answer("why?", 3)
    assert (whole.text, whole.num_tokens, whole.censored) == ("für", 4, False)
    assert (cut.text, cut.num_tokens, cut.censored) == ("fü", 3, True)
    assert [request.max_tokens for request in cloud.requests] == [9, 3]
    assert cloud.requests[0].prompt == (Message("user", "why?"),)
    assert cloud.requests[0].sampling.temperature == 0


@pytest.mark.parametrize("error", [CloudUnavailable, CloudOverloaded, VerifyTimeout])
async def test_a_cloud_that_is_away_is_asked_again_after_longer_and_longer_pauses(clock, error):
    cloud = FakeCloud(clock, *[error("away")] * 7, told("yes"))
    answered = await answers_of(cloud, patience_s=600.0).answer("why?", 9)
    assert (answered.text, answered.num_tokens) == ("yes", 3)
    assert clock.slept == [1, 2, 4, 8, 16, 30, 30, 0]


async def test_a_cloud_that_leaves_in_the_middle_of_an_answer_is_asked_again(clock):
    cloud = FakeCloud(clock, told("lost", FinishReason.DRAIN), told("yes"))
    assert (await answers_of(cloud).answer("why?", 9)).text == "yes"


async def test_a_cloud_that_stays_away_is_given_up_when_patience_ends(clock):
    cloud = FakeCloud(clock, *[CloudUnavailable("away")] * 99)
    with pytest.raises(CloudUnavailable, match="away"):
        await answers_of(cloud, patience_s=10.0).answer("why?", 9)
    assert clock.slept == [1, 2, 4]


async def test_waiting_for_a_free_stream_costs_no_patience(clock):
    cloud = FakeCloud(clock, told("first"), CloudUnavailable("away"), told("second"))
    cloud.answer_takes_s = 100.0
    answers = answers_of(cloud, patience_s=10.0, num_streams=1)
    found = await asyncio.gather(answers.answer("1?", 9), answers.answer("2?", 9))
    assert [answered.text for answered in found] == ["first", "second"]


async def test_no_more_streams_are_open_than_allowed(clock):
    cloud = FakeCloud(clock)
    answers = answers_of(cloud, num_streams=3)
    await asyncio.gather(*(answers.answer(f"{i}?", 9) for i in range(9)))
    assert cloud.most_open == 3
    assert cloud.num_open == 0


async def test_a_cloud_that_serves_another_model_now_is_refused_at_once(clock):
    cloud = FakeCloud(clock, model="other")
    with pytest.raises(InvalidRequest, match="now serves other, but the run was begun with target"):
        await answers_of(cloud).answer("why?", 9)
    assert clock.slept == []
    assert cloud.num_open == 0


async def test_an_answer_that_ends_without_a_reason_is_a_failure(clock):
    with pytest.raises(CloudFailed):
        await answers_of(FakeCloud(clock, told("yes")[:1])).answer("why?", 9)
