"""What counts as right: the letter, the number or the text that a generated answer gives.

Nothing is asked of a judge model. An answer that names several options, or none, gives no letter; a number is
the one marked as the result, or else the last one; a text counts wherever it stands as whole words, so that
an answer which lists candidates counts as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from edge_agent.evaluation.items import LETTERS, Item, Kind
from edge_agent.evaluation.numerals import canonical_number, numbers


def extract(item: Item, text: str) -> str | None:
    """The letter, the number in canonical form, or the matched text of a generated answer.

    None where the answer holds nothing of the kind, and for OPEN.
    """
    if item.kind is Kind.CHOICE:
        return chosen_letter(text, item.choices)
    if item.kind is Kind.NUMBER:
        return final_number(text)
    plain = _squeezed(text)
    return next((answer for answer in item.answers if re.search(_bounded(_squeezed(answer)), plain)), None)


def is_right(item: Item, text: str) -> bool | None:
    """Whether a generated answer is right; None for OPEN, where nothing is."""
    if item.kind is Kind.OPEN:
        return None
    found = extract(item, text)
    if item.kind is Kind.NUMBER:
        return found is not None and found == canonical_number(item.answer or "")
    return found is not None and (item.kind is Kind.TEXT or found == item.answer)


# Numbers

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_HASHES = re.compile(r"^\s*####(.*)$", re.MULTILINE)


def final_number(text: str) -> str | None:
    r"""The number in the last \boxed{}, or on the last line of GSM8K's form `#### 72`, or the last of all."""
    for boxed in reversed(_BOXED.findall(text)):
        if found := numbers(boxed):
            return found[-1]
    for line in reversed(_HASHES.findall(text)):
        if (found_alone := canonical_number(line.strip(" *.\r"))) is not None:  # else it is a heading
            return found_alone
    found = numbers(text)
    return found[-1] if found else None


# Letters

_NOT_DENIED = r"(?!\s+(?:is|was|are)\s+(?:not|wrong|incorrect|false)\b|\s+isn['’]t\b)"
_ONE_OF_SEVERAL = r"\s*(?:,|/|&|\bor\b|\band\b)\s*\(?[A-F](?![\w'’])"
_LETTER = (
    r"(?:the\s+)?(?:(?:option|choice|letter|answer)\s*)?\(?"
    r"(?P<letter>[a-f])(?![\w'’+#]|-\w)"
    # An "A" before another word is an article, unless the word speaks of a letter.
    r"(?<!a(?=\s(?!(?:as|because|but|due|for|is|not|since|was|which|would)\b)\w))"
    rf"\)?(?!{_ONE_OF_SEVERAL}){_NOT_DENIED}"
)
_STATED = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # "The correct answer is B", "Answer: (B)", "the best option would be B"
        rf"\b(?:answer|ans|option|choice|solution)\b[^.\n]{{0,80}}?(?:\b(?:is|be)\b:?|[:=])\s*{_LETTER}",
        rf"\b(?:choose|chose|pick|select|go with)\s+{_LETTER}",
        # "B is correct", "Option B (foo) is the right one"
        r"(?<![\w'’])\(?(?P<letter>[a-f])\b\)?(?:[.:(][^.\n]{0,80}?)?\s+is\s+(?:the\s+)?"
        r"(?:correct|right|best|most\s+(?:accurate|appropriate|likely))\b",
    )
]
_LEADING = re.compile(
    r"^\W*?(?:(?:option|choice)\s+)?(?:\((?P<bracketed>[a-f])\)|(?P<letter>[a-f])(?:[.):]|\s+[-–—]\s|\s*$))"
    rf"(?!{_ONE_OF_SEVERAL}){_NOT_DENIED}",
    re.IGNORECASE | re.MULTILINE,
)
_BRACKETED = re.compile(r"\((?P<letter>[A-F])\)" + _NOT_DENIED)
_TEXT_STATED = r"\banswer\b[^.\n]{{0,80}}?(?:\bis\b|:)\s*(?:(?:the|an?)\s+)?(?:{})"


def chosen_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses, or None where it names none or several.

    Read in this order: an option's text and nothing else; "the answer is B" and its like; a letter that opens
    a line, as in "B) foo"; an option's text within a sentence; a letter in brackets. What counts is the
    letter, even where the words beside it are another option's.
    """
    plain = _without_markup(text)
    for letters in _readings(plain, choices):
        offered = {letter.upper() for letter in letters} & {*LETTERS[: len(choices)]}
        if offered:
            return offered.pop() if len(offered) == 1 else None
    return None


def _readings(text: str, choices: Sequence[str]) -> Iterator[set[str]]:
    """What each way of reading finds, the surest first."""
    by_text: dict[str, set[str]] = {}
    for letter, choice in zip(LETTERS, choices, strict=False):
        by_text.setdefault(_squeezed(choice), set()).add(letter)
    yield by_text.get(_squeezed(text), set())
    yield {match["letter"] for pattern in _STATED for match in pattern.finditer(text)}
    yield {match["bracketed"] or match["letter"] for match in _LEADING.finditer(text)}
    # Longer texts first, so that "Not wrong" is not read as "wrong".
    texts = "|".join(_bounded(choice) for choice in sorted(by_text, key=len, reverse=True) if choice)
    for pattern in (_TEXT_STATED.format(f"(?P<choice>{texts})"), f"(?P<choice>{texts})"):
        found = re.finditer(pattern, _squeezed(text)) if texts else []
        yield set[str]().union(*(by_text[match["choice"]] for match in found))
    yield {match["letter"] for match in _BRACKETED.finditer(text)}


def _without_markup(text: str) -> str:
    r"""Without Markdown's emphasis, and with LaTeX's \boxed{B} in words."""
    text = re.sub(r"\\boxed\s*\{(?:\\text\w*\{)?\s*\(?([A-F])\)?\s*\}?\}", r"answer: \1", text)
    return re.sub(r"\*+|`+", "", text)


# Texts


def _squeezed(text: str) -> str:
    """One line in small letters, without emphasis and full stop."""
    return " ".join(re.sub(r"\*+|`+", "", text).split()).rstrip(".").casefold()


def _bounded(text: str) -> str:
    """Pattern of a text as whole words; "5" is neither in "-5" nor in "5.2"."""
    return rf"(?<![\w\-\u2212])(?<!\d[.,]){re.escape(text)}(?!\w|[.,]\d)"
