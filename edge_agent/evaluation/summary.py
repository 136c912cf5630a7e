"""From a run's rows to its headline numbers, with intervals and curves; the report only shows them.

Intervals are 95% percentile bootstraps over questions. A cross-fitted score is drawn with its question and
not fitted again in each draw. What cannot be computed is None, and `missing` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, is_dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_agent.evaluation import metrics
from edge_agent.evaluation.crossfit import (
    Bools,
    Pair,
    Row,
    SweepRow,
    crossfit_length,
    crossfit_probability,
    feature_names,
    feature_table,
    outcomes,
)
from edge_agent.evaluation.markdown import markdown_table, show
from edge_agent.evaluation.metrics import Floats
from shared.bootstrap import Estimate, bootstrap_interval, bootstrap_intervals, paired_bootstrap_difference
from shared.errors import InvalidRequest

Role = Literal["blend", "boosting", "length", "probe", "random", "oracle"]
Verdict = Literal["better", "worse", "unresolved"]

PLAIN = "plain"
PROMPT_LENGTH = "prompt_tokens.log"
"""The feature that says the same as a row's `prompt_tokens`."""


def as_json(summary: Any) -> Any:
    """A summary as what `json.dumps` takes: arrays as lists, what is not finite as None."""
    if is_dataclass(summary) and not isinstance(summary, type):
        return as_json(asdict(summary))
    if isinstance(summary, Mapping):
        return {str(key): as_json(value) for key, value in summary.items()}
    if isinstance(summary, np.ndarray | np.generic):
        return as_json(summary.tolist())
    if isinstance(summary, list | tuple):
        return [as_json(value) for value in summary]
    if isinstance(summary, float) and not math.isfinite(summary):
        return None
    return summary


def verdict(difference: Estimate, *, smaller_is_better: bool = False) -> Verdict:
    """A difference in words: "unresolved" unless its interval excludes 0."""
    if not difference.excludes_zero:
        return "unresolved"
    return "better" if (difference.value < 0) == smaller_is_better else "worse"


# --- routing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Router:
    """One score used as a router, as it stands: an AUROC below .5 is a score that is upside down."""

    name: str
    role: Role
    share: Floats | None
    """[n + 1] of questions sent; None without a cloud, as all that takes its answers."""
    accuracy: Floats | None
    """[n + 1]"""
    gap: Floats | None
    """[n + 1] performance gap recovered; None also where the two models are equally good."""
    apgr: Estimate | None
    auroc_hard: Estimate | None
    auroc_need: Estimate | None
    cpt50: Estimate | None
    cpt80: Estimate | None
    num_missing: int = 0
    """Questions without this score; they take its mean."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far the blend's probabilities can be taken at their word."""

    predicted: Floats
    """[bins]"""
    observed: Floats
    """[bins]"""
    counts: NDArray[np.int64]
    """[bins]"""
    edges: Floats
    """[bins + 1]"""
    ece: Estimate
    ece_ceiling: float
    """What a perfect predictor stays below 19 times in 20; see `metrics.ece_ceiling`."""
    brier: Estimate
    brier_skill: Estimate


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """A subject; NaN is not known."""

    name: str
    num_questions: int
    edge: float
    cloud: float
    sent: float
    """Share of its questions among the half of all that the blend sends."""


