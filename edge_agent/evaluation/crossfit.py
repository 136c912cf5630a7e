"""Cross-fitting: no question is scored by a fit that saw it, so a blend's gain is not its own memory.

Tables are [n, features] with NaN where a feature is missing, which counts as the column's mean (boosting
treats it as its own case). Folds, inner folds and fits are fixed by the seed. Takes scikit-learn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_agent.evaluation import metrics
from edge_agent.evaluation.metrics import Floats
from edge_agent.routing.calibration import MIN_QUESTIONS
from shared.bootstrap import Estimate, bootstrap_interval, paired_bootstrap_difference
from shared.errors import InvalidRequest, InvalidSetting

Row = Mapping[str, Any]
Bools = NDArray[np.bool_]
Pair = Literal["own", "routellm"]
Method = Literal["logistic", "platt", "single", "boosting"]
Scale = Literal["log", "raw"]

SINGLE = "one number, chosen in each fold"
"""The set of features of which a sweep takes the best one instead of a blend."""
NUM_FOLDS = 5
_NUM_INNER_FOLDS = 3
_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""C of the logistic blend, chosen by log-loss within the fold."""
_PENALTIES = (0.001, 0.01, 0.03)
"""L1 penalty of the median regression, on a target of unit spread."""


def feature_table(rows: Sequence[Row], names: Sequence[str]) -> Floats:
    """[n, features] from the rows' `features`; NaN where a row has none of that name."""
    return np.array([[row["features"].get(name, np.nan) for name in names] for row in rows], float)


def feature_names(rows: Sequence[Row]) -> list[str]:
    """Every feature of the rows that differs between any two of them, sorted."""
    names = sorted({name for row in rows for name in row["features"]})
    return [name for name in names if len({row["features"].get(name) for row in rows}) > 1]


def outcomes(rows: Sequence[Row], pair: Pair) -> tuple[list[Row], Bools, Bools | None]:
    """The rows whose outcome is known under a set of labels, and who got them right.

    Args:
        pair: "own" takes the answers of the run's edge and cloud; "routellm" the labels of RouteLLM's pair.
    Returns:
        The rows; [n] edge right; [n] cloud right, or None where no cloud answered any.
    """
    if pair == "routellm":
        keys = ("routellm_weak", "routellm_strong")
        labelled = [row for row in rows if all(_known(row.get("labels"), key) for key in keys)]
        weak, strong = (np.array([row["labels"][key] for row in labelled], bool) for key in keys)
        return labelled, weak, strong
    answered = [row for row in rows if _known(row.get("edge"), "correct")]
    both = [row for row in answered if _known(row.get("cloud"), "correct")]
    if not both:
        return answered, np.array([row["edge"]["correct"] for row in answered], bool), None
    edge, cloud = (np.array([row[role]["correct"] for row in both], bool) for role in ("edge", "cloud"))
    return both, edge, cloud


def _known(part: Mapping[str, Any] | None, key: str) -> bool:
    return bool(part) and part is not None and part.get(key) is not None


def folds(
    labels: ArrayLike | None,
    num_rows: int,
    *,
    groups: Sequence[Hashable] | None = None,
    num_folds: int = NUM_FOLDS,
    seed: int = 0,
) -> NDArray[np.intp]:
    """[n] the fold that holds each row out: labels spread evenly, rows of one group together.

    Raises:
        InvalidSetting: scikit-learn is not installed.
    """
    _require_sklearn()
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    kinds = {
        (True, False): StratifiedKFold,
        (True, True): StratifiedGroupKFold,
        (False, False): KFold,
        (False, True): GroupKFold,
    }
    splitter = kinds[labels is not None, groups is not None](num_folds, shuffle=True, random_state=seed)
    codes = None if groups is None else np.unique([str(group) for group in groups], return_inverse=True)[1]
    found = np.empty(num_rows, np.intp)
    for number, (_, held_out) in enumerate(splitter.split(np.zeros((num_rows, 1)), labels, codes)):
        found[held_out] = number
    return found


