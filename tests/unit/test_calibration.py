"""The blend: fitted, saved, read back and refused for another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.routing.calibration import (
    Calibration,
    Result,
    Written,
    find_calibration,
    fit,
    judged_of,
    load_calibration,
    read_results,
    user_file,
)
from shared.config import DEFAULT_DRAFT
from shared.errors import InvalidRequest, InvalidSetting
from shared.models import Registry, file_sha256

SHA = "ab" * 32


def results(num=400, *, cloud_correct=None, seed=0):
    """Questions whose "who" reading tells how likely the edge is wrong; "noise" tells nothing."""
    rng = np.random.default_rng(seed)
    who, noise = rng.uniform(size=num), rng.normal(size=num)
    wrong = rng.uniform(size=num) < who
    return [
        Result({"who": float(w), "noise": float(n)}, not bool(bad), cloud_correct, None)
        for w, n, bad in zip(who, noise, wrong, strict=True)
    ]


def fitted(rows, **aim) -> Calibration:
    read = {"features": {"who", "noise"}} | aim
    return fit(rows, model="m", sha256=SHA, fitted_on="made up", priors={"who/2": [-0.1, -2.3]}, **read)


def share_sent(calibration, rows):
    return np.mean([calibration.p_cloud(row.features) >= calibration.threshold for row in rows])


def test_the_blend_learns_which_reading_counts():
    calibration = fitted(results(), cloud_share=0.5)
    assert calibration.weights["who"].weight > 5 * abs(calibration.weights["noise"].weight)
    assert calibration.p_cloud({"who": 0.9}) > 0.65 > 0.35 > calibration.p_cloud({"who": 0.1})


@pytest.mark.parametrize("cloud_share", [0.0, 0.25, 0.4, 1.0])
def test_the_threshold_sends_the_share_that_was_asked_for(cloud_share):
    rows = results()
    assert share_sent(fitted(rows, cloud_share=cloud_share), rows) == pytest.approx(cloud_share, abs=0.01)


@pytest.mark.parametrize("quality", [0.6, 0.75, 0.95])
def test_the_threshold_sends_the_least_share_that_reaches_a_quality(quality):
    rows = results(cloud_correct=True)
    calibration = fitted(rows, quality=quality)
    sent = [calibration.p_cloud(row.features) >= calibration.threshold for row in rows]
    right = np.mean([row.edge_correct or to_cloud for row, to_cloud in zip(rows, sent, strict=True)])
    assert quality <= right < quality + 0.01


def test_a_quality_beyond_both_models_is_refused():
    with pytest.raises(InvalidRequest, match=r"out of reach: the best .* gives 0\.\d+"):
        fitted(results(cloud_correct=False)[:200] + results(cloud_correct=True, seed=1), quality=1.0)


def test_a_question_that_the_cloud_gets_wrong_too_does_not_need_it():
    row = results(1)[0]
    assert replace(row, edge_correct=False, cloud_correct=True).label
    assert replace(row, edge_correct=False, cloud_correct=None).label
    assert not replace(row, edge_correct=False, cloud_correct=False).label
    assert not replace(row, edge_correct=True, cloud_correct=True).label


def test_a_missing_reading_counts_as_its_mean():
    calibration = fitted(results(), cloud_share=0.4)
    mean = {name: weight.mean for name, weight in calibration.weights.items()}
    assert calibration.p_cloud({}) == pytest.approx(calibration.p_cloud(mean))


def test_a_saved_calibration_reads_back_equal_and_is_plain_text(tmp_path):
    calibration = fitted(results(), cloud_share=0.4)
    calibration.save(tmp_path / "folder" / "c.yaml")
    assert load_calibration(tmp_path / "folder" / "c.yaml") == calibration
    assert "!!python" not in (tmp_path / "folder" / "c.yaml").read_text()


def test_lengths_are_learnt_from_the_answers_that_were_whole():
    rows = [replace(r, completion_tokens=round(10 + 200 * r.features["who"])) for r in results()]
    length = fitted(rows, cloud_share=0.4).length
    assert length.tokens({"who": 0.9}) > 2 * length.tokens({"who": 0.1})
    assert 60 < length.tokens({"who": 0.5}) < 140
    assert fitted(results(), cloud_share=0.4).length is None


def test_a_length_run_teaches_lengths_and_nothing_else():
    lengths = [replace(row, edge_correct=None, completion_tokens=100) for row in results(100, seed=1)]
    without, beside = fitted(results(), cloud_share=0.4), fitted([*results(), *lengths], cloud_share=0.4)
    assert beside.model_copy(update={"length": None}) == without
    assert beside.length.tokens({"who": 0.5}) == pytest.approx(100, rel=0.01)


def test_where_a_cloud_was_asked_answers_of_the_edge_alone_teach_lengths_only():
    known, alone = results(cloud_correct=True), results(100, seed=1)
    mixed = [*known, *(replace(row, completion_tokens=100) for row in alone)]
    assert judged_of(mixed) == known
    assert judged_of(alone) == alone
    made = fitted(mixed, cloud_share=0.4)
    assert made.model_copy(update={"length": None}) == fitted(known, cloud_share=0.4)
    assert made.length is not None


def test_what_auto_does_not_read_is_left_out_of_the_blend():
    assert set(fitted(results(), cloud_share=0.4, features={"who"}).weights) == {"who"}


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        pytest.param(results(10), 0.4, id="too few"),
        pytest.param([replace(r, edge_correct=True) for r in results(100)], 0.4, id="all alike"),
    ],
)
def test_results_that_teach_nothing_are_refused(rows, share):
    with pytest.raises(InvalidRequest, match="too few to fit on"):
        fitted(rows, cloud_share=share)


# Files


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "config" / name)
    return tmp_path


def test_the_users_own_file_wins_over_none_and_a_named_one_over_it(home):
    own, named = fitted(results(), cloud_share=0.4), fitted(results(), cloud_share=0.6)
    assert find_calibration("m", lambda: SHA) is None
    own.save(user_file("m"))
    named.save(home / "named.yaml")
    assert find_calibration("m", lambda: SHA) == own
    assert find_calibration("m", lambda: SHA, home / "named.yaml") == named


@pytest.mark.parametrize(
    ("model", "sha", "said"),
    [
        pytest.param("other", SHA, "was made for m, not for other", id="another model"),
        pytest.param("m", "cd" * 32, "was made for m (another file of this name)", id="another file"),
    ],
)
def test_a_calibration_of_another_model_is_refused(home, model, sha, said):
    fitted(results(), cloud_share=0.4).save(home / "c.yaml")
    with pytest.raises(InvalidSetting) as caught:
        find_calibration(model, lambda: sha, home / "c.yaml")
    assert said in str(caught.value)
    assert "duet calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 9\n", "is of version 9"),
        ("version: 2\nmodel: m\n", "field required"),
        ("version: [", "is not YAML"),
        ("- 1\n", "c.yaml"),
        ("version: 1\nthreshold: 7\n", "c.yaml"),
    ],
)
def test_a_broken_file_is_named_in_one_line(home, text, said):
    (home / "c.yaml").write_text(text)
    with pytest.raises(InvalidSetting) as caught:
        find_calibration("m", lambda: SHA, home / "c.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(home):
    with pytest.raises(InvalidSetting, match="cannot be read"):
        find_calibration("m", lambda: SHA, home / "none.yaml")


def test_the_default_model_has_a_shipped_calibration():
    entry = Registry.load().entry(DEFAULT_DRAFT)
    calibration = find_calibration(DEFAULT_DRAFT, lambda: str(entry.sha256))
    assert calibration is not None
    assert 0.0 < calibration.threshold < 1.0
    assert {"letters/4", "who/2", "rating/5"} <= set(calibration.priors)
    assert find_calibration(DEFAULT_DRAFT, lambda: SHA) is None  # another file of that name


def test_a_files_hash(home):
    (home / "f").write_bytes(b"abc")
    assert file_sha256(home / "f").startswith("ba7816bf")


# Results


def test_results_are_read_from_json_lines(home):
    row = {"features": {"who": 0.5}, "edge_correct": True, "cloud_correct": False, "id": "x\u2028\x85"}
    (home / "r.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    results, written = read_results(home / "r.jsonl")
    assert results == [Result({"who": 0.5}, True, False, None)]
    assert written == Written(0, 0)


def test_rows_of_a_run_are_read_and_their_words_counted(home):
    said = {"features": {"who": 0.5}, "values": {"bins": 20.0}}
    routing = said | {"edge": {"correct": False, "tokens": 30, "words": 20}, "cloud": {"correct": True}}
    letter = said | {"edge": {"correct": True, "tokens": None}, "cloud": None}
    short = said | {"kind": "choice", "edge": {"correct": True, "tokens": 2, "words": 1}}
    length = said | {"prompt": "plain", "tokens": 10, "words": 5, "correct": None}
    cut = length | {"censored": True}
    asked = length | {"prompt": "words-first-line", "tokens": 4, "words": 1}
    rows = (routing, letter, short, length, cut, asked)
    (home / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, written = read_results(home / "r.jsonl")
    assert results == [
        Result({"who": 0.5}, False, True, 30),
        Result({"who": 0.5}, True, None, None),
        Result({"who": 0.5}, True, None, None),
        Result({"who": 0.5}, None, None, 10),
        Result({"who": 0.5}, None, None, None),
    ]
    assert written == Written(30 + 10 + 10, 20 + 5 + 5)


def test_the_ratio_of_words_to_tokens_is_kept(home):
    fitted(results(), cloud_share=0.4, tokens_per_word=1.23456).save(home / "c.yaml")
    assert load_calibration(home / "c.yaml").tokens_per_word == 1.235
    assert fitted(results(), cloud_share=0.4).tokens_per_word is None


@pytest.mark.parametrize("line", ["{}", "x", '{"features": 1, "edge_correct": true}', "[]"])
def test_a_line_that_is_no_result_is_named(home, line):
    (home / "r.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidRequest, match=r"r\.jsonl, line 1"):
        read_results(home / "r.jsonl")