@dataclass(frozen=True, slots=True)
class RoutingSummary:
    """A run under one pair's labels."""

    pair: Pair
    num_questions: int
    edge: Estimate
    """Accuracy."""
    cloud: Estimate | None
    routers: list[Router]
    blend_minus_length: Estimate | None
    """APGR of the blend minus that of prompt length, paired."""
    reliability: Reliability | None
    scores: Mapping[str, Floats]
    """The blend's probabilities by outcome."""
    threshold: float | None
    """The blend's median: half go to the cloud."""
    confusion: NDArray[np.int64] | None
    """Route against need at the threshold, as `metrics.confusion`."""
    groups: list[GroupFigures]
    """Hardest for the edge first."""
    parse_failures: Mapping[str, float]
    """Written probe -> share of questions whose words were not understood."""
    missing: list[str]

    @property
    def verdict(self) -> Verdict | None:
        """The blend against prompt length."""
        return None if self.blend_minus_length is None else verdict(self.blend_minus_length)

    def to_markdown(self) -> str:
        lines = [
            f"{self.num_questions:,} questions; accuracy of the edge {show(self.edge)},"
            f" of the cloud {show(self.cloud)}.",
            "",
            markdown_table(
                ["", "AUROC (hard)", "AUROC (need)", "APGR", "CPT(50%)", "CPT(80%)"],
                [
                    [r.name, *map(show, (r.auroc_hard, r.auroc_need, r.apgr, r.cpt50, r.cpt80))]
                    for r in self.routers
                ],
            ),
        ]
        if self.blend_minus_length is not None:
            lines += [
                "",
                f"Blend minus prompt length, APGR: {show(self.blend_minus_length)}: {self.verdict}.",
            ]
        if (r := self.reliability) is not None:
            lines += [
                "",
                f"Blend: ECE {show(r.ece)} (a perfect predictor: up to {r.ece_ceiling:.3f}), Brier"
                f" {show(r.brier)}, Brier skill {show(r.brier_skill)}.",
            ]
        lines += [f"\nNot understood, {name}: {share:.1%}." for name, share in self.parse_failures.items()]
        return "\n".join([*lines, *(f"\nMissing: {reason}." for reason in self.missing)]) + "\n"


def summarise_routing(rows: Sequence[Row], *, draws: int = 1000) -> list[RoutingSummary]:
    """A summary for each pair that the rows have outcomes of."""
    pairs: tuple[Pair, ...] = ("own", "routellm")
    return [
        _summarise_pair(pair, *found, draws=draws) for pair in pairs if (found := outcomes(rows, pair))[0]
    ]


def _summarise_pair(
    pair: Pair, rows: Sequence[Row], edge: Bools, cloud: Bools | None, *, draws: int
) -> RoutingSummary:
    missing = []
    label = ~edge if cloud is None else ~edge & cloud
    if cloud is None:
        missing.append("all that takes the cloud's answers (curves, need, confusion): no cloud was asked")
    elif edge.sum() == cloud.sum():
        missing.append("APGR and CPT: edge and cloud are equally good here")
    names = feature_names(rows)
    table = feature_table(rows, names)
    length = np.array([row["prompt_tokens"] for row in rows], float)

    def router(name: str, role: Role, scores: Floats) -> Router:
        return _router(name, role, scores, edge, cloud, draws)

    routers = []
    p = None
    try:
        if not names:
            raise InvalidRequest("the rows have no features")
        p = crossfit_probability(table, label)
        routers.append(router("blend", "blend", p))
        boosted = crossfit_probability(table, label, method="boosting")
        routers.append(router("gradient boosting", "boosting", boosted))
    except InvalidRequest as error:
        missing.append(f"the blend and what rests on it: {error}")
    routers.append(router("prompt length", "length", length))
    probes = {name: column for name, column in zip(names, table.T, strict=True) if name != PROMPT_LENGTH}
    # Most probes' value is one of their features, which needs no second line.
    probes |= {
        f"value of {name}": column
        for name, column in _values(rows).items()
        if not any(np.allclose(column, known, atol=1e-4, equal_nan=True) for known in probes.values())
    }
    routers += [router(name, "probe", column) for name, column in probes.items()]
    routers.append(router("random", "random", metrics.random_scores(len(rows))))
    if cloud is not None:
        routers.append(router("oracle", "oracle", metrics.oracle_scores(edge, cloud)))
    difference = threshold = confusion = None
    if p is not None:
        threshold = float(np.median(p))
        if cloud is not None:
            confusion = metrics.confusion(p, label, threshold)
            difference = _defined(
                paired_bootstrap_difference(metrics.apgr, p, length, edge, cloud, draws=draws)
            )
    return RoutingSummary(
        pair=pair,
        num_questions=len(rows),
        edge=bootstrap_interval(np.mean, edge, draws=draws),
        cloud=None if cloud is None else bootstrap_interval(np.mean, cloud, draws=draws),
        routers=routers,
        blend_minus_length=difference,
        reliability=None if p is None else _reliability(p, label, draws),
        scores={} if p is None else _by_outcome(p, edge, cloud),
        threshold=threshold,
        confusion=confusion,
        groups=_groups(rows, edge, cloud, None if p is None else p >= np.median(p)),
        parse_failures=_parse_failures(rows),
        missing=missing,
    )


