"""From readings to a probability: a logistic regression per edge model, kept in a small YAML file.

Fitting takes scikit-learn (`pip install 'duet-llm[route]'`); applying is arithmetic. A file names the model
it was made for and its hash, and is refused for any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_agent.routing.probes import SHAPE_FEATURES
from shared.errors import InvalidRequest, InvalidSetting
from shared.json_lines import numbered_lines

VERSION = 2
MIN_QUESTIONS = 40

_PLAIN = "plain"
"""The prompt of a length run's answers that were not asked for their length; other rows have none."""

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Weight(BaseModel):
    """How one feature counts: weight * (x - mean) / scale; a feature that is missing counts as its mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: _Finite
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    weight: _Finite


class LengthFit(BaseModel):
    """The blend of all readings into the logarithm of the answer's tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    intercept: _Finite
    weights: dict[str, Weight]

    def tokens(self, features: Mapping[str, float]) -> float:
        """Completion tokens of the answer, as the median of those with such readings."""
        return math.expm1(max(0.0, min(12.0, _score(self.intercept, self.weights, features))))


class Calibration(BaseModel):
    """The blend of all readings into the probability that the cloud is needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    model: str
    sha256: str
    """Of the model file."""
    fitted_on: str
    """In words: which questions, how many, which label."""
    intercept: _Finite
    weights: dict[str, Weight]
    threshold: _Share
    """The cloud is asked at this probability and above."""
    length: LengthFit | None = None
    """Unset where too few answers of known length were there to fit it."""
    tokens_per_word: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Of the model's own answers, or of the sample text; unset measures that when it is needed."""
    priors: dict[str, list[_Finite]] = {}
    """Log-probabilities of a probe's options on a question without content, by probe."""

    def p_cloud(self, features: Mapping[str, float]) -> float:
        """Probability in [0, 1] that the cloud is needed."""
        score = _score(self.intercept, self.weights, features)
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score))))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = "# Made by `duet calibrate`. Plain numbers: see docs/routing.md.\n"
        path.write_text(header + yaml.safe_dump(self.model_dump(), sort_keys=False), encoding="utf-8")


def _score(intercept: float, weights: Mapping[str, Weight], features: Mapping[str, float]) -> float:
    known = {name: w for name, w in weights.items() if name in features}
    return intercept + sum(w.weight * (features[name] - w.mean) / w.scale for name, w in known.items())


def user_file(model: str) -> Path:
    """Where `duet calibrate` saves, and `auto` looks first."""
    return platformdirs.user_config_path("duet") / "calibration" / f"{model}.yaml"


def find_calibration(model: str, sha256: Callable[[], str], named: Path | None = None) -> Calibration | None:
    """The calibration in force for a model: a named file, else the user's own, else a shipped one, else None.

    Args:
        sha256: of the model file; asked only where a calibration of this name is there.
    Raises:
        InvalidSetting: the file cannot be used, or was made for another model.
    """
    own = named or user_file(model)
    if named or own.is_file():
        return _checked(load_calibration(own), str(own), model, sha256())
    shipped = files("edge_agent.routing") / "calibrations" / f"{model}.yaml"
    if not shipped.is_file():
        return None
    calibration = _parse(shipped.read_text("utf-8"), f"{model}.yaml")
    # A user's own file of the same name is another model, for which nothing is shipped.
    return calibration if calibration.sha256 == sha256() else None


def load_calibration(path: Path) -> Calibration:
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(
            f"the calibration {path} cannot be read: {error}; see `duet calibrate`"
        ) from None


def _checked(calibration: Calibration, where: str, model: str, sha256: str) -> Calibration:
    if (calibration.model, calibration.sha256) != (model, sha256):
        same_name = " (another file of this name)" if calibration.model == model else ""
        raise InvalidSetting(
            f"the calibration {where} was made for {calibration.model}{same_name}, not for {model};"
            " make one with `duet calibrate`, or remove it"
        )
    return calibration


