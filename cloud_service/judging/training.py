"""Fitting a judge head: logistic regression on hidden states, its threshold set by false accepts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cloud_service.judging.labels import JudgedTokens
from shared.errors import InvalidSetting
from shared.judge import JudgeHead

log = logging.getLogger("duet.judge")

_FOLDS = 4
_STRENGTHS = (1.0, 10.0, 100.0)
"""Weights of all tokens together against the penalty that are tried."""
Float = NDArray[np.float64]


def train(tokens: JudgedTokens, *, model: str, model_sha256: str, max_false_accepts: float) -> JudgeHead:
    """Fit a head.

    All tokens are fitted to, a right one and a wrong one weighing equally in sum. The threshold is the least
    at which, among disputed tokens of questions that a fold did not see, at most `max_false_accepts` of the
    wrong ones are accepted.

    Raises:
        InvalidSetting: too little to learn from, or scikit-learn is missing.
    """
    [head] = train_heads(tokens, model=model, model_sha256=model_sha256, shares=[max_false_accepts])
    return head


def train_heads(
    tokens: JudgedTokens, *, model: str, model_sha256: str, shares: Sequence[float]
) -> list[JudgeHead]:
    """As `train`, a head for each share of false accepts: they differ by threshold and penalty alone."""
    _check_enough(tokens)
    if importlib.util.find_spec("sklearn") is None:
        raise InvalidSetting("training needs scikit-learn; run: pip install 'duet-llm[route]'")
    hidden = tokens.hidden.astype(np.float32)
    mean, scale = hidden.mean(axis=0), hidden.std(axis=0) + 1e-6
    hidden -= mean
    hidden /= scale
    scores = _crossfit(hidden, tokens)
    fitted: dict[float, tuple[Float, float]] = {}
    heads = []
    for share in shares:
        strength, threshold = _best(scores, tokens.right[tokens.disputed], share)
        if strength not in fitted:
            fitted[strength] = _fit(hidden, tokens.right, strength)
        weight, bias = fitted[strength]
        weight = weight / scale
        heads.append(
            JudgeHead(
                model=model,
                model_sha256=model_sha256,
                weight=weight,
                bias=bias - float(mean @ weight),
                threshold=threshold,
            )
        )
    return heads


def _crossfit(hidden: NDArray[np.float32], tokens: JudgedTokens) -> dict[float, Float]:
    """By strength, the probability of each disputed token, by a fit that did not see its question."""
    from sklearn.model_selection import GroupKFold

    scores = {strength: np.empty(len(hidden)) for strength in _STRENGTHS}
    for seen, unseen in GroupKFold(_FOLDS).split(hidden, tokens.right, tokens.question):
        with ThreadPoolExecutor() as threads:  # they share the copy, and are most of the time in BLAS
            fits = list(threads.map(partial(_fit, hidden[seen], tokens.right[seen]), _STRENGTHS))
        for strength, (weight, bias) in zip(_STRENGTHS, fits, strict=True):
            scores[strength][unseen] = hidden[unseen] @ weight + bias
    return {strength: 1.0 / (1.0 + np.exp(-each[tokens.disputed])) for strength, each in scores.items()}


def _best(scores: Mapping[float, Float], right: NDArray[np.bool_], share: float) -> tuple[float, float]:
    """Strength that accepts most of the right tokens in dispute, and its threshold."""
    found = {}
    for strength, probabilities in scores.items():
        threshold = threshold_for(probabilities, right, share)
        recall = float((probabilities[right] >= threshold).mean())
        log.info("weight %g: %.3f of the right tokens in dispute are accepted", strength, recall)
        found[strength] = (recall, threshold)
    strength = max(found, key=lambda each: found[each][0])
    return strength, found[strength][1]


def threshold_for(probabilities: Float, right: NDArray[np.bool_], max_false_accepts: float) -> float:
    """The least threshold, strictly within (0, 1), that at most this share of the wrong tokens reach.

    >>> threshold_for(np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, False, False, True]), 0.34)
    0.4000...
    """
    wrong = np.sort(probabilities[~right])[::-1]
    if not len(wrong):
        return 0.5
    allowed = int(max_false_accepts * len(wrong))
    least = np.nextafter(wrong[allowed], 1.0) if allowed < len(wrong) else 0.0
    return float(np.clip(least, 1e-6, 1.0 - 1e-6))


def _fit(hidden: NDArray[np.float32], right: NDArray[np.bool_], strength: float) -> tuple[Float, float]:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # By the number of tokens, so that folds and the whole are shrunk alike: they share one threshold.
    penalty = strength / len(hidden)
    model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=300, tol=1e-3)
    with threadpool_limits(1):  # more wait for each other, above all on a machine that is shared
        model.fit(hidden, right)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


def _check_enough(tokens: JudgedTokens) -> None:
    num_questions = len(np.unique(tokens.question))
    num_right = int((tokens.right & tokens.disputed).sum())
    num_wrong = int((~tokens.right & tokens.disputed).sum())
    if num_questions < _FOLDS or not num_right or not num_wrong:
        raise InvalidSetting(
            f"{num_questions} questions with {num_right} right and {num_wrong} wrong tokens in dispute are"
            f" too few to train on: collect answers to {_FOLDS} questions at least, right ones and wrong ones"
        )
