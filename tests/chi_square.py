"""Whether what was drawn follows a distribution: Pearson's test, for tests that draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping


def p_value(counts: Counter[Hashable], expected: Mapping[Hashable, float]) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are merged. 0 if an impossible one occurs."""
    total = sum(counts.values())
    if any(not expected.get(cell) for cell in counts):
        return 0.0
    cells = [(counts[cell], total * prob) for cell, prob in expected.items() if prob]
    large = [cell for cell in cells if cell[1] >= 5]
    small = [cell for cell in cells if cell[1] < 5]
    if small:
        large.append(tuple(map(sum, zip(*small, strict=True))))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in large)
    return chi_square_tail(statistic, len(large) - 1)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(X >= statistic), exactly: the upper incomplete gamma function by its recurrence in steps of 1."""
    if freedom == 0:
        return 1.0
    half = statistic / 2
    a, tail = (0.5, math.erfc(math.sqrt(half))) if freedom % 2 else (1.0, math.exp(-half))
    while a < freedom / 2:
        tail += math.exp(a * math.log(half) - half - math.lgamma(a + 1)) if half else 0.0
        a += 1
    return tail
