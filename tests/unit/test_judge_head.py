"""What a judge head says, which models it fits, and its file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from cloud_service.judging.head_file import read_head, write_head
from shared.errors import InvalidSetting
from shared.judge import JudgeHead

SHA = "ab" * 32
HEAD = JudgeHead(model="t", model_sha256=SHA, weight=np.array([2.0, -1.0]), bias=0.5, threshold=0.75)


def test_a_token_is_acceptable_where_its_probability_of_being_right_reaches_the_threshold():
    hidden = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 50.0], [np.nan, 0.0]])
    assert HEAD.probabilities(hidden)[:3] == pytest.approx([0.924, 0.622, 0.0], abs=1e-3)
    assert HEAD.acceptable(hidden).tolist() == [True, False, False, False]


def test_products_with_the_weight_are_judged_as_the_hidden_states_are():
    hidden = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 50.0], [np.nan, 0.0]])
    products = (hidden @ HEAD.weight).astype(np.float32)
    assert HEAD.acceptable_by(products).tolist() == HEAD.acceptable(hidden).tolist()


def test_of_no_tokens_none_is_judged():
    assert HEAD.acceptable(np.empty((0, 2), np.float32)).shape == (0,)


def test_a_head_comes_back_from_its_file(tmp_path):
    write_head(HEAD, tmp_path / "head.safetensors")
    head = read_head(tmp_path / "head.safetensors")
    assert (head.model, head.model_sha256, head.threshold) == ("t", SHA, 0.75)
    assert (head.weight.tolist(), head.bias) == ([2.0, -1.0], 0.5)


@pytest.mark.parametrize(
    ("model", "sha256", "width", "message"),
    [
        pytest.param("u", "cd" * 32, 2, "trained for t, and the target is u", id="another model"),
        pytest.param("t", "cd" * 32, 2, "another file of that name", id="another quantisation"),
        pytest.param("t", SHA, 3, "2 numbers, and those of t have 3", id="hidden states of another width"),
    ],
)
def test_a_head_of_something_else_is_refused(model, sha256, width, message):
    HEAD.check_fits("t", SHA, 2)
    with pytest.raises(InvalidSetting, match=message) as caught:
        HEAD.check_fits(model, sha256, width)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"weight": np.empty(0)}, "one row of weights", id="no weights"),
        pytest.param({"weight": np.ones((2, 2))}, "one row of weights", id="a matrix"),
        pytest.param({"weight": np.array([np.nan])}, "finite", id="a weight that is no number"),
        pytest.param({"bias": np.inf}, "finite", id="an endless bias"),
        pytest.param({"threshold": 0.0}, "threshold", id="a threshold that everything reaches"),
        pytest.param({"threshold": np.nan}, "threshold", id="a threshold that is no number"),
    ],
)
def test_numbers_that_are_no_head_are_refused(change, message):
    with pytest.raises(InvalidSetting, match=message):
        replace(HEAD, **change)


def test_files_that_hold_no_head_are_refused_in_one_line(tmp_path):
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    save_file({"weight": np.ones(2, np.float32)}, other)
    broken.write_bytes(b"no tensors")
    for path in (other, broken, tmp_path / "missing.safetensors"):
        with pytest.raises(InvalidSetting, match="judge") as caught:
            read_head(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