def _parse(text: str, where: str) -> Calibration:
    try:
        raw = yaml.safe_load(text)
        if isinstance(raw, dict) and raw.get("version") != VERSION:
            raise InvalidSetting(
                f"the calibration {where} is of version {raw.get('version')}, but this duet reads {VERSION};"
                " make it again with `duet calibrate`"
            )
        return Calibration.model_validate(raw)
    except yaml.YAMLError as error:
        raise InvalidSetting(f"the calibration {where} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where_in = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidSetting(f"the calibration {where}: {where_in}: {first['msg'].lower()}") from None


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluated question."""

    features: dict[str, float]
    edge_correct: bool | None
    """None in a length run, from which only lengths are learnt."""
    cloud_correct: bool | None
    completion_tokens: int | None
    """Of a whole answer in words; None where it was cut off, or only a letter was asked for."""

    @property
    def label(self) -> bool:
        """Is the cloud needed? Where it is not known to be right: the edge is wrong."""
        return self.edge_correct is False and self.cloud_correct is not False


@dataclass(frozen=True, slots=True)
class Written:
    """How much answers of the edge model hold, all together."""

    num_tokens: int
    num_words: int


def read_results(path: Path) -> tuple[list[Result], Written]:
    """Read evaluation results, and how many words and tokens the edge model's plain answers in them hold.

    JSON lines of three kinds: a flat row with `features`, `edge_correct` and, where known, `cloud_correct`
    and `completion_tokens`; a row of a routing run, with `edge` and `cloud` instead; a row of a length run,
    with `tokens` and `words`.

    Raises:
        InvalidRequest: names the line that cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the results {path} cannot be read: {error}") from None
    results = []
    num_tokens = num_words = 0
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line)
            if row.get("prompt", _PLAIN) != _PLAIN:  # asked to say its length first
                continue
            answer = row.get("edge", row)
            if answer.get("tokens") and answer.get("words") and not _asks_for_a_letter(row):
                num_tokens += int(answer["tokens"])
                num_words += int(answer["words"])
            results.append(result_of(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"{path}, line {number}: not a result with features and edge_correct ({error!r})"
            ) from None
    return results, Written(num_tokens, num_words)


def result_of(row: Mapping[str, Any]) -> Result:
    """The result that a row says, of any of the kinds that `read_results` takes."""
    features = {str(k): float(v) for k, v in row["features"].items()}
    if "edge_correct" in row:
        tokens = row.get("completion_tokens")
        return Result(features, bool(row["edge_correct"]), row.get("cloud_correct"), tokens)
    if "edge" not in row:
        return Result(features, None, None, None if row.get("censored") else int(row["tokens"]))
    edge, cloud = row["edge"], row.get("cloud") or {}
    whole = not _asks_for_a_letter(row) and not edge.get("censored")
    return Result(
        features, bool(edge["correct"]), cloud.get("correct"), edge.get("tokens") if whole else None
    )


def _asks_for_a_letter(row: Mapping[str, Any]) -> bool:
    """Whether the answer is too short to tell of lengths: a routing run's to a multiple-choice question."""
    return "edge" in row and row.get("kind") == "choice"


def judged_of(results: Sequence[Result]) -> list[Result]:
    """Those that say whether the cloud is needed, all by one label: the others teach lengths only.

    Where a cloud was asked, only its answers tell; where none was, the edge's own errors stand for it.
    """
    answered = [result for result in results if result.edge_correct is not None]
    return [result for result in answered if result.cloud_correct is not None] or answered


def fit(
    results: Sequence[Result],
    *,
    model: str,
    sha256: str,
    fitted_on: str,
    features: Collection[str],
    shape: bool = True,
    priors: Mapping[str, Sequence[float]],
    tokens_per_word: float | None = None,
    cloud_share: float | None = None,
    quality: float | None = None,
) -> Calibration:
    """Fit the blend, and set the threshold to a share of cloud answers or to a quality.

    Args:
        features: what `auto` reads, by name; others in the results are left out.
        shape: whether length and shape of the question count for who answers; for the length they always do.
        tokens_per_word: see `Calibration`.
        cloud_share: in [0, 1]; this share of the results' questions goes to the cloud.
        quality: in [0, 1]; the least share of questions that goes to the cloud such that this share is
            answered rightly. Where the cloud's own correctness is not known it is taken to be right.
    Raises:
        InvalidRequest: too few results, or all alike.
        InvalidSetting: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InvalidSetting("fitting needs scikit-learn; run: pip install 'duet-llm[route]'") from None
    judged = judged_of(results)
    labels = np.array([result.label for result in judged], bool)
    if len(judged) < MIN_QUESTIONS or labels.all() or not labels.any():
        raise InvalidRequest(
            f"{len(judged)} results with {int(labels.sum())} that need the cloud are too few to fit on;"
            f" bring {MIN_QUESTIONS} or more, of both kinds"
        )
    names = sorted({name for result in judged for name in result.features} & set(features))
    blended = [name for name in names if shape or not name.startswith(SHAPE_FEATURES)]
    table = _Table.of([result.features for result in judged], blended)
    regression = LogisticRegression(C=0.1, max_iter=1000).fit(table.scaled, labels)
    calibration = Calibration(
        model=model,
        sha256=sha256,
        fitted_on=fitted_on,
        intercept=round(float(regression.intercept_[0]), 4),
        weights=table.weights(regression.coef_[0]),
        threshold=0.5,
        length=_fit_length(results, names),
        tokens_per_word=None if tokens_per_word is None else round(tokens_per_word, 3),
        priors={key: [round(float(x), 4) for x in prior] for key, prior in priors.items()},
    )
    p = np.array([calibration.p_cloud(result.features) for result in judged])
    return calibration.model_copy(update={"threshold": _threshold(p, judged, cloud_share, quality)})


def _fit_length(results: Sequence[Result], names: Sequence[str]) -> LengthFit | None:
    """Ridge regression of log(1 + tokens), so that an error counts by its share of the length."""
    from sklearn.linear_model import Ridge

    known = [result for result in results if result.completion_tokens]
    if len(known) < MIN_QUESTIONS:
        return None
    table = _Table.of([result.features for result in known], names)
    tokens = np.array([float(result.completion_tokens or 0) for result in known])
    regression = Ridge(alpha=10.0).fit(table.scaled, np.log1p(tokens))
    return LengthFit(
        intercept=round(float(regression.intercept_), 4), weights=table.weights(regression.coef_)
    )


@dataclass(frozen=True)
class _Table:
    """Features that vary, standardised; a missing one counts as its mean."""

    names: list[str]
    means: Any
    scales: Any
    scaled: Any
    """[rows, features]"""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> _Table:
        names = [name for name in names if any(name in row for row in rows)]
        table = np.array([[row.get(name, np.nan) for name in names] for row in rows], float)
        means, scales = np.nanmean(table, axis=0), np.nanstd(table, axis=0)
        varies = scales > 1e-9
        means, scales = means[varies], scales[varies]
        scaled = np.nan_to_num((table[:, varies] - means) / scales)
        return cls([name for name, v in zip(names, varies, strict=True) if v], means, scales, scaled)

    def weights(self, coefficients: Any) -> dict[str, Weight]:
        return {
            name: Weight(
                mean=round(float(m), 4), scale=max(1e-4, round(float(s), 4)), weight=round(float(w), 4)
            )
            for name, m, s, w in zip(self.names, self.means, self.scales, coefficients, strict=True)
        }


def _threshold(p: Any, results: Sequence[Result], cloud_share: float | None, quality: float | None) -> float:
    order = np.sort(p)[::-1]
    if quality is None:
        num_cloud = round((0.5 if cloud_share is None else cloud_share) * len(p))
    else:
        by_need = np.argsort(-p, kind="stable")
        edge = np.array([results[i].edge_correct for i in by_need], float)
        cloud = np.array([results[i].cloud_correct is not False for i in by_need], float)
        right = np.concatenate([[0.0], np.cumsum(cloud)]) + (
            edge.sum() - np.concatenate([[0.0], np.cumsum(edge)])
        )
        enough = np.flatnonzero(right / len(p) >= quality)
        if not enough.size:
            raise InvalidRequest(
                f"a quality of {quality:g} is out of reach: the best routing of these results gives"
                f" {right.max() / len(p):.3f}"
            )
        num_cloud = int(enough[0])
    if num_cloud == 0:
        return 1.0
    # Floor, so that rounding never drops the last question that should go.
    return math.floor(1e4 * float(order[num_cloud - 1])) / 1e4
