"""How well each probe predicts the edge model's own errors on multiple-choice questions: AUROC.

The data set is named by argument (JSON lines with `id`, `question`, `choices` and the letter `answer`, or
without choices a number as `answer` or texts as `answers`) and nothing of it is stored; the results file
holds figures only. An interrupted run goes on where it stopped, and `duet calibrate --results` reads the
same file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from edge_agent.edge_model import EdgeModel
from edge_agent.routing.probes import all_probes, cheap_features, default_probes, multiple_choice
from edge_agent.routing.reading import QuestionReader
from shared.config import DEFAULT_DRAFT, EdgeConfig
from shared.messages import Message
from shared.models import Registry, resolve

MAX_ANSWER_TOKENS = 256


def answer_alone(edge: EdgeModel, prompt: tuple[int, ...]) -> tuple[str, int]:
    """The edge model's greedy answer and its length in tokens."""
    written: list[int] = []
    pending = list(prompt[edge.context.align(0, prompt[:-1]) :])
    while len(written) < MAX_ANSWER_TOKENS:
        token = int(np.argmax(edge.context.extend(0, pending, 1)[0]))
        written.append(token)
        pending = [token]
        if token in edge.model.end_token_ids:
            break
    return b"".join(map(edge.model.piece, written)).decode("utf-8", "replace"), len(written)


def last_number(text: str) -> str | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def is_right(answer: str, row: dict[str, Any]) -> bool:
    """A number must be the last one named; of texts, one must stand in the answer as whole words."""
    if "answers" in row:
        return any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", answer, re.IGNORECASE) for a in row["answers"])
    found = last_number(answer)
    return found is not None and float(found) == float(row["answer"])


def examine(
    edge: EdgeModel, reader: QuestionReader, row: dict[str, Any], probes: list[Any]
) -> dict[str, Any]:
    """One question: what the probes say, and whether the edge model is right."""
    text = multiple_choice(row["question"], row["choices"]) if "choices" in row else row["question"]
    question = reader.question([Message("user", text)])
    readings = reader.read(question, probes)
    result: dict[str, Any] = {
        "id": row["id"],
        "features": cheap_features(question) | {k: v for r in readings for k, v in r.features.items()},
        "values": {r.probe: r.value for r in readings},
        "distributions": {r.probe: dict(r.distribution) for r in readings},
    }
    if "choices" in row:
        letters = next(r.distribution for r in readings if r.probe == "letters")
        result["edge_correct"] = max(letters, key=letters.__getitem__) == row["answer"]
    else:
        answer, result["completion_tokens"] = answer_alone(edge, question.token_ids)
        result["edge_correct"] = is_right(answer, row)
    return result


def collect(edge: EdgeModel, arguments: argparse.Namespace) -> None:
    """Examine what the results file lacks, within the time that was given."""
    began = time.monotonic()
    done = {json.loads(line)["id"] for line in _lines(arguments.results)}
    reader = QuestionReader(edge, {})
    probes = all_probes() if arguments.all_probes else default_probes()
    rows = [json.loads(line) for line in _lines(arguments.data)]
    with arguments.results.open("a", encoding="utf-8") as results:
        for row in rows[arguments.skip : arguments.skip + arguments.questions]:
            if time.monotonic() - began > arguments.max_seconds:
                break
            if row["id"] not in done:
                results.write(json.dumps(examine(edge, reader, row, probes)) + "\n")
                results.flush()


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney U)."""
    above = (scores[positive][:, None] > scores[~positive][None, :]).mean()
    equal = (scores[positive][:, None] == scores[~positive][None, :]).mean()
    return float(above + equal / 2)


def interval(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """95% interval of the AUROC by a bootstrap over questions, with a fixed seed."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(500):
        picked = rng.integers(0, len(scores), len(scores))
        if 0 < positive[picked].sum() < len(picked):
            draws.append(auroc(scores[picked], positive[picked]))
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def report(arguments: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in _lines(arguments.results)]
    wrong = np.array([not row["edge_correct"] for row in rows])
    names = sorted({name for row in rows for name in row["features"]})
    table = [["chance", "0.500", ""]]
    for name in names:
        scores = np.array([row["features"].get(name, np.nan) for row in rows])
        seen = ~np.isnan(scores)
        low, high = interval(scores[seen], wrong[seen])
        table.append([name, f"{auroc(scores[seen], wrong[seen]):.3f}", f"{low:.3f} to {high:.3f}"])
    save(
        "probe_auroc",
        command=f"python -m benchmarks.probe_auroc --data mmlu.jsonl --questions {arguments.questions}",
        title="AUROC of each probe against the edge model's own errors",
        notes=f"{arguments.model}, {len(rows)} questions of {arguments.data.name}, {wrong.mean():.1%} wrongly"
        " answered; above 0.5 means that a higher reading goes with an error. No fitting.",
        columns=["reading", "AUROC", "95% interval"],
        rows=table,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="figures by question; appended to")
    parser.add_argument("--model", default=DEFAULT_DRAFT)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--all-probes", action="store_true")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report_only:
        resolved = resolve(arguments.model, Registry.load())
        config = EdgeConfig(mode="auto", context_tokens=2048, threads=arguments.threads)
        edge = await EdgeModel.load(resolved.path, resolved.name, config)
        await edge.run(lambda: collect(edge, arguments))
        await edge.close()
    report(arguments)


if __name__ == "__main__":
    asyncio.run(main())
