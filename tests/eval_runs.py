"""Runs as `duet eval` leaves them, filled with made-up numbers: for tests of what reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

SUBJECTS = ("abstract_algebra", "anatomy", "high_school_government_and_politics", "virology")
CATEGORIES = ("writing", "coding", "math", "translation")


def write_run(folder: Path, experiment: str, rows: list[Row], **identity: Any) -> Path:
    folder.mkdir(parents=True)
    manifest = {
        "identity": {
            "experiment": experiment,
            "data": "mmlu.jsonl",
            "items_sha256": "34" * 32,
            "edge": {"model": "edge-0.5b", "sha256": "1d" * 32},
            "cloud": "cloud-1.5b",
            **identity,
        },
        "about": {
            "started": "2026-11-24T15:42:26+00:00",
            "python": "3.11.7",
            "system": "Linux x86_64",
            "cpu": "Some CPU",
            "cores": 2,
            "versions": {"duet-llm": "0.1.0", "numpy": "2.4.6", "llama-cpp-python": None},
            "command": f"duet eval {experiment} --data mmlu.jsonl --out {folder.name}",
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def routing_rows(
    num: int = 120,
    seed: int = 0,
    subjects: tuple[str, ...] = SUBJECTS,
    change: Callable[[Row], Row] = lambda row: row,
) -> list[Row]:
    """Questions of a hidden difficulty, which probes read with noise and prompt length hints at."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        subject = subjects[number % len(subjects)]
        difficulty = rng.normal(0.4 * (number % len(subjects)) / len(subjects), 1.0)
        tokens = int(np.exp(4.5 + 0.2 * difficulty + rng.normal(0, 0.4)))
        edge = bool(rng.random() < _sigmoid(0.2 - 1.2 * difficulty))
        cloud = bool(rng.random() < _sigmoid(1.4 - 0.9 * difficulty))
        who = _sigmoid(difficulty + rng.normal(0, 1.0))
        rating = float(np.clip(round(3 + difficulty + rng.normal(0, 1)), 1, 5))
        rows.append(
            change(
                {
                    "id": f"mmlu/{subject}/{number}",
                    "kind": "choice",
                    "group": subject,
                    "level": None,
                    "prompt_tokens": tokens,
                    "prompt_chars": 4 * tokens,
                    "features": {
                        "who": who,
                        "confidence": _sigmoid(0.8 * difficulty + rng.normal(0, 1.2)),
                        "rating": (rating - 1) / 4,
                        "prompt_tokens.log": math.log(tokens),
                    },
                    "values": {
                        "who": who,
                        "rating": (rating - 1) / 4,
                        "bins": float(rng.lognormal(4.5, 0.5)),
                        "ten-times": None if number % 3 else float(difficulty > 0),
                    },
                    "distributions": {"rating": {str(level): 0.2 for level in range(1, 6)}},
                    "texts": {"ten-times": "me"},
                    "estimates": {
                        "who": "difficulty",
                        "rating": "difficulty",
                        "bins": "length",
                        "ten-times": "difficulty",
                    },
                    "edge": {
                        "correct": edge,
                        "answer": "B",
                        "by": "letter",
                        "tokens": int(rng.integers(1, 12)),
                        "censored": False,
                        "text_correct": edge,
                        "text_answer": "B",
                    },
                    "cloud": {"correct": cloud, "answer": "B", "by": "text", "tokens": 2, "censored": False},
                    "labels": {
                        "routellm_weak": bool(rng.random() < _sigmoid(0.8 - difficulty)),
                        "routellm_strong": bool(rng.random() < _sigmoid(1.8 - difficulty)),
                    },
                    "num_evaluated": tokens + 20,
                    "seconds": 0.6,
                }
            )
        )
    return rows


def length_rows(num: int = 60, seed: int = 0, limit: int = 400) -> list[Row]:
    """Answers whose length a probe guesses within a factor of about 1.6."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        typical = float(rng.lognormal(5.0, 0.7))
        bins = typical * float(rng.lognormal(0.0, 0.5))
        prompt_tokens = int(rng.lognormal(4.5, 0.4))
        for prompt in ("plain", "words-first-line"):
            for temperature, sample in ((0.0, 0), (0.7, 0), (0.7, 1)):
                tokens = int(typical * rng.lognormal(0.0, 0.15))
                written = None if rng.random() < 0.2 else int(tokens * 0.7 * rng.lognormal(0.0, 0.6)) + 1
                rows.append(
                    {
                        "id": f"gsm8k/{number}|{prompt}|{temperature:g}|{sample}",
                        "item": f"gsm8k/{number}",
                        "kind": "number",
                        "group": "gsm8k",
                        "prompt": prompt,
                        "temperature": temperature,
                        "seed": sample,
                        "prompt_tokens": prompt_tokens,
                        "tokens": min(tokens, limit),
                        "words": int(0.7 * min(tokens, limit)),
                        "censored": tokens >= limit,
                        "correct": bool(rng.random() < 0.4),
                        "predicted_words": written if prompt == "words-first-line" else None,
                        "features": {
                            "bins.log": math.log(bins),
                            "prompt_tokens.log": math.log(prompt_tokens),
                        },
                        "values": {"bins": bins},
                        "distributions": {"bins": {"sentence": 0.5, "paragraph": 0.5}},
                    }
                )
    return rows


def speculation_rows(num: int = 16, seed: int = 0) -> list[Row]:
    """Every question under each policy and draft length; lenient policies accept more and agree less."""
    rng = np.random.default_rng(seed)
    rows = []
    for policy, acceptance, agreement in (("lossless", 0.6, 1.0), ("bild", 0.75, 0.9), ("judge", 0.85, 0.8)):
        for gamma in (2, 4, 8):
            for number in range(num):
                rounds, accepted, rejections = 0, 0, 0
                while accepted + rounds < 64:
                    run = 0
                    while run < gamma and rng.random() < acceptance:
                        run += 1
                    rounds, accepted, rejections = rounds + 1, accepted + run, rejections + (run < gamma)
                rows.append(
                    {
                        "id": f"spec_bench/{number}|{policy}-{gamma}",
                        "item": f"spec_bench/{number}",
                        "category": CATEGORIES[number % len(CATEGORIES)],
                        "setting": f"{policy}-{gamma}",
                        "policy": policy,
                        "max_draft_tokens": gamma,
                        "fallback_threshold": 0.0,
                        "rollback_threshold": 5.0 if policy == "bild" else None,
                        "temperature": 0.0,
                        "committed": accepted + rounds,
                        "rounds": rounds,
                        "drafted": rounds * gamma,
                        "accepted": accepted,
                        "rejections": rejections,
                        "target_passes": rounds,
                        "seconds": 0.1 * rounds,
                        "ttft_s": 0.3,
                        "correct": None,
                        "agreement": float(np.clip(agreement + rng.normal(0, 0.05), 0, 1))
                        if policy != "lossless"
                        else 1.0,
                    }
                )
    return rows


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
