"""What policy `bild` saves and costs: the settings of `duet eval speculation` runs, and their front.

Runs are named by argument, folders with rows.jsonl. All settings are compared on the same questions, those
that every setting of a run answered. Quality is the share of right answers where the questions have one, and
beside it the agreement with the target's own text, position by position: one early change of words that
matters nothing counts there for all that follows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine_of, save
from shared.json_lines import numbered_lines

DRAWS = 2000
MAX_LOSS = 0.01
"""Of quality, that a setting may cost."""


@dataclass(frozen=True, slots=True)
class Setting:
    """All answers of one setting, in the order of the questions."""

    name: str
    policy: str
    draft_tokens: int
    passes: NDArray[np.float64]
    committed: NDArray[np.float64]
    correct: NDArray[np.float64] | None
    agreement: NDArray[np.float64]

    @property
    def passes_per_token(self) -> float:
        return float(self.passes.sum() / self.committed.sum())


@dataclass(frozen=True, slots=True)
class Row:
    setting: Setting
    cells: list[str]
    loss: float
    """Of quality against lossless."""


def read(folder: Path) -> dict[str, Setting]:
    by_setting: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    for _, line in numbered_lines((folder / "rows.jsonl").read_text(encoding="utf-8")):
        row = json.loads(line)
        by_setting[row["setting"]][row["item"]] = row
    items = sorted(set.intersection(*(set(rows) for rows in by_setting.values())))
    if not items:
        raise SystemExit(f"{folder}: no question was answered in every setting")
    return {name: _setting(name, [rows[item] for item in items]) for name, rows in by_setting.items()}


def _setting(name: str, rows: Sequence[dict[str, object]]) -> Setting:
    def column(field: str) -> NDArray[np.float64]:
        return np.array([row[field] for row in rows], np.float64)

    graded = all(row["correct"] is not None for row in rows)
    return Setting(
        name=name,
        policy=str(rows[0]["policy"]),
        draft_tokens=int(str(rows[0]["max_draft_tokens"])),
        passes=column("target_passes"),
        committed=column("committed"),
        correct=column("correct") if graded else None,
        agreement=column("agreement"),
    )


def interval(found: NDArray[np.float64], value: float, form: str = "{:.2f}") -> str:
    low, high = np.quantile(found, (0.025, 0.975))
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def compare(run: str, setting: Setting, lossless: Setting) -> Row:
    """With the lossless setting of the same draft length, by a paired bootstrap over questions."""
    drawn = np.random.default_rng(0).integers(0, len(setting.passes), (DRAWS, len(setting.passes)))

    def per_token(each: Setting) -> NDArray[np.float64]:
        return each.passes[drawn].sum(axis=1) / each.committed[drawn].sum(axis=1)

    ratio = setting.passes_per_token / lossless.passes_per_token
    if setting.correct is None or lossless.correct is None:
        loss, points, right = 1.0 - float(setting.agreement.mean()), "", ""
    else:
        gains = setting.correct - lossless.correct
        loss = -float(gains.mean())
        points = interval(100 * gains[drawn].mean(axis=1), 100 * float(gains.mean()), "{:+.1f}")
        right = f"{setting.correct.mean():.3f}"
    cells = [
        run,
        setting.name,
        str(len(setting.passes)),
        f"{setting.passes_per_token:.3f}",
        interval(per_token(setting) / per_token(lossless), ratio),
        right,
        points,
        interval(setting.agreement[drawn].mean(axis=1), float(setting.agreement.mean())),
    ]
    return Row(setting, cells, loss)


def on_front(row: Row, rows: Sequence[Row]) -> bool:
    """No other setting of the run needs fewer passes and loses no more."""
    return not any(
        other.setting.passes_per_token <= row.setting.passes_per_token
        and other.loss <= row.loss
        and (other.setting.passes_per_token, other.loss) != (row.setting.passes_per_token, row.loss)
        for other in rows
    )


def rows_of(folder: Path) -> list[list[str]]:
    settings = read(folder)
    lossless = {
        s.draft_tokens: s for s in settings.values() if s.policy == "lossless" and "-fb" not in s.name
    }
    lossless = lossless or {s.draft_tokens: s for s in settings.values() if s.policy == "lossless"}
    rows = [
        compare(folder.name, s, lossless[s.draft_tokens])
        for s in settings.values()
        if s.draft_tokens in lossless
    ]
    return [[*row.cells, "front" if on_front(row, rows) else ""] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `duet eval speculation`")
    arguments = parser.parse_args()
    manifests = [json.loads((run / "manifest.json").read_text(encoding="utf-8")) for run in arguments.runs]
    models = {
        f"{identity['edge']['model']} for {identity['cloud']}"
        for identity in (manifest["identity"] for manifest in manifests)
    }
    last = manifests[-1]
    save(
        "bild_front",
        command=f"python -m benchmarks.bild_front {' '.join(run.name for run in arguments.runs)}",
        title="What policy bild saves and costs",
        notes=f"{', '.join(sorted(models))}; greedy, stop-and-wait, by `duet eval speculation` or"
        " `benchmarks.bild_rows`. Against lossless at the same draft length, on the same questions; 95%"
        " bootstrap intervals over questions, which say little of quality where there are few."
        " front: no other setting of the run needs fewer passes and loses no more (of right answers, else of"
        f" agreement). Aim: <= 0.6 of the passes at <= {100 * MAX_LOSS:g} point.",
        columns=[
            "run",
            "setting",
            "questions",
            "passes / token",
            "of lossless",
            "right",
            "points against lossless",
            "agreement with the target's text",
            "",
        ],
        rows=[row for run in arguments.runs for row in rows_of(run)],
        ran_on=last["machine"] if "machine" in last else machine_of(last["about"]),
    )


if __name__ == "__main__":
    main()