def _router(name: str, role: Role, scores: Floats, edge: Bools, cloud: Bools | None, draws: int) -> Router:
    unknown = np.isnan(scores)
    scores = np.where(unknown, np.nanmean(scores), scores)
    # Sorting small integers is what the draws repeat; the metrics see the order only.
    order = np.unique(scores, return_inverse=True)[1]
    num_missing = int(unknown.sum())
    if cloud is None:
        hard = _defined(bootstrap_interval(metrics.auroc, order, ~edge, draws=draws))
        return Router(name, role, None, None, None, None, hard, None, None, None, num_missing)
    shares, accuracies = metrics.accuracy_curve(scores, edge, cloud)
    gap = metrics.pgr_curve(scores, edge, cloud)[1]
    found = bootstrap_intervals(
        lambda *drawn: astuple(metrics.router_figures(*drawn)), order, edge, cloud, draws=draws
    )
    hard, need, apgr, cpt50, cpt80 = map(_defined, found)
    return Router(
        name=name,
        role=role,
        share=shares,
        accuracy=accuracies,
        gap=None if np.isnan(gap).any() else gap,
        apgr=apgr,
        auroc_hard=hard,
        auroc_need=need,
        cpt50=cpt50,
        cpt80=cpt80,
        num_missing=num_missing,
    )


def _reliability(p: Floats, label: Bools, draws: int) -> Reliability:
    bins = metrics.reliability(p, label)
    ece, brier, skill = bootstrap_intervals(
        lambda q, y: [metrics.ece(q, y), metrics.brier(q, y), metrics.brier_skill(q, y)],
        p,
        label,
        draws=draws,
    )
    return Reliability(
        bins.predicted, bins.observed, bins.counts, bins.edges, ece, metrics.ece_ceiling(p), brier, skill
    )


def _by_outcome(p: Floats, edge: Bools, cloud: Bools | None) -> dict[str, Floats]:
    if cloud is None:
        return {"edge right": p[edge], "edge wrong": p[~edge]}
    return {
        "edge right": p[edge],
        "edge wrong, cloud right": p[~edge & cloud],
        "both wrong": p[~edge & ~cloud],
    }


def _groups(rows: Sequence[Row], edge: Bools, cloud: Bools | None, sent: Bools | None) -> list[GroupFigures]:
    of = np.array([row.get("group", "") for row in rows])

    def share(flags: Bools | None, inside: Bools) -> float:
        return math.nan if flags is None else float(flags[inside].mean())

    found = [
        GroupFigures(
            str(name), int(inside.sum()), share(edge, inside), share(cloud, inside), share(sent, inside)
        )
        for name in np.unique(of)
        for inside in [of == name]
    ]
    return sorted(found, key=lambda group: group.edge)


def _values(rows: Sequence[Row]) -> dict[str, Floats]:
    """Each probe's value, [n], NaN where its words were not understood; without probes that never were."""
    names = sorted({name for row in rows for name in row.get("values", {})})
    table = {
        name: np.array(
            [np.nan if (v := row.get("values", {}).get(name)) is None else v for row in rows], float
        )
        for name in names
    }
    return {name: column for name, column in table.items() if not np.isnan(column).all()}


