"""Fitting a judge head: logistic regression on hidden states, its threshold set by false accepts."""

from __future__ import annotations

import logging

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
    _check_enough(tokens)
    try:
        from sklearn.model_selection import GroupKFold
    except ImportError:
        raise InvalidSetting("training needs scikit-learn; run: pip install 'duet-llm[route]'") from None
    hidden = tokens.hidden.astype(np.float32)
    mean, scale = hidden.mean(axis=0), hidden.std(axis=0) + 1e-6
    hidden = (hidden - mean) / scale
    disputed = tokens.disputed
    best: tuple[float, float, Float] | None = None
    for strength in _STRENGTHS:
        crossed = np.empty(len(hidden))
        for seen, unseen in GroupKFold(_FOLDS).split(hidden, tokens.right, tokens.question):
            weight, bias = _fit(hidden[seen], tokens.right[seen], strength)
            crossed[unseen] = _sigmoid(hidden[unseen] @ weight + bias)
        threshold = threshold_for(crossed[disputed], tokens.right[disputed], max_false_accepts)
        accepted = float((crossed[disputed & tokens.right] >= threshold).mean())
        log.info("weight %g: %.3f of right disputed tokens accepted", strength, accepted)
        if best is None or accepted > best[0]:
            best = accepted, strength, crossed
    assert best is not None
    _, strength, crossed = best
    weight, bias = _fit(hidden, tokens.right, strength)
    return JudgeHead(
        model=model,
        model_sha256=model_sha256,
        weight=weight / scale,
        bias=bias - float(mean @ (weight / scale)),
        threshold=threshold_for(crossed[disputed], tokens.right[disputed], max_false_accepts),
    )


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

    # By the number of tokens, so that folds and the whole are shrunk alike: they share one threshold.
    penalty = strength / len(hidden)
    fitted = LogisticRegression(C=penalty, class_weight="balanced", max_iter=300, tol=1e-3).fit(hidden, right)
    return fitted.coef_[0].astype(np.float64), float(fitted.intercept_[0])


def _sigmoid(x: Float) -> Float:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _check_enough(tokens: JudgedTokens) -> None:
    num_questions = len(np.unique(tokens.question))
    num_right = int((tokens.right & tokens.disputed).sum())
    num_wrong = int((~tokens.right & tokens.disputed).sum())
    if num_questions < _FOLDS or not num_right or not num_wrong:
        raise InvalidSetting(
            f"{num_questions} questions with {num_right} right and {num_wrong} wrong tokens in dispute are"
            f" too few to train on: collect answers to {_FOLDS} questions at least, right ones and wrong ones"
        )
