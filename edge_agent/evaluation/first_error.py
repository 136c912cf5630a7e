r"""Where a wrong answer first goes wrong, as far as rules can tell: for labels of its tokens.

A number's answer is read calculation by calculation. The first error is the first result that its own
calculation contradicts ("7 x 8 = 54"), or that stands neither in the question nor in the worked solution nor
in any right answer, and so came of a wrong idea. Where there is no such result only the final number is known
to be wrong; nobody can say where the way to it turned. Of a choice, the letter is wrong.

The second rule takes a legitimate way that no right answer went for an error; hand labels correct that.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from edge_agent.evaluation.grading import extract
from edge_agent.evaluation.items import Item, Kind
from edge_agent.evaluation.numerals import canonical_number, numbers


class FoundBy(str, Enum):
    """What says that the answer is wrong from here on."""

    CALCULATION = "calculation"
    """The result of a calculation is not what it comes to; right before."""
    RESULT = "result"
    """A result that no right way has; wrong from its calculation on, right before."""
    FINAL = "final"
    """The number, letter or text that is the answer; nothing is known of what stands before."""


@dataclass(frozen=True, slots=True)
class FirstError:
    at: int
    """Characters of the answer before it."""
    by: FoundBy


def first_error(item: Item, text: str, right_answers: Iterable[str] = ()) -> FirstError | None:
    """Find it in a wrong answer, or None where not even the final number or letter can be found.

    Args:
        right_answers: other answers to the question, whose results are right.

    >>> item = Item(id="", kind=Kind.NUMBER, turns=("I buy 7 boxes of 8 eggs. How many?",), answer="56")
    >>> first_error(item, "That is 7 x 8 = 54 eggs.")
    FirstError(at=16, by=<FoundBy.CALCULATION: 'calculation'>)
    """
    if item.kind is Kind.NUMBER:
        known = {item.answer, *numbers(" ".join((*item.turns, item.reference or "", *right_answers)))}
        for calculation in calculations(text):
            if calculation.is_wrong:
                return FirstError(calculation.at, FoundBy.CALCULATION)
            if calculation.result not in known:
                return FirstError(calculation.begins_at, FoundBy.RESULT)
    found = extract(item, text)
    if found is None:
        return None
    at = [match.start() for match in _standing(found, item.kind).finditer(text)]
    if not at:
        return None
    return FirstError(at[-1] if item.kind is Kind.NUMBER else at[0], FoundBy.FINAL)


def _standing(found: str, kind: Kind) -> re.Pattern[str]:
    if kind is Kind.NUMBER:
        spelled = "".join(rf"{re.escape(sign)},?" if sign.isdigit() else re.escape(sign) for sign in found)
        return re.compile(rf"(?<![\d.]){spelled}(?!\d)")
    return re.compile(rf"(?<!\w){re.escape(found)}(?!\w)")


# Calculations

_VALUE = r"-?\d[\d,]*(?:\.\d+)?"
_RESULT = re.compile(
    rf"=\s*(?:\\?[$€£(]|\\\(|\\text\{{[^}}]*\}})*\s*(?P<result>{_VALUE})(?P<after>[^=\n]{{0,12}})"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_WORDS = re.compile(r"\\[()\[\]]|\\(?:text|mathrm)\{[^}]*\}|\\[a-zA-Z,;! ]+|[a-zA-Z_°]+|[$€£{}\[\]\\]")
_OPERATORS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "×": "*", "÷": "/", "−": "-", "–": "-"}
_OPERATOR = re.compile(r"[-+*/×÷−–]|\\(?:times|cdot|div|[dt]?frac)|\d\s*x\s*\d")
_EXPRESSION = re.compile(rf"[(\s]*{_VALUE}[)\s]*(?:[-+*/][(\s]*{_VALUE}[)\s]*)+$")


@dataclass(frozen=True, slots=True)
class Calculation:
    begins_at: int
    """Characters before its first number."""
    at: int
    """Characters before the result."""
    result: str
    """In canonical form."""
    is_wrong: bool
    """Whether what stands before the equals sign comes to something else; False where that cannot be read."""


def calculations(text: str) -> Iterator[Calculation]:
    """Every number behind an equals sign, with the calculation before it.

    >>> [(c.result, c.is_wrong) for c in calculations(r"5 x 3 = 15, 15 + 2 = 18")]
    [('15', False), ('18', True)]
    """
    for match in _RESULT.finditer(text):
        result = canonical_number(match["result"].rstrip(","))
        # In "= 4 x 5" and "= 12.5%" the number is no result, or not one to compare.
        if result is None or re.match(r"\s*(?:[-+*/×÷%^]|\\times|\\div|\\%|\\cdot|x\s*\d)", match["after"]):
            continue
        before = re.split(r"[=\n:;]|(?<!\d),|,(?!\d{3})", text[: match.start()])[-1]
        first = re.search(r"[(]?\\[dt]?frac|\d", before) if _OPERATOR.search(before) else None
        value = _value(before)
        yield Calculation(
            begins_at=match.start() - len(before) + first.start() if first else match.start("result"),
            at=match.start("result"),
            result=result,
            is_wrong=value is not None and not _rounds_to(value, result),
        )


def _value(text: str) -> float | None:
    """What an expression comes to, or None where it is not plain arithmetic."""
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    for written, sign in _OPERATORS.items():
        text = text.replace(written, f" {sign} ")
    text = re.sub(r"(?<=[\d)])\s*x\s*(?=[\d($])", " * ", text)
    if "%" in text or "^" in text:
        return None
    text = _WORDS.sub(" ", text).replace(",", "")
    match = _EXPRESSION.search(text.replace(". ", " "))
    if match is None or match[0].count("(") != match[0].count(")"):
        return None
    try:
        return _evaluated(ast.parse(match[0].strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        return None


_APPLY: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluated(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _APPLY:
        return _APPLY[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError("not plain arithmetic")


def _rounds_to(value: float, result: str) -> bool:
    """Whether the result is the value, rounded or cut off to as many decimals as it shows."""
    if "/" in result:
        return True
    decimals = len(result.partition(".")[2])
    return abs(value - float(result)) < 10.0**-decimals if decimals or value % 1 else value == float(result)