def _parse_failures(rows: Sequence[Row]) -> dict[str, float]:
    written = sorted({name for row in rows for name in row.get("texts", {})})
    return {
        name: float(np.mean([row["values"].get(name) is None for row in rows if name in row["texts"]]))
        for name in written
    }


def _defined(estimate: Estimate) -> Estimate | None:
    return None if math.isnan(estimate.value) else estimate


# --- length ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicted against actual tokens. Errors leave out censored answers and what was not understood."""

    name: str
    error: Estimate
    """Mean |predicted - actual|, tokens."""
    within_50: Estimate
    within_100: Estimate
    over_constant: Estimate
    """Its error over that of the best constant on the same answers."""
    parse_failures: float | None
    """None where nothing had to be understood."""
    predicted: Floats
    """[answers]; those understood only."""
    actual: Floats
    censored: Bools


@dataclass(frozen=True, slots=True)
class LengthCondition:
    """The answers under one prompt at one temperature."""

    prompt: str
    temperature: float
    num_answers: int
    tokens: Estimate
    """Mean of the answers that are not censored; NaN if all are."""
    accuracy: Estimate | None
    censored: float
    """Share that hit the cap."""


@dataclass(frozen=True, slots=True)
class PromptEffect:
    """A prompt against the plain one: same question, temperature and seed."""

    prompt: str
    temperature: float
    tokens: Estimate
    """Mean difference over pairs of which neither is censored."""
    accuracy: Estimate | None
    """Difference of accuracy over all graded pairs."""


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What the model's own sampling leaves to chance, whatever a predictor makes of the question."""

    temperature: float
    num_questions: int
    pair_difference: Estimate
    """Mean |a - b| over all pairs of plain answers to one question (neither censored), then over questions:
    Gini's mean difference. The error of the best prediction, the median of a question's own distribution,
    lies between half of it and the whole: E|a - m| <= E|a - b| <= 2 E|a - m|."""


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """How long the edge's answers are and how well that is foreseen."""

    num_questions: int
    predictors: list[Predictor]
    blend_minus_length: Estimate | None
    """Error of the blend minus that of the regression on prompt length, paired; below 0 is better."""
    conditions: list[LengthCondition]
    effects: list[PromptEffect]
    floors: list[NoiseFloor]
    tokens_per_word: Estimate | None
    """Of plain answers, all tokens over all words."""
    missing: list[str]

    @property
    def verdict(self) -> Verdict | None:
        """The blend against prompt length."""
        difference = self.blend_minus_length
        return None if difference is None else verdict(difference, smaller_is_better=True)

    def to_markdown(self) -> str:
        parts = [
            markdown_table(
                ["", "Error (tokens)", "Acc-50", "Acc-100", "of the best constant's", "not understood"],
                [
                    [
                        p.name,
                        *(
                            show(p.error, 1),
                            show(p.within_50),
                            show(p.within_100),
                            show(p.over_constant),
                        ),
                        "–" if p.parse_failures is None else f"{p.parse_failures:.1%}",
                    ]
                    for p in self.predictors
                ],
            ),
            markdown_table(
                ["", "answers", "tokens", "accuracy", "censored"],
                [
                    [
                        f"{c.prompt}, temperature {c.temperature:g}",
                        f"{c.num_answers:,}",
                        show(c.tokens, 1),
                        show(c.accuracy),
                        f"{c.censored:.1%}",
                    ]
                    for c in self.conditions
                ],
            ),
        ]
        if self.blend_minus_length is not None:
            parts.append(
                f"Blend minus prompt length, tokens: {show(self.blend_minus_length, 1)}: {self.verdict}."
            )
        parts += [
            f"{e.prompt} against plain at temperature {e.temperature:g}: {show(e.tokens, 1)} tokens,"
            f" accuracy {show(e.accuracy)}."
            for e in self.effects
        ]
        parts += [
            f"Two answers to one question at temperature {f.temperature:g} differ by"
            f" {show(f.pair_difference, 1)} tokens; no predictor's error is below half of that."
            for f in self.floors
        ]
        if self.tokens_per_word is not None:
            parts.append(f"Tokens per word: {show(self.tokens_per_word)}.")
        return "\n\n".join([*parts, *(f"Missing: {reason}." for reason in self.missing)]) + "\n"


