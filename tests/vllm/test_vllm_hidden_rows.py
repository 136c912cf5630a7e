"""Hidden states out of vLLM, without an engine: who gets none, which heads are refused, what is kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cloud_service.targets import vllm as vllm_target
from cloud_service.targets import vllm_judge
from cloud_service.targets.vllm import load_target
from shared.errors import InvalidSetting
from shared.judge import JudgeHead
from shared.models import file_sha256, folder_sha256
from tests.tiny_pair import HIDDEN_SIZE, NUM_TOKENS, TinyPair

pytestmark = pytest.mark.vllm


def head(sha256: str = "") -> JudgeHead:
    weight = np.ones(HIDDEN_SIZE)
    return JudgeHead(model="target-hf", model_sha256=sha256, weight=weight, bias=0.0, threshold=0.5)


# Where the engine cannot, or the head is of another model


class Shifted:
    """Reads hidden states, as of the token so many places before or behind."""

    def __init__(self, by: int) -> None:
        self._by = by

    async def read(self, token_ids: Sequence[int], num_read: int) -> tuple[None, np.ndarray]:
        states = np.eye(NUM_TOKENS, dtype=np.float32)[np.roll(token_ids, self._by)]
        return None, states[-num_read:]


async def test_rows_of_other_tokens_fail_the_test_of_the_start() -> None:
    text = list(range(vllm_judge.TEST_TOKENS))
    assert await vllm_judge.fault(Shifted(0), text) is None
    assert "does not change" in str(await vllm_judge.fault(Shifted(1), text))
    assert "changes with the token after it" in str(await vllm_judge.fault(Shifted(-1), text))


@pytest.mark.parametrize(
    ("version", "options", "obstacle"),
    [
        pytest.param("0.32.0", {}, None, id="nothing stands against it"),
        pytest.param("0.33.0", {}, "never taken out of vLLM 0.33.0", id="another version"),
        pytest.param(
            "0.32.0", {"worker_extension_cls": "x.Y"}, "worker-extension-cls", id="an own extension"
        ),
        pytest.param("0.32.0", {"data_parallel_size": 2}, "data-parallel-size", id="several engines"),
    ],
)
def test_an_engine_that_cannot_serves_without_the_head_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny_pair: TinyPair,
    version: str,
    options: dict[str, Any],
    obstacle: str | None,
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    started: list[tuple[Any, JudgeHead | None]] = []
    monkeypatch.setattr(vllm_target, "engine_config", lambda model, options: a_config(options))
    monkeypatch.setattr(vllm_target, "_text_side", lambda *_: None)
    monkeypatch.setattr(vllm_target, "VllmTarget", lambda config, text, head: started.append((config, head)))
    own = head(sha256=folder_sha256(tiny_pair.target_hf))
    with caplog.at_level(logging.WARNING):
        load_target(str(tiny_pair.target_hf), "target-hf", options, "rounds", own)
    [(config, served)] = started
    assert served is (own if obstacle is None else None)
    assert ("worker_extension_cls" in config.options) is (obstacle is None or "worker" in obstacle)
    assert (obstacle or "") in caplog.text
    assert ("policy judge will be lossless" in caplog.text) is (obstacle is not None)


def a_config(options: dict[str, Any]) -> Any:
    return SimpleNamespace(options=options, model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN_SIZE))


def test_without_a_head_the_engine_is_started_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tiny_pair: TinyPair
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_target, "engine_config", lambda model, options: asked.append(options))
    monkeypatch.setattr(vllm_target, "_text_side", lambda *_: None)
    monkeypatch.setattr(vllm_target, "VllmTarget", lambda *_: None)
    load_target(str(tiny_pair.target_hf), "target-hf", {"seed": 1}, "rounds")
    assert asked == [{"seed": 1}]


def test_a_head_of_the_gguf_file_is_refused_for_the_folder(tiny_pair: TinyPair) -> None:
    of_gguf = replace(head(sha256=file_sha256(tiny_pair.target_gguf)), model="target")
    with pytest.raises(InvalidSetting, match="trained for target, and the target is target-hf"):
        load_target(str(tiny_pair.target_hf), "target-hf", {}, "rounds", of_gguf)


def test_a_head_of_another_width_is_refused_before_the_engine_starts(tiny_pair: TinyPair) -> None:
    narrow = replace(head(sha256=folder_sha256(tiny_pair.target_hf)), weight=np.ones(3))
    with pytest.raises(InvalidSetting, match="hidden states of 3 numbers"):
        load_target(str(tiny_pair.target_hf), "target-hf", {}, "rounds", narrow)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        pytest.param("Qwen/Qwen3-8B", {}, "hf download Qwen/Qwen3-8B --local-dir DIR", id="no folder"),
        pytest.param(None, {"quantization": "fp8"}, "--engine.quantization makes another", id="quantised"),
        pytest.param(
            None, {"hf_overrides": {"a": 1}}, "--engine.hf-overrides makes another", id="overridden"
        ),
    ],
)
def test_a_model_that_no_head_can_be_bound_to_is_refused_with_what_to_do(
    tiny_pair: TinyPair, model: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message) as caught:
        load_target(model or str(tiny_pair.target_hf), "target-hf", options, "rounds", head())
    assert "\n" not in str(caught.value)


# What the engine's process keeps, step by step


class Runner:
    """As much of a runner of vLLM as `RowKeeper` sees; each row is its token's position."""

    def __init__(self, is_v2: bool) -> None:
        self._is_v2 = is_v2
        self.execute_model_state: Any = None
        self.sampled: list[object] = []
        self.sample_tokens = self.sampled.append

    def step(self, *requests: tuple[str, int, int]) -> None:
        """Compute, of each request by its id, positions from one to before another."""
        counts = [end - start for _, start, end in requests]
        first = np.cumsum([0, *counts])
        names, starts = [each[0] for each in requests], [each[1] for each in requests]
        positions = [float(i) for _, start, end in requests for i in range(start, end)]
        hidden = torch.tensor([*positions, -1.0])[:, None].repeat(1, 2)  # a row of padding at the end
        state: dict[str, Any] = {"hidden_states": hidden}
        if self._is_v2:
            state["input_batch"] = SimpleNamespace(
                req_ids=names,
                num_computed_tokens_np=np.array(starts),
                num_scheduled_tokens=np.array(counts),
                query_start_loc_np=first,
            )
        else:
            # What is scheduled is named in another order than it lies in the batch.
            named = dict(zip(reversed(names), reversed(counts), strict=True))
            state["scheduler_output"] = SimpleNamespace(num_scheduled_tokens=named)
            self.query_start_loc = SimpleNamespace(np=first)
            self.input_batch = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(names)})
            self.requests = {
                name: SimpleNamespace(num_computed_tokens=start)
                for name, start in zip(names, starts, strict=True)
            }
        self.execute_model_state = SimpleNamespace(**state)
        self.sample_tokens("grammar")


