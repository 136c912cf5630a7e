"""From words to tokens: a ratio of each tokenizer, measured on text and never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files

Tokenize = Callable[[str], Sequence[int]]


def tokens_per_word(tokenize: Tokenize, texts: Iterable[str]) -> float:
    """How many tokens a word takes on average, a word being what stands between white space.

    Raises:
        ValueError: the texts hold no word.

    >>> tokens_per_word(list, ["to be", "or not"])
    2.75
    """
    num_tokens = num_words = 0
    for text in texts:
        num_tokens += len(tokenize(text))
        num_words += len(text.split())
    if not num_words:
        raise ValueError("no words to measure on")
    return num_tokens / num_words


@cache
def sample_text() -> str:
    """English as models answer: prose, a list and two lines of code; for models without known answers."""
    return files("edge_agent.routing").joinpath("sample.txt").read_text("utf-8")


def answers_ratio(num_tokens: int, num_words: int, tokenize: Tokenize) -> float:
    """The ratio of a model's own answers, or of the sample text where that holds more words than they do."""
    if num_words >= len(sample_text().split()):
        return num_tokens / num_words
    return sample_ratio(tokenize)


def sample_ratio(tokenize: Tokenize) -> float:
    """`tokens_per_word` of the sample text; takes about a millisecond."""
    return tokens_per_word(tokenize, [sample_text()])
