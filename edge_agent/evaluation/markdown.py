"""Tables and numbers with intervals as Markdown shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from shared.bootstrap import Estimate


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(estimate: Estimate | None, digits: int = 3) -> str:
    """`0.651 [0.600, 0.702]`, or a dash for what is not known."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    text = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return text
    return f"{text} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
