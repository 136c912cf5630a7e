"""The Spec-Bench table on the tiny pair: made once, and again from what was recorded, without a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import spec_bench

pytestmark = pytest.mark.engine


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"id": str(i), "category": category, "turns": [f"Tell me {i} stories of the {category}.", "Go on."]}
        for i, category in enumerate(("writing", "qa", "rag"))
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], list[str]]:
    rows = [line.strip().split(" | ") for line in capsys.readouterr().out.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == len(spec_bench.COLUMNS)}


def test_a_table_is_made_once_and_again_without_models(tiny_pair, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--limit", "3", "--tokens", "24", "--threads", "1"]
    arguments += ["--target", str(tiny_pair.target_gguf), "--independent", str(tiny_pair.draft_gguf)]
    arguments += ["--draft", f"itself={tiny_pair.target_gguf}"]
    monkeypatch.setattr(sys, "argv", ["spec_bench", *arguments])
    monkeypatch.setattr(spec_bench, "TIMED_ROUNDS", 2)
    spec_bench.main()
    first = table(capsys)
    draft = tiny_pair.draft_gguf.stem
    for length in map(str, spec_bench.DRAFT_TOKENS):
        # The target drafts for itself, and a model's drafts are the same however it makes them.
        assert first["itself", length][1] == " ".join(["1.00"] * len(spec_bench.POSITIONS[int(length)]))
    middle = str(spec_bench.MIDDLE)
    for shape in spec_bench.SHAPES:
        assert first[spec_bench.lookahead_name(shape), middle][:3] == first[draft, middle][:3]
    assert first[spec_bench.AT_TARGET, "-"][1].startswith("-")

    # A kill in the middle of a row: the row is made again, the table is the same.
    rows = out / "drafts" / "itself" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-10])
    spec_bench.main()
    assert table(capsys) == first

    monkeypatch.setattr(sys, "argv", ["spec_bench", "--out", str(out), "--limit", "3"])
    data.unlink()
    spec_bench.main()
    assert table(capsys) == first

    # Stopped before Lookahead was through: its rows say how far it came.
    (out / "lookahead" / "rows.jsonl").write_text(
        (out / "lookahead" / "rows.jsonl").read_text().splitlines(keepends=True)[0]
    )
    spec_bench.main()
    some = table(capsys)
    name = spec_bench.lookahead_name(spec_bench.PAPERS_SHAPE)
    assert (f"{name} (1 of 3 questions)", middle) in some
    assert (name, middle) not in some