def crossfit_probability(
    table: Floats,
    labels: ArrayLike,
    *,
    method: Method = "logistic",
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Floats:
    """[n] probabilities of the label, each from a fit on the other folds.

    Args:
        table: [n, features].
        labels: [n] bool.
        method: "logistic" is the blend that a calibration can hold, its strength chosen within the fold;
            "platt" is the same without a penalty, for a single feature (Platt 1999), monotone in it within a
            fold; "single" takes the one feature with the best AUROC on the rows of the fit, so that choosing
            among many is paid for; "boosting" is gradient-boosted trees: what any blend of these gives.
        groups: [n]; rows of one group are never on both sides of a split.
    Raises:
        InvalidRequest: too few rows, or all alike.
        InvalidSetting: scikit-learn is not installed.
        ValueError: "platt" with more than one feature.
    """
    y = np.asarray(labels, bool)
    if method == "platt" and table.shape[1] != 1:
        raise ValueError(f"platt takes one feature, not {table.shape[1]}")
    rarer = min(int(y.sum()), int((~y).sum()))
    if len(y) < MIN_QUESTIONS or rarer < 2 * NUM_FOLDS:
        raise InvalidRequest(
            f"{len(y)} questions with {int(y.sum())} positives are too few to fit on;"
            f" bring {MIN_QUESTIONS} or more, with {2 * NUM_FOLDS} of each kind"
        )
    fold = folds(y, len(y), groups=groups, seed=seed)
    p = np.empty(len(y))
    for number in range(NUM_FOLDS):
        train, held_out = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        inner_groups = None if groups is None else [groups[int(i)] for i in train]
        model = _classifier(method, y[train], inner_groups, seed)
        with _one_thread():
            model.fit(table[train], y[train])
            p[held_out] = model.predict_proba(table[held_out])[:, 1]
    return p


def single_choices(table: Floats, labels: ArrayLike, *, seed: int = 0) -> NDArray[np.intp]:
    """[folds] the column that each fold's fit of the method "single" takes."""
    y = np.asarray(labels, bool)
    fold = folds(y, len(y), seed=seed)
    chosen = []
    for number in range(NUM_FOLDS):
        train = fold != number
        filled = np.where(np.isnan(table[train]), np.nanmean(table[train], axis=0), table[train])
        chosen.append(int(np.argmax(_telling(filled, y[train]))))
    return np.array(chosen)


def crossfit_gain(
    table: Floats, edge: Bools, cloud: Bools, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Floats:
    """[n] expected gain of the cloud: P(only the cloud is right) - P(only the edge is right), in [-1, 1].

    What APGR rewards: `need` alone does not see the questions that the cloud would lose.

    Raises:
        InvalidRequest: either kind is too rare to fit on.
    """
    need = crossfit_probability(table, ~edge & cloud, groups=groups, seed=seed)
    return need - crossfit_probability(table, edge & ~cloud, groups=groups, seed=seed)


def crossfit_length(
    table: Floats,
    tokens: ArrayLike,
    *,
    fit_on: Bools | None = None,
    scale: Scale = "log",
    boosting: bool = False,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Floats:
    """[n] predicted tokens of least mean absolute error (the conditional median), each from the other folds.

    Args:
        table: [n, features].
        tokens: [n] >= 0.
        fit_on: [n]; rows to learn from, such as those that are not censored. All are predicted.
        scale: a median on the log scale is the median on the raw one; only the straightness differs.
        boosting: gradient-boosted trees for absolute error instead of a linear median regression.
        groups: [n]; rows of one group are never on both sides of a split.
    Raises:
        InvalidRequest: too few rows to learn from.
        InvalidSetting: scikit-learn is not installed.
    """
    actual = np.asarray(tokens, float)
    use = np.ones(len(actual), bool) if fit_on is None else fit_on
    if use.sum() < MIN_QUESTIONS:
        raise InvalidRequest(f"{int(use.sum())} answers are too few to fit on; bring {MIN_QUESTIONS} or more")
    target = np.log1p(actual) if scale == "log" else actual
    fold = folds(None, len(actual), groups=groups, seed=seed)
    predicted = np.empty(len(actual))
    for number in range(NUM_FOLDS):
        train, held_out = np.flatnonzero((fold != number) & use), np.flatnonzero(fold == number)
        inner_groups = None if groups is None else [groups[int(i)] for i in train]
        centre, spread = np.median(target[train]), max(float(target[train].std()), 1e-9)
        model = _regressor(boosting, len(train), inner_groups, seed)
        with _one_thread():
            model.fit(table[train], (target[train] - centre) / spread)
            predicted[held_out] = model.predict(table[held_out]) * spread + centre
    # A straight line can leave the range of what was seen; an exponential of it all the more.
    predicted = np.clip(predicted, target[use].min(), target[use].max())
    return np.expm1(predicted) if scale == "log" else predicted


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A named set of features, blended."""

    name: str
    num_features: int
    num_questions: int
    auroc_hard: float
    """Of a blend fitted to *hard*; all others are of one fitted to *need*."""
    auroc_need: float
    apgr: Estimate
    over_length: Estimate
    """APGR minus that of prompt length, paired."""
    gain_apgr: float
    """APGR of `crossfit_gain`; NaN where too few questions are lost by the cloud."""
    boosting_apgr: float
    ece: float
    ece_ceiling: float
    brier_skill: float


def sweep(
    rows: Sequence[Row], feature_sets: Mapping[str, Sequence[str]], *, pair: Pair = "own", draws: int = 1000
) -> list[SweepRow]:
    """Cross-fit a blend for `need` on each set of features.

    Args:
        rows: of the routing experiment, with a cloud's answers or labels.
        feature_sets: name -> names of `features`.
    Raises:
        InvalidRequest: a feature that no row has, no cloud, or too few questions.
    """
    use, edge, cloud = outcomes(rows, pair)
    if cloud is None:
        raise InvalidRequest("a sweep needs the cloud's answers, but no row has one")
    known = {name for row in use for name in row["features"]}
    if unknown := {name for names in feature_sets.values() for name in names} - known:
        raise InvalidRequest(
            f"no row has the feature {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    need = ~edge & cloud
    lengths = np.array([row["prompt_tokens"] for row in use], float)
    found = []
    for name, features in feature_sets.items():
        table = feature_table(use, features)
        method: Method = "single" if name == SINGLE else "logistic"
        p = crossfit_probability(table, need, method=method)
        try:
            gain_apgr = metrics.apgr(crossfit_gain(table, edge, cloud), edge, cloud)
        except InvalidRequest:
            gain_apgr = float("nan")
        found.append(
            SweepRow(
                name=name,
                num_features=len(features),
                num_questions=len(use),
                auroc_hard=metrics.auroc(crossfit_probability(table, ~edge, method=method), ~edge),
                auroc_need=metrics.auroc(p, need),
                apgr=bootstrap_interval(metrics.apgr, p, edge, cloud, draws=draws),
                over_length=paired_bootstrap_difference(metrics.apgr, p, lengths, edge, cloud, draws=draws),
                gain_apgr=gain_apgr,
                boosting_apgr=metrics.apgr(crossfit_probability(table, need, method="boosting"), edge, cloud),
                ece=metrics.ece(p, need),
                ece_ceiling=metrics.ece_ceiling(p),
                brier_skill=metrics.brier_skill(p, need),
            )
        )
    return found


def _classifier(method: Method, labels: Bools, groups: Sequence[Hashable] | None, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.feature_selection import SelectKBest
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    if method == "boosting":
        return HistGradientBoostingClassifier(
            max_iter=100, learning_rate=0.05, max_depth=3, early_stopping=False, random_state=seed
        )
    if method == "platt":
        return _scaled(LogisticRegression(C=np.inf, max_iter=1000))
    if method == "single":
        return _scaled(SelectKBest(_telling, k=1), LogisticRegression(C=np.inf, max_iter=1000))
    inner = folds(labels, len(labels), groups=groups, num_folds=_NUM_INNER_FOLDS, seed=seed)
    return GridSearchCV(
        _scaled(LogisticRegression(max_iter=1000)),
        {"model__C": _STRENGTHS},
        scoring="neg_log_loss",
        cv=PredefinedSplit(inner),
    )


def _regressor(boosting: bool, num_rows: int, groups: Sequence[Hashable] | None, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import QuantileRegressor
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    if boosting:
        return HistGradientBoostingRegressor(
            loss="absolute_error",
            max_iter=100,
            learning_rate=0.05,
            max_depth=3,
            early_stopping=False,
            random_state=seed,
        )
    inner = folds(None, num_rows, groups=groups, num_folds=_NUM_INNER_FOLDS, seed=seed)
    return GridSearchCV(
        _scaled(QuantileRegressor(quantile=0.5)),
        {"model__alpha": _PENALTIES},
        scoring="neg_mean_absolute_error",
        cv=PredefinedSplit(inner),
    )


def _telling(table: Floats, labels: Bools) -> Floats:
    """[features] how far each AUROC is from chance, either way up."""
    return np.array([abs(metrics.auroc(column, labels) - 0.5) for column in table.T])


def _scaled(*steps: Any) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    *before, model = steps
    return Pipeline(
        [
            ("fill", SimpleImputer(keep_empty_features=True)),
            ("scale", StandardScaler()),
            *((f"step{i}", step) for i, step in enumerate(before)),
            ("model", model),
        ]
    )


def _one_thread() -> Any:
    """Fits this small lose more to waiting threads than they gain, above all on a machine that is shared."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def _require_sklearn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise InvalidSetting("fitting needs scikit-learn; run: pip install 'duet-llm[route]'")