@pytest.fixture(params=[False, True], ids=["V1 runner", "V2 runner"])
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


def taken(keeper: vllm_judge.RowKeeper, name: str) -> tuple[int, list[float]] | None:
    """The position after the last row, and the first number of each row."""
    if (kept := keeper.take(name)) is None:
        return None
    end, raw = kept
    return end, np.frombuffer(raw, np.float32).reshape(-1, 2)[:, 0].tolist()


FIRST, SECOND = vllm_judge.request_name(1, 3), vllm_judge.request_name(2, 2)


def test_of_each_request_that_is_named_for_it_the_last_rows_are_kept(runner: Runner) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    runner.step((f"{FIRST}-0a1b2c3d", 0, 9), ("duet-7", 4, 9), (SECOND, 5, 7))
    assert taken(keeper, FIRST) == (9, [6.0, 7.0, 8.0])
    assert taken(keeper, SECOND) == (7, [5.0, 6.0])
    assert taken(keeper, "duet-7") is None
    assert taken(keeper, FIRST) is None, "rows are taken once"
    assert runner.sampled == ["grammar"], "the runner goes on as it would"


def test_rows_of_several_steps_are_put_together(runner: Runner) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    runner.step((FIRST, 0, 5), (SECOND, 0, 5))
    runner.step((FIRST, 5, 7))
    assert taken(keeper, FIRST) == (7, [4.0, 5.0, 6.0])
    assert taken(keeper, SECOND) == (5, [3.0, 4.0])


@pytest.mark.parametrize("again_from", [0, 4])
def test_after_a_preemption_only_what_was_computed_again_counts(runner: Runner, again_from: int) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    runner.step((FIRST, 0, 5))
    runner.step((FIRST, again_from, 6))
    rows = [float(i) for i in range(again_from, 6)][-3:]
    assert taken(keeper, FIRST) == (6, rows)


def test_with_a_weight_each_row_is_its_product(runner: Runner) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    keeper.weight = torch.tensor([1.0, 0.5])
    runner.step((FIRST, 0, 4))
    kept = keeper.take(FIRST)
    assert kept is not None
    assert np.frombuffer(kept[1], np.float32).tolist() == [1.5, 3.0, 4.5]


def test_rows_that_nobody_takes_are_forgotten_in_time(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_judge, "_MOST_KEPT", 2)
    keeper = vllm_judge.RowKeeper(runner)
    for number in range(4):
        runner.step((vllm_judge.request_name(number, 1), 0, 1))
    kept = [taken(keeper, vllm_judge.request_name(number, 1)) for number in range(4)]
    assert kept == [None, None, (1, [0.0]), (1, [0.0])]


def test_a_step_without_hidden_states_keeps_nothing_and_goes_on(runner: Runner) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    runner.sample_tokens("grammar")
    runner.execute_model_state = SimpleNamespace(hidden_states=None)
    runner.sample_tokens("grammar")
    assert runner.sampled == ["grammar", "grammar"]
    assert taken(keeper, FIRST) is None


def test_an_engine_whose_steps_look_otherwise_goes_on_and_keeps_nothing(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = vllm_judge.RowKeeper(runner)
    runner.execute_model_state = SimpleNamespace(hidden_states=torch.zeros(1, 2))
    runner.sample_tokens("grammar")
    assert "hidden states are kept no more" in caplog.text
    runner.step((FIRST, 0, 4))
    assert runner.sampled == ["grammar", "grammar"]
    assert taken(keeper, FIRST) is None