def summarise_length(rows: Sequence[Row], *, draws: int = 1000) -> LengthSummary | None:
    """None without rows. Predictors are judged on plain answers of all temperatures together."""
    if not rows:
        return None
    plain = [row for row in rows if row["prompt"] == PLAIN]
    by_seed = {_seed(row): row for row in plain}
    whole = [row for row in plain if not row["censored"]]
    missing = []
    predictors: list[Predictor] = []
    difference = per_word = None
    if whole:
        per_word = _mean_by_question(
            [row["tokens"] for row in whole], whole, draws, weights=[row["words"] for row in whole]
        )
        predictors, difference, reason = _predictors(plain, draws)
        missing += reason
        for prompt in sorted({row["prompt"] for row in rows} - {PLAIN}):
            asked = [row for row in rows if row["prompt"] == prompt]
            words = np.array([np.nan if (w := row["predicted_words"]) is None else w for row in asked], float)
            predicted = words * per_word.value
            predictors.append(_predictor(prompt, asked, predicted, draws, written=True))
            # The prompt may change the answer beyond recognition; what is to be foreseen is the plain one.
            beside = [
                (by_seed[_seed(row)], tokens)
                for row, tokens in zip(asked, predicted, strict=True)
                if _seed(row) in by_seed
            ]
            if beside:
                of_plain = np.array([tokens for _, tokens in beside])
                name = f"{prompt}, of the plain answer"
                predictors.append(_predictor(name, [row for row, _ in beside], of_plain, draws, written=True))
    else:
        missing.append("every predictor: no plain answer that is not censored")
    conditions = sorted({(row["prompt"] != PLAIN, row["prompt"], row["temperature"]) for row in rows})
    effects = [
        _effect(rows, prompt, temperature, draws) for other, prompt, temperature in conditions if other
    ]
    floors = [
        _floor(whole, t, draws) for t in sorted({row["temperature"] for row in whole if row["temperature"]})
    ]
    return LengthSummary(
        num_questions=len({row["item"] for row in rows}),
        predictors=predictors,
        blend_minus_length=difference,
        conditions=[_condition(rows, prompt, t, draws) for _, prompt, t in conditions],
        effects=[effect for effect in effects if effect is not None],
        floors=[floor for floor in floors if floor is not None],
        tokens_per_word=per_word,
        missing=missing,
    )


def _seed(row: Row) -> tuple[str, float, int]:
    """What an answer has in common with that to the same question in another prompt."""
    return row["item"], row["temperature"], row["seed"]


def _predictors(rows: Sequence[Row], draws: int) -> tuple[list[Predictor], Estimate | None, list[str]]:
    """On plain answers: the constant, the fits, and each probe's own value."""
    tokens = np.array([row["tokens"] for row in rows], float)
    whole = np.array([not row["censored"] for row in rows])
    items = [row["item"] for row in rows]
    constant = np.full(len(rows), metrics.best_constant(tokens[whole]))
    found = [_predictor("best constant", rows, constant, draws)]
    difference = None
    missing = []
    names = feature_names(rows)
    length = np.log([[row["prompt_tokens"]] for row in rows])
    try:
        on_length = crossfit_length(length, tokens, fit_on=whole, groups=items)
        found.append(_predictor("regression on prompt length", rows, on_length, draws))
        if names:
            table = feature_table(rows, names)
            blend = crossfit_length(table, tokens, fit_on=whole, groups=items)
            boosted = crossfit_length(table, tokens, fit_on=whole, groups=items, boosting=True)
            found.append(_predictor("blend", rows, blend, draws))
            found.append(_predictor("gradient boosting", rows, boosted, draws))
            gained = np.abs(blend - tokens) - np.abs(on_length - tokens)
            kept = [row for row, use in zip(rows, whole, strict=True) if use]
            difference = _mean_by_question(gained[whole], kept, draws)
    except InvalidRequest as error:
        missing.append(f"the regressions: {error}")
    estimates = {name: kind for row in rows for name, kind in row.get("estimates", {}).items()}
    for name, column in _values(rows).items():
        if estimates.get(name, "length") == "length":
            found.append(_predictor(name, rows, column, draws, written=bool(np.isnan(column).any())))
    return found, difference, missing


