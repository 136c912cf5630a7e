"""Figures with their intervals, by a bootstrap over questions (Efron 1979). Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float = math.nan
    high: float = math.nan
    num_undefined: int = 0
    """Draws in which the statistic was not defined; the interval leaves them out."""

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Percentile bootstrap: the statistic on questions drawn again with replacement, all arrays alike.

    Args:
        statistic: of the arrays; NaN where it is not defined.
        arrays: each [n, ...], one entry a question.
        level: share of the draws inside the interval.
    Raises:
        ValueError: no questions, or arrays of several lengths.
    """
    return bootstrap_intervals(
        lambda *drawn: np.array([statistic(*drawn)]), *arrays, draws=draws, seed=seed, level=level
    )[0]


def bootstrap_intervals(
    statistics: Callable[..., ArrayLike],
    *arrays: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Estimate]:
    """`bootstrap_interval` of several statistics on the same draws; `statistics` returns [k]."""
    columns = [np.asarray(array) for array in arrays]
    num = len(columns[0]) if columns else 0
    if not num or any(len(column) != num for column in columns):
        raise ValueError("arrays must be of one length, n > 0")
    values = np.asarray(statistics(*columns), float)
    rng = np.random.default_rng(seed)
    drawn = np.empty((draws, len(values)))
    for i in range(draws):
        chosen = rng.integers(num, size=num)
        drawn[i] = statistics(*(column[chosen] for column in columns))
    return [_estimate(value, drawn[:, i], level) for i, value in enumerate(values)]


def paired_bootstrap_difference(
    statistic: Callable[..., float],
    first: ArrayLike,
    second: ArrayLike,
    *shared: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """statistic(first, *shared) - statistic(second, *shared), both on the same questions in each draw."""
    return bootstrap_interval(
        lambda a, b, *rest: statistic(a, *rest) - statistic(b, *rest),
        first,
        second,
        *shared,
        draws=draws,
        seed=seed,
        level=level,
    )


def _estimate(value: float, drawn: NDArray[np.float64], level: float) -> Estimate:
    defined = drawn[~np.isnan(drawn)]
    undefined = len(drawn) - len(defined)
    if math.isnan(value) or not defined.size:
        return Estimate(float(value), num_undefined=undefined)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), undefined)
