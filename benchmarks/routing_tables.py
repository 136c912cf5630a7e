"""The tables of docs/routing.md, made from runs of `duet eval`; docs/evaluation.md has the commands of those.

    python -m benchmarks.routing_tables RUNS --questions mmlu.jsonl

RUNS is a folder with the runs that `FOLDERS` names. In the page each table stands between two comments that
name it; what lies between them is replaced.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.late_evidence import lowest_window
from edge_agent.evaluation import metrics
from edge_agent.evaluation.crossfit import (
    SINGLE,
    Bools,
    Method,
    Pair,
    crossfit_gain,
    crossfit_length,
    crossfit_probability,
    feature_names,
    feature_table,
    folds,
    outcomes,
    single_choices,
)
from edge_agent.evaluation.feature_sets import feature_sets, with_course
from edge_agent.evaluation.items import load_items
from edge_agent.evaluation.markdown import markdown_table, show
from edge_agent.evaluation.metrics import Floats
from edge_agent.evaluation.priors import with_prior_of_questions
from edge_agent.evaluation.runs import Row, read_run
from edge_agent.evaluation.summary import verdict
from edge_agent.routing.calibration import Calibration, Result, fit, result_of
from edge_agent.routing.probes import GUESSES, SHAPE_FEATURES, default_probes
from shared.bootstrap import Estimate, bootstrap_interval, paired_bootstrap_difference

PAGE = Path(__file__).parent.parent / "docs" / "routing.md"
FOLDERS = (
    *("0.5b-mmlu", "1.5b-mmlu", "0.5b-gsm8k", "1.5b-gsm8k"),
    *("pair-mmlu", "pair-gsm8k", "fresh-1.5b-mmlu", "length-spec_bench"),
)
CHOSEN = "letters-few-shot.entropy"
"""The number that was found to tell best on the rows of 1.5b-mmlu, and then asked of fresh questions."""
EARLY = 300
"""Questions of the table of probes."""


@dataclass(frozen=True)
class Runs:
    """Where the runs are, and the questions with the right letters."""

    folder: Path
    questions: Path

    @cache  # noqa: B019  one object a process
    def rows(self, name: str) -> list[Row]:
        return read_run(self.folder / name)[1]

    @cache  # noqa: B019
    def guessed(self, name: str) -> list[Row]:
        """With the prior of the questions taken off the guesses."""
        return with_prior_of_questions(self.rows(name), GUESSES)

    @cache  # noqa: B019
    def right_letters(self) -> dict[str, str | None]:
        return {item.id: item.answer for item in load_items(str(self.questions))}


# One score


def column(rows: Sequence[Row], feature: str) -> Floats:
    """[n] a feature, its mean where a row has none."""
    values = feature_table(rows, [feature])[:, 0]
    return np.where(np.isnan(values), np.nanmean(values), values)


def prompt_length(rows: Sequence[Row]) -> Floats:
    return np.array([row["prompt_tokens"] for row in rows], float)


def apgr_and_difference(scores: Floats, rows: Sequence[Row], edge: Bools, cloud: Bools) -> list[str]:
    found = bootstrap_interval(metrics.apgr, scores, edge, cloud)
    gained = paired_bootstrap_difference(metrics.apgr, scores, prompt_length(rows), edge, cloud)
    return [show(found), f"{show(gained)} {verdict(gained)}"]


def auroc(scores: Floats, labels: Bools) -> str:
    return f"{metrics.auroc(scores, labels):.3f}"


def router_line(
    name: str, need: Floats, hard: Floats, rows: Sequence[Row], edge: Bools, cloud: Bools
) -> list[str]:
    """A router by its score `need`, and what another fit (or the same number) says of *hard*."""
    return [
        name,
        auroc(hard, ~edge),
        auroc(need, ~edge & cloud),
        *apgr_and_difference(need, rows, edge, cloud),
    ]


ROUTERS = (
    *("signals", "AUROC hard", "AUROC need", "APGR", "minus prompt length"),
    *("ECE (ceiling)", "Brier skill"),
)


def calibrated(probabilities: Floats, labels: Bools) -> list[str]:
    ece, ceiling = metrics.ece(probabilities, labels), metrics.ece_ceiling(probabilities)
    skill = bootstrap_interval(metrics.brier_skill, probabilities, labels)
    return [f"{ece:.3f} ({ceiling:.3f})", show(skill)]


class Pool:
    """Rows with known outcomes, and the routers that can be made of their numbers."""

    def __init__(self, rows: Sequence[Row], pair: Pair) -> None:
        self.rows, self.edge, cloud = outcomes(rows, pair)
        assert cloud is not None, "the run has no outcomes of the cloud"
        self.cloud: Bools = cloud
        self.need: Bools = ~self.edge & cloud

    def number(self, name: str, scores: Floats) -> list[str]:
        return [*router_line(name, scores, scores, self.rows, self.edge, self.cloud), "", ""]

    def length(self) -> list[str]:
        return self.number("prompt length (longer goes to the cloud)", prompt_length(self.rows))

    def blend(self, name: str, features: Sequence[str], method: Method = "logistic") -> list[str]:
        table = feature_table(self.rows, features)
        need, hard = (crossfit_probability(table, label, method=method) for label in (self.need, ~self.edge))
        line = router_line(name, need, hard, self.rows, self.edge, self.cloud)
        return [*line, *calibrated(need, self.need)]

    def single(self, features: Sequence[str]) -> list[str]:
        table = feature_table(self.rows, features)
        chosen = sorted({features[i] for i in single_choices(table, self.need)})
        name = f"{SINGLE} (of {len(features)}: {', '.join(f'`{name}`' for name in chosen)})"
        return self.blend(name, features, "single")

    def ceilings(self, features: Sequence[str]) -> list[list[str]]:
        """What other fits, and more knowledge than there is, would give."""
        table = feature_table(self.rows, features)
        boosted = crossfit_probability(table, self.need, method="boosting")
        gain = crossfit_gain(table, self.edge, self.cloud)
        right = [crossfit_probability(table, label) for label in (self.edge, self.cloud)]
        found = {
            "gradient boosting of the same numbers": boosted,
            "expected gain of the cloud, from the same numbers": gain,
            "P(cloud right) - P(edge right), from the same numbers": right[1] - right[0],
            "knowing for sure which answers of the edge are wrong": (~self.edge).astype(float),
            "oracle": metrics.oracle_scores(self.edge, self.cloud),
        }
        lines = [
            [name, auroc(scores, ~self.edge), auroc(scores, self.need), f"{self.apgr(scores):.3f}", *[""] * 3]
            for name, scores in found.items()
        ]
        exact = [
            "as if both fits were exact (labels drawn from them)",
            "",
            "",
            f"{exact_apgr(*right):.3f}",
            *[""] * 3,
        ]
        return [*lines[:3], exact, *lines[3:]]

    def apgr(self, scores: Floats) -> float:
        return metrics.apgr(scores, self.edge, self.cloud)


def exact_apgr(edge: Floats, cloud: Floats, draws: int = 1000) -> float:
    """Mean APGR of P(cloud right) - P(edge right), had the answers been drawn with just these probabilities.

    Args:
        edge: [n] probability that the edge is right. cloud: [n] that the cloud is.
    """
    rng = np.random.default_rng(0)
    made = (rng.random(edge.shape) < edge for _ in range(draws))
    return float(
        np.mean([metrics.apgr(cloud - edge, right, rng.random(cloud.shape) < cloud) for right in made])
    )


# Tables


def prior(runs: Runs) -> str:
    """Letters read off the probes, with the prior of a question without content or of the questions."""
    asked = {
        "in its own mouth (`letters`)": "letters",
        "in a prompt (`letters-prompt`)": "letters-prompt",
        "after four examples (`letters-few-shot`)": "letters-few-shot",
    }
    sources = [get(f"{model}-mmlu") for model in ("0.5b", "1.5b") for get in (runs.rows, runs.guessed)]
    lines = [
        [name, *(_letters(rows, probe, runs.right_letters()) for rows in sources)]
        for name, probe in asked.items()
    ]
    in_words = [f"{np.mean([row['edge']['text_correct'] for row in rows]):.0%}" for rows in sources]
    columns = [f"{model}, {what}" for model in ("0.5B", "1.5B") for what in ('"N/A"', "questions")]
    return markdown_table(
        ["letters asked", *columns], [*lines, ["in words", in_words[0], "", in_words[2], ""]]
    )


def _letters(rows: Sequence[Row], probe: str, right: Mapping[str, str | None]) -> str:
    wrong = np.array(
        [max(d, key=d.__getitem__) != right[row["id"]] for row in rows for d in [row["distributions"][probe]]]
    )
    return f"{1 - wrong.mean():.0%}, {metrics.auroc(column(rows, probe), wrong):.2f}"


def probes(runs: Runs) -> str:
    """Each probe's value against the model's own errors: the 0.5B on the first questions, then all rows."""
    names = ["0.5b-mmlu", "0.5b-mmlu", "1.5b-mmlu", "0.5b-gsm8k", "1.5b-gsm8k"]
    of_run = [runs.rows(name) for name in names]
    order = {id_: i for i, id_ in enumerate(runs.right_letters())}
    of_run[0] = sorted(of_run[0], key=lambda row: order[row["id"]])[:EARLY]
    known = sorted({probe for rows in of_run for row in rows for probe in row["values"]})
    lines = [
        (found := [_against_errors(rows, probe, with_interval=not i) for i, rows in enumerate(of_run)])
        and [f"`{probe}`", *found]
        for probe in known
    ]
    lines.sort(key=lambda line: line[1] if line[1] != "–" else "", reverse=True)
    lengths = [
        show(_own_errors(rows, prompt_length(rows)))
        if not i
        else _short(_own_errors(rows, prompt_length(rows)))
        for i, rows in enumerate(of_run)
    ]
    columns = [
        f"0.5B, MMLU, first {EARLY}",
        *(
            f"{name.split('-')[0].upper()}, {name.split('-')[1].upper()}, {len(runs.rows(name)):,}"
            for name in names[1:]
        ),
    ]
    return markdown_table(
        ["probe", *columns], [*lines, ["prompt length", *lengths], ["chance", *[".500"] * 5]]
    )


def _against_errors(rows: Sequence[Row], probe: str, *, with_interval: bool) -> str:
    has = [row for row in rows if row["values"].get(probe) is not None]
    if len(has) < len(rows) / 2:
        return "–"
    found = _own_errors(has, np.array([row["values"][probe] for row in has], float))
    return show(found) if with_interval else _short(found)


def _own_errors(rows: Sequence[Row], scores: Floats) -> Estimate:
    return bootstrap_interval(metrics.auroc, scores, [not row["edge"]["correct"] for row in rows])


def _short(estimate: Estimate) -> str:
    """An interval that leaves chance out is marked."""
    star = "*" if estimate.low > 0.5 or estimate.high < 0.5 else ""
    return f"{estimate.value:.3f}{star}"


def routellm_mmlu(runs: Runs) -> str:
    large, small = (Pool(runs.guessed(f"{model}-mmlu"), "routellm") for model in ("1.5b", "0.5b"))
    sets, small_sets = feature_sets(large.rows), feature_sets(small.rows)
    letters = [name for name in sets["all before the answer"] if name.startswith("letters")]
    lines = [
        large.length(),
        large.number(f"1.5B, `{CHOSEN}`, chosen on these rows", column(large.rows, CHOSEN)),
        large.number("1.5B, `letters.entropy`", column(large.rows, "letters.entropy")),
        large.single(sets[SINGLE]),
        large.blend("1.5B, blend of `letters-few-shot`", sets["letters-few-shot"]),
        large.blend("1.5B, blend of all letters", letters),
        large.blend("1.5B, blend of everything", sets["all before the answer"]),
        large.blend("1.5B, shape alone", sets["shape"]),
        *large.ceilings(sets["all before the answer"]),
        small.blend(
            f"0.5B (n = {len(small.rows):,}), blend of everything", small_sets["all before the answer"]
        ),
        small.number(f"0.5B, `{CHOSEN}`", column(small.rows, CHOSEN)),
    ]
    return markdown_table(ROUTERS, lines)


def fresh(runs: Runs) -> str:
    """The chosen number on questions that took no part in its choice, and on all that were ever asked."""
    old, new = runs.rows("1.5b-mmlu"), runs.rows("fresh-1.5b-mmlu")
    lines = []
    for name, rows in (("fresh", new), ("where it was chosen", old), ("all", [*old, *new])):
        pool = Pool(with_prior_of_questions(rows, GUESSES), "routellm")
        n = f"{name}, n = {len(pool.rows):,}"
        number = pool.number(f"{n}: `{CHOSEN}`", column(pool.rows, CHOSEN))
        fitted = pool.blend("", [CHOSEN], "platt")
        lines += [[*number[:-2], *fitted[-2:]], pool.number(f"{n}: prompt length", prompt_length(pool.rows))]
    return markdown_table(ROUTERS, lines)


def routellm_gsm8k(runs: Runs) -> str:
    pool = Pool(runs.guessed("1.5b-gsm8k"), "routellm")
    sets = feature_sets(pool.rows)
    names = (
        "shape",
        "suffix probes",
        "prompt-form probes",
        "suffix probes and shape",
        "all before the answer",
    )
    return markdown_table(
        ROUTERS, [pool.length(), pool.single(sets[SINGLE]), *(pool.blend(name, sets[name]) for name in names)]
    )


def pair_gsm8k(runs: Runs) -> str:
    pool = Pool(with_course(runs.rows("pair-gsm8k")), "own")
    sets = feature_sets(pool.rows)
    course = [row["edge"]["logprobs"] for row in pool.rows]
    numbers = {
        "lowest mean of 8 tokens' probabilities": [-lowest_window(logprobs) for logprobs in course],
        "mean log-probability of the answer": [-np.mean(logprobs) for logprobs in course],
        "of its first 64 tokens": [-np.mean(logprobs[:64]) for logprobs in course],
        "of its first 16 tokens (`confidence-draft`)": [-np.mean(logprobs[:16]) for logprobs in course],
    }
    lines = [
        pool.length(),
        pool.single(sets[SINGLE]),
        pool.blend("everything before the answer", sets["all before the answer"]),
        *(pool.number(name, np.array(scores)) for name, scores in numbers.items()),
        pool.blend("everything, the whole answer too", sets["and the whole answer"]),
        *pool.ceilings(sets["and the whole answer"]),
    ]
    return markdown_table(ROUTERS, lines)


def pair_mmlu(runs: Runs) -> str:
    pool, guessed = (Pool(get("pair-mmlu"), "own") for get in (runs.rows, runs.guessed))
    sets = feature_sets(pool.rows)
    names = (
        "letters",
        "letters-few-shot",
        "suffix probes",
        "suffix probes and shape",
        "all before the answer",
    )
    lines = [
        pool.length(),
        pool.blend("prompt length, its sign fitted", sets["prompt length"]),
        pool.single(sets[SINGLE]),
        *(pool.blend(name, sets[name]) for name in names),
        guessed.blend("the same, with the prior of the questions", sets["all before the answer"]),
        *pool.ceilings(sets["all before the answer"]),
    ]
    return markdown_table(ROUTERS, lines)


def length(runs: Runs) -> str:
    """Predicted against actual tokens of whole answers, cross-fitted."""
    lines = []
    for name in ("0.5b-gsm8k", "1.5b-gsm8k", "length-spec_bench"):
        rows = [row for row in map(_answered, runs.rows(name)) if row is not None]
        tokens = np.array([row["tokens"] for row in rows], float)
        items = [row["item"] for row in rows]
        constant = np.abs(tokens - metrics.best_constant(tokens))
        features = feature_names(rows)
        fitted = {
            "prompt length": crossfit_length(
                feature_table(rows, ["prompt_tokens.log"]), tokens, groups=items
            ),
            "blend": crossfit_length(feature_table(rows, features), tokens, groups=items),
            "gradient boosting": crossfit_length(
                feature_table(rows, features), tokens, groups=items, boosting=True
            ),
        }
        lines.append(
            [
                f"{name}, n = {len(rows)}",
                f"{tokens.mean():.0f}",
                show(bootstrap_interval(np.mean, constant), 1),
                *(
                    f"{np.abs(p - tokens).mean():.1f}, {_ratio(np.abs(p - tokens), constant)}"
                    for p in fitted.values()
                ),
            ]
        )
    return markdown_table(
        ["answers", "mean tokens", "best constant", "prompt length", "blend", "gradient boosting"], lines
    )


def _answered(row: Row) -> Row | None:
    """A whole plain answer of either experiment, with the features of its question."""
    answer = row.get("edge", row)
    if answer["censored"] or row.get("prompt", "plain") != "plain":
        return None
    return {
        "features": row["features"],
        "prompt_tokens": row["prompt_tokens"],
        "tokens": answer["tokens"],
        "item": row.get("item", row["id"]),
    }


def _ratio(errors: Floats, constant: Floats) -> str:
    return show(bootstrap_interval(lambda a, b: float(a.sum() / b.sum()), errors, constant), 2)


def late_evidence(runs: Runs) -> str:
    """What thresholds of doubt would move to the cloud, and what that would recover."""
    pool = Pool(runs.rows("pair-gsm8k"), "own")
    lowest = np.array([lowest_window(row["edge"]["logprobs"]) for row in pool.rows])
    gap = pool.cloud.mean() - pool.edge.mean()
    lines = []
    for threshold in (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8):
        moved = lowest < threshold
        right = np.where(moved, pool.cloud, pool.edge).mean()
        wrong = (f"{1 - pool.edge[part].mean():.0%}" if part.any() else "–" for part in (moved, ~moved))
        recovered = (right - pool.edge.mean()) / gap
        lines.append([f"{threshold:g}", f"{moved.mean():.0%}", *wrong, f"{right:.0%}", f"{recovered:.2f}"])
    columns = ("`doubt_threshold`", "answers that move", "wrong among these", "wrong among those that stay")
    return markdown_table([*columns, "right, with the cloud for these", "gap recovered (PGR)"], lines)


def calibration(runs: Runs) -> str:
    """`duet calibrate` itself, cross-fitted: each fold fitted and its threshold set on the others."""
    rows = [*runs.rows("pair-mmlu"), *runs.rows("pair-gsm8k")]
    results = [result_of(row) for row in rows]
    of_set = np.array([row["id"].partition("/")[0] for row in rows])
    need = np.array([result.label for result in results])
    edge = np.array([result.edge_correct for result in results])
    cloud = np.array([bool(result.cloud_correct) for result in results])
    auto = {probe.name for probe in default_probes()}
    features = [
        name
        for name in feature_names(rows)
        if name.partition(".")[0] in auto or name.startswith(SHAPE_FEATURES)
    ]
    lines = []
    for form in (False, True):
        p, sent = _crossfit_calibration(results, need, features, shape=form)
        for name in ("mmlu", "gsm8k"):
            inside = of_set == name
            n, q = need[inside], p[inside]
            lines.append(
                [
                    f"{'with' if form else 'without'} shape: {name}, n = {inside.sum():,}",
                    show(bootstrap_interval(metrics.auroc, q, n)),
                    show(bootstrap_interval(metrics.apgr, q, edge[inside], cloud[inside])),
                    *calibrated(q, n),
                    f"{sent[inside][n].mean():.0%} and {sent[inside][~n].mean():.0%}",
                ]
            )
    return markdown_table(
        ["fit", "AUROC need", "APGR", "ECE (ceiling)", "Brier skill", "sent: where needed, and elsewhere"],
        lines,
    )


def _crossfit_calibration(
    results: Sequence[Result], need: Bools, features: Sequence[str], *, shape: bool
) -> tuple[Floats, Bools]:
    fold = folds(need, len(results))
    p = np.empty(len(results))
    sent = np.empty(len(results), bool)
    for number in np.unique(fold):
        made: Calibration = fit(
            [results[i] for i in np.flatnonzero(fold != number)],
            model="",
            sha256="",
            fitted_on="",
            features=features,
            shape=shape,
            priors={},
            cloud_share=0.4,
        )
        for i in np.flatnonzero(fold == number):
            p[i] = made.p_cloud(results[i].features)
            sent[i] = p[i] >= made.threshold
    return p, sent


TABLES: dict[str, Callable[[Runs], str]] = {
    "prior": prior,
    "probes": probes,
    "routellm-mmlu": routellm_mmlu,
    "fresh": fresh,
    "routellm-gsm8k": routellm_gsm8k,
    "pair-gsm8k": pair_gsm8k,
    "pair-mmlu": pair_mmlu,
    "length": length,
    "calibration": calibration,
    "late-evidence": late_evidence,
}


def replaced(page: str, name: str, table: str) -> str:
    """The page with this table between the comments that name it.

    >>> replaced("<!-- table x -->\\n\\nold\\n\\n<!-- end x -->", "x", "new")
    '<!-- table x -->\\n\\nnew\\n\\n<!-- end x -->'
    """
    found = re.compile(rf"(<!-- table {name} -->\n\n).*?(\n\n<!-- end {name} -->)", flags=re.S)
    made, times = found.subn(lambda match: match[1] + table + match[2], page)
    if times != 1:
        raise ValueError(f"the page holds the table {name} {times} times")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help=f"folder that holds the runs {', '.join(FOLDERS)}")
    parser.add_argument("--questions", type=Path, required=True, help="the MMLU file of the runs")
    parser.add_argument("--table", choices=TABLES, action="append", help="repeatable; all otherwise")
    parser.add_argument("--print", action="store_true", help="print them, and leave the page alone")
    arguments = parser.parse_args()
    runs = Runs(arguments.runs, arguments.questions)
    for name in arguments.table or TABLES:
        table = TABLES[name](runs)
        print(f"{name}\n\n{table}\n", flush=True)
        if not arguments.print:
            PAGE.write_text(replaced(PAGE.read_text("utf-8"), name, table), "utf-8")


if __name__ == "__main__":
    main()
