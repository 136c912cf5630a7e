"""The table of server-side methods, from what was measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.server_methods import Answer, Measured, Result, Tables, equality, speed_up, tokens_a_pass


def test_a_text_that_ends_elsewhere_is_not_equal() -> None:
    plain = {0: Answer([1, 2, 3, 4]), 1: Answer([5, 6]), 2: Answer([7, 8])}
    found = {0: Answer([1, 2, 3]), 1: Answer([5, 6]), 2: Answer([7, 9])}
    assert equality(found, plain, 4) == "33%, 75.0%"
    assert equality(found, plain, 3) == "67%, 83.3%"


def test_tokens_a_pass_leave_the_prompts_pass_out() -> None:
    answers = [Answer([0] * 7, passes=3, first=1), Answer([0] * 4, passes=2, first=1), Answer([0], passes=1)]
    assert tokens_a_pass(answers) == "3.00 (3.00 to 3.00)"


def test_speed_is_that_of_a_token() -> None:
    plain = {n: Answer([0] * 10, seconds=2.0) for n in range(4)}
    found = {n: Answer([0] * 5, seconds=0.5) for n in range(4)}
    assert speed_up(found, plain) == "2.00 (2.00 to 2.00)"


def test_what_was_measured_makes_the_tables_with_what_lay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    arguments = Namespace(
        kept=tmp_path / "kept", target=Path("target"), draft=Path("small"), tokens=16, draft_tokens=2
    )
    plain = Result(measured(passes=11, seconds=2.0), {0: Answer([0] * 11, 11, 1, 1.0)})
    drafted = Result(measured(passes=6, seconds=1.0, drafts=5), {0: Answer([0] * 11, 6, 1, 0.8)})
    for method, own in (("none", plain), ("draft-model", drafted)):
        Tables(arguments, ["qa"], "CPU").keep(method, own, plain)
    Tables(arguments, ["qa"], "CPU").save()
    tables = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    [whole] = (table for name, table in tables.items() if "tasks" not in name)
    assert "Draft model: small." in whole["notes"]
    assert whole["rows"][1] == [
        *("draft-model", "2.00", "2.00 (2.00 to 2.00)", "0.80 0.20"),
        *("14", "1.25 (1.25 to 1.25)", "11", "2.00", "100%, 100.0%", "100%, 100.0%"),
    ]
    [tasks] = (table for name, table in tables.items() if "tasks" in name)
    assert tasks["rows"] == [["draft-model", "", "", "2.00 (2.00 to 2.00)", "", "", ""]]


def measured(passes: int, seconds: float, drafts: int = 0) -> Measured:
    return Measured(
        {0: Answer([0] * 11, passes, 1, seconds)}, seconds, drafts, drafts, [4, 1] if drafts else []
    )