def _predictor(
    name: str, rows: Sequence[Row], predicted: Floats, draws: int, *, written: bool = False
) -> Predictor:
    tokens = np.array([row["tokens"] for row in rows], float)
    censored = np.array([row["censored"] for row in rows], bool)
    understood = ~np.isnan(predicted)
    judged = understood & ~censored
    undefined = Estimate(math.nan)
    error = within_50 = within_100 = over_constant = undefined
    if judged.any():
        off = np.abs(predicted - tokens)[judged]
        of = [row for row, use in zip(rows, judged, strict=True) if use]
        constant = np.abs(tokens[judged] - metrics.best_constant(tokens[judged]))
        error = _mean_by_question(off, of, draws)
        within_50, within_100 = (_mean_by_question(off <= bound, of, draws) for bound in (50, 100))
        over_constant = _mean_by_question(off, of, draws, weights=constant)
    return Predictor(
        name=name,
        error=error,
        within_50=within_50,
        within_100=within_100,
        over_constant=over_constant,
        parse_failures=float(1 - understood.mean()) if written else None,
        predicted=predicted[understood],
        actual=tokens[understood],
        censored=censored[understood],
    )


def _condition(rows: Sequence[Row], prompt: str, temperature: float, draws: int) -> LengthCondition:
    answers = [row for row in rows if (row["prompt"], row["temperature"]) == (prompt, temperature)]
    whole = [row for row in answers if not row["censored"]]
    graded = [row for row in answers if row["correct"] is not None]
    tokens = Estimate(math.nan)
    if whole:
        tokens = _mean_by_question([row["tokens"] for row in whole], whole, draws)
    accuracy = _mean_by_question([row["correct"] for row in graded], graded, draws) if graded else None
    return LengthCondition(prompt, temperature, len(answers), tokens, accuracy, 1 - len(whole) / len(answers))


def _effect(rows: Sequence[Row], prompt: str, temperature: float, draws: int) -> PromptEffect | None:
    def answers(which: str) -> dict[tuple[str, float, int], Row]:
        return {
            _seed(row): row for row in rows if (row["prompt"], row["temperature"]) == (which, temperature)
        }

    plain, other = answers(PLAIN), answers(prompt)
    pairs = [(other[key], plain[key]) for key in other if key in plain]
    whole = [(a, b) for a, b in pairs if not a["censored"] and not b["censored"]]
    graded = [(a, b) for a, b in pairs if a["correct"] is not None and b["correct"] is not None]
    if not whole:
        return None
    accuracy = None
    if graded:
        gained = [int(a["correct"]) - int(b["correct"]) for a, b in graded]
        accuracy = _mean_by_question(gained, [a for a, _ in graded], draws)
    longer = [a["tokens"] - b["tokens"] for a, b in whole]
    return PromptEffect(
        prompt, temperature, _mean_by_question(longer, [a for a, _ in whole], draws), accuracy
    )


def _floor(rows: Sequence[Row], temperature: float, draws: int) -> NoiseFloor | None:
    by_item: dict[str, list[float]] = {}
    for row in rows:
        if row["temperature"] == temperature:
            by_item.setdefault(row["item"], []).append(row["tokens"])
    differences = [
        float(np.abs(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)].mean())
        for x in by_item.values()
        if len(x) > 1
    ]
    if not differences:
        return None
    found = bootstrap_interval(np.mean, differences, draws=draws)
    return NoiseFloor(temperature, len(differences), found)


