"""Numbers as they stand in text: found, and written in one way so that they compare as strings."""

from __future__ import annotations

import re

NUMBER = re.compile(
    r"""
    (?:
        (?<![\w.)\]$])(?P<sign>-\$?|\$-)     # a minus sign, not one between two operands
      | (?<![A-Za-z_\d])(?<!\d\.)\$?         # not the 2 of CO2, not the 3 of 1.2.3
    )
    (?P<digits>
        \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?   # 1,234.50
      | \d+(?:\.\d+)?
      | (?<!\.)\.\d+
    )
    (?P<divisor>/\d+)?
    """,
    re.VERBOSE | re.ASCII,
)


def numbers(text: str) -> list[str]:
    """Every number of a text, in its order and in canonical form.

    Dollar and percent signs, thousands separators and decimals that are zero make no difference. A fraction
    of digits stays one ("6/8" is neither "3/4" nor "0.75").

    >>> numbers("10-3 is 7, or $1,234.50 and 3/4 of 45%")
    ['10', '3', '7', '1234.5', '3/4', '45']
    """
    return [_canonical(match) for match in NUMBER.finditer(_without_latex(text))]


def canonical_number(text: str) -> str | None:
    """The canonical form of a text that is one number and nothing else, or None."""
    match = NUMBER.fullmatch(_without_latex(text).strip().rstrip("%"))
    return None if match is None else _canonical(match)


def _without_latex(text: str) -> str:
    r"""Write -, \frac{3}{4}, 1{,}000 and 1\,000 as a keyboard does."""
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text.replace("\u2212", "-"))
    return re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})", ",", text).replace("\\$", "$").replace("\\%", "%")


def _canonical(match: re.Match[str]) -> str:
    whole, _, decimals = match["digits"].replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = (f"{whole}.{decimals}" if decimals else whole) + (match["divisor"] or "")
    return f"-{value}" if match["sign"] and value != "0" else value
