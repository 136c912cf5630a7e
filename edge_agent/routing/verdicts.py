"""Verdicts and word counts out of free text, as models write them."""

from __future__ import annotations

import re

_STRONGER = (
    r"(?:(?:ten|10)[- ]?(?:times|x)|\d+x|more (?:powerful|capable|advanced)|much (?:stronger|larger|bigger)"
    r"|stronger|larger|bigger|better|other|powerful)[\w -]{0,30}?(?:model|one|ai|llm|assistant|system)"
    r"|\bcloud\b|\bexpert\b"
)
_ME = (
    r"\b(?:me|myself|i|i'm|i'd|i'll|my own|this model"
    r"|the (?:smaller|small|current|weaker|present) (?:model|one))\b"
)
_NOT_NEEDED = r"(?:needed|necessary|required)"
_NEGATED_STRONGER = re.compile(
    r"(?:no need|not need|n't need|unnecessary|not necessary|n't necessary|without|rather than|instead of"
    rf"|not require|n't require|overkill)[^.;,\n]{{0,40}}?(?:{_STRONGER})"
    rf"|(?:{_STRONGER})[^.;,\n]{{0,25}}(?:is not {_NOT_NEEDED}|isn't {_NOT_NEEDED}"
    r"|is unnecessary|would be overkill|is overkill|adds? (?:nothing|little))"
)
_NEGATED_ME = re.compile(
    rf"(?:rather than|instead of|not|than for|than)\s+(?:{_ME})"
    r"|\bi (?:can ?not|can't|could not|couldn't|should not|shouldn't|do not|don't|am not|am unable"
    r"|may not|might not|lack|would struggle)"
    r"|\bi'm (?:not|unable)|beyond (?:me|my)|too (?:hard|difficult|complex) for me"
)
_STRONGER_SAID = re.compile(_STRONGER)
_BOTH_NAMED = re.compile(rf"\b(?:you|me|myself)\"?,? or \"?(?:for |by )?(?:a |the )?(?:{_STRONGER})")
"""The question, said again: "to determine whether it is better for you or for the more powerful model"."""
_ME_SAID = re.compile(
    rf"(?:{_ME})[^.;,\n]{{0,25}}?"
    r"(?:can|should|could|will|would|am|'ll|is better|is enough|suffices?|is sufficient)"
    rf"|(?:for|by|to|be|:|it is|it's|answer|choose)\s*[\"'*]*(?:{_ME})"
    rf"|^\W*(?:{_ME})\W*(?:$|[.,;\n])|\bi can\b"
)


def parse_verdict(text: str) -> float | None:
    """Read "who is better placed to answer" out of a free-form verdict.

    The first line that says it decides. What is negated counts for the other side.

    Returns:
        1.0 for the more powerful model, 0.0 for this one, 0.5 where either will do, None where the text
        says neither.

    >>> parse_verdict("It is better for the more powerful model to answer.")
    1.0
    >>> parse_verdict("The capital of France is Paris.") is None
    True
    """
    for line in text.lower().replace("’", "'").splitlines():
        if (verdict := _verdict_of(line)) is not None:
            return verdict
    return None


def _verdict_of(line: str) -> float | None:
    if re.search(r"\b(?:either|both)\b[^.\n]*\b(?:can|could|would|will|do|fine|of us)\b", line):
        return 0.5
    line = _BOTH_NAMED.sub(" ", line)
    if _NEGATED_STRONGER.search(line):
        return 0.0
    if _NEGATED_ME.search(line):
        return 1.0
    stronger, me = _STRONGER_SAID.search(line), _ME_SAID.search(line)
    if stronger and me:  # "me, not ..." was seen above; what is named first is the verdict
        return 0.0 if me.start() < stronger.start() else 1.0
    if stronger:
        return 1.0
    return 0.0 if me else None


_WORD_NUMBERS = {
    name: n
    for n, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    )
} | {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "hundred": 100, "thousand": 1000}
_NUMBER = re.compile(r"\d[\d,]*")
_RANGE = re.compile(r"(\d[\d,]*)\s*(?:-|–|to)\s*(\d[\d,]*)")


def parse_num_words(text: str) -> int | None:
    """Read a number of words out of the first line; the middle of a range. None where it holds no number.

    >>> parse_num_words("About 50-100 words.")
    75
    """
    first = next((line for line in text.lower().splitlines() if line.strip()), "")
    if found := _RANGE.search(first):
        return sum(int(number.replace(",", "")) for number in found.groups()) // 2
    if number := _NUMBER.search(first):
        return int(number.group().replace(",", ""))
    return next((_WORD_NUMBERS[word] for word in re.findall("[a-z]+", first) if word in _WORD_NUMBERS), None)