def _mean_by_question(
    values: ArrayLike, rows: Sequence[Row], draws: int, weights: ArrayLike | None = None
) -> Estimate:
    """Mean of the values (their sum over that of the weights); a question's rows are drawn together."""
    v = np.asarray(values, float)
    w = np.ones(len(v)) if weights is None else np.asarray(weights, float)
    item = np.unique([row["item"] for row in rows], return_inverse=True)[1]
    return _ratio_interval(np.bincount(item, v), np.bincount(item, w), draws)


def _ratio_interval(parts: ArrayLike, wholes: ArrayLike, draws: int) -> Estimate:
    def ratio(part: Floats, whole: Floats) -> float:
        total = whole.sum()
        return float(part.sum() / total) if total else math.nan

    return bootstrap_interval(ratio, parts, wholes, draws=draws)


# --- speculation -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """All questions under one setting; rates are of sums over questions."""

    setting: str
    policy: str
    max_draft_tokens: int
    num_questions: int
    acceptance_length: Estimate
    """Committed tokens per round, the target's own token included."""
    acceptance_rate: Estimate
    """Accepted / drafted."""
    alpha_hat: Estimate
    passes_per_token: Estimate
    """Target passes per committed token."""
    agreement: Estimate | None
    """With the lossless answer, mean over questions."""
    accuracy: Estimate | None
    seconds_per_token: Estimate
    by_category: Mapping[str, Estimate]
    """Acceptance length."""
    on_front: bool
    """No other setting has as few passes per token and as high an agreement, and is better in one of them."""


@dataclass(frozen=True, slots=True)
class SpeculationSummary:
    """Every setting of a run."""

    settings: list[SettingSummary]
    missing: list[str]

    def to_markdown(self) -> str:
        columns = ["", "questions", "acceptance length", "acceptance rate", "α̂", "passes per token"]
        table = markdown_table(
            [*columns, "s per token", "agreement", "accuracy"],
            [
                [
                    s.setting,
                    f"{s.num_questions:,}",
                    *map(
                        show,
                        (s.acceptance_length, s.acceptance_rate, s.alpha_hat, s.passes_per_token),
                    ),
                    *map(show, (s.seconds_per_token, s.agreement, s.accuracy)),
                ]
                for s in self.settings
            ],
        )
        categories = sorted({name for s in self.settings for name in s.by_category})
        by_category = markdown_table(
            ["acceptance length", *(s.setting for s in self.settings)],
            [[name, *(show(s.by_category.get(name)) for s in self.settings)] for name in categories],
        )
        return "\n\n".join([table, by_category, *(f"Missing: {reason}." for reason in self.missing)]) + "\n"


def summarise_speculation(rows: Sequence[Row], *, draws: int = 1000) -> SpeculationSummary:
    """By setting, in the order of the rows, and by category."""
    names = dict.fromkeys(row["setting"] for row in rows)
    settings = [_setting([row for row in rows if row["setting"] == name], draws) for name in names]
    return SpeculationSummary(
        [replace(s, on_front=not any(_dominates(other, s) for other in settings)) for s in settings],
        [] if rows else ["every setting: no answer yet"],
    )


def _setting(rows: Sequence[Row], draws: int) -> SettingSummary:
    def column(name: str, of: Sequence[Row] = rows) -> Floats:
        return np.array([row[name] for row in of], float)

    def interval(statistic: Callable[..., float], *names: str, of: Sequence[Row] = rows) -> Estimate:
        return bootstrap_interval(statistic, *(column(name, of) for name in names), draws=draws)

    def known(name: str) -> list[Row]:
        return [row for row in rows if row.get(name) is not None]

    categories = sorted({row["category"] for row in rows})
    return SettingSummary(
        setting=rows[0]["setting"],
        policy=rows[0]["policy"],
        max_draft_tokens=rows[0]["max_draft_tokens"],
        num_questions=len(rows),
        acceptance_length=interval(metrics.acceptance_length, "committed", "rounds"),
        acceptance_rate=interval(metrics.draft_acceptance_rate, "accepted", "drafted"),
        alpha_hat=interval(metrics.alpha_hat, "accepted", "rejections"),
        passes_per_token=_ratio_interval(column("target_passes"), column("committed"), draws),
        agreement=interval(np.mean, "agreement", of=use) if (use := known("agreement")) else None,
        accuracy=interval(np.mean, "correct", of=use) if (use := known("correct")) else None,
        seconds_per_token=_ratio_interval(column("seconds"), column("committed"), draws),
        by_category={
            name: interval(
                metrics.acceptance_length,
                *("committed", "rounds"),
                of=[row for row in rows if row["category"] == name],
            )
            for name in categories
        },
        on_front=False,
    )


def _dominates(a: SettingSummary, b: SettingSummary) -> bool:
    if a.agreement is None or b.agreement is None:
        return False
    first = (a.passes_per_token.value, -a.agreement.value)
    second = (b.passes_per_token.value, -b.agreement.value)
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))


# --- guide -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuidanceSummary:
    """Answers of one setting, against the cloud's own to the same questions."""

    setting: str
    """edge, cloud, or tokens of guidance."""
    num_questions: int
    target_tokens: Estimate
    """Of the cloud's own answers' tokens, those that the target wrote."""
    accuracy: Estimate | None
    of_cloud: Estimate | None
    """Accuracy, of the cloud's own."""


def summarise_guide(rows: Sequence[Row], *, draws: int = 1000) -> list[GuidanceSummary]:
    """By setting, from edge to cloud. A question counts where the cloud's own answer is there."""
    alone = {row["item"]: row for row in rows if row["setting"] == "cloud"}
    names = {row["setting"] for row in rows if row["item"] in alone}
    order = sorted(names, key=lambda name: {"edge": -1.0, "cloud": math.inf}.get(name) or float(name))
    return [_guidance([r for r in rows if r["setting"] == name], alone, draws) for name in order]


def _guidance(rows: Sequence[Row], alone: Mapping[str, Row], draws: int) -> GuidanceSummary:
    pairs = [(row, alone[row["item"]]) for row in rows if row["item"] in alone]

    def columns(name: str, of: Sequence[tuple[Row, Row]]) -> tuple[Floats, Floats]:
        return np.array([a[name] for a, _ in of], float), np.array([b[name] for _, b in of], float)

    graded = [pair for pair in pairs if None not in (pair[0]["correct"], pair[1]["correct"])]
    own, cloud = columns("correct", graded)
    return GuidanceSummary(
        setting=rows[0]["setting"],
        num_questions=len(pairs),
        target_tokens=_ratio_interval(*columns("target_tokens", pairs), draws),
        accuracy=bootstrap_interval(np.mean, own, draws=draws) if graded else None,
        of_cloud=_ratio_interval(own, cloud, draws) if graded else None,
    )


def sweep_markdown(found: Sequence[SweepRow]) -> str:
    """The table of a sweep; intervals are 95% percentile bootstraps over questions."""
    columns = (
        "signals", "n", "AUROC hard", "AUROC need", "APGR", "minus prompt length",
        "fitted to gain", "boosted", "ECE (ceiling)", "Brier skill",
    )  # fmt: skip
    rows = [
        (
            row.name,
            str(row.num_questions),
            f"{row.auroc_hard:.3f}",
            f"{row.auroc_need:.3f}",
            show(row.apgr),
            f"{show(row.over_length)} {verdict(row.over_length)}",
            "–" if math.isnan(row.gain_apgr) else f"{row.gain_apgr:.3f}",
            f"{row.boosting_apgr:.3f}",
            f"{row.ece:.3f} ({row.ece_ceiling:.3f})",
            f"{row.brier_skill:+.3f}",
        )
        for row in found
    ]
    return markdown_table(columns, rows)
