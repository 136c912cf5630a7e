"""Probes: questions about the question, answered by the edge model. One small interface, many strategies.

A probe turns a question into tokens to evaluate, and what the model says to them into a `Reading`. The
reader (`reading.py`) evaluates many probes at once and shares the question's tokens between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.routing.template import Template, load_template
from edge_agent.routing.verdicts import parse_num_words, parse_verdict
from edge_agent.routing.words import sample_ratio
from shared.errors import InvalidSetting
from shared.llama import LlamaModel
from shared.llama.context import common_prefix
from shared.messages import Message

Float = NDArray[np.float64]
Estimates = Literal["difficulty", "length"]

NO_CONTENT = "N/A"

_OPTION_LINE = re.compile(r"^\s*\(?([A-F])[.):]\s+\S", re.MULTILINE)


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


@dataclass(frozen=True, slots=True)
class Question:
    """What is routed: a chat, its tokens as the model reads them before it answers, and its last words."""

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """Cut to head and tail where `is_cut`."""
    is_cut: bool = False

    @property
    def text(self) -> str:
        return self.messages[-1].content

    @property
    def letters(self) -> tuple[str, ...]:
        """The options of a multiple-choice question, "A" first; empty for any other."""
        found = _OPTION_LINE.findall(self.text)
        for length in range(len(found), 1, -1):
            if found[-length:] == list("ABCDEF"[:length]):
                return tuple(found[-length:])
        return ()


@dataclass(frozen=True, slots=True)
class Said:
    """What the model said to a probe's prompt."""

    logprobs: Float
    """[vocabulary_size], nats, of the first token."""
    text: str = ""
    """What it wrote, of a probe that lets it write."""
    token_logprobs: tuple[float, ...] = ()
    """Nats, of each written token."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A probe's result."""

    probe: str
    value: float | None
    """Difficulty in [0, 1], or length in tokens; None where the model's words could not be understood."""
    features: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the blend, by name."""
    distribution: Mapping[str, float] = field(default_factory=dict)
    """Option -> probability, where one token was read."""
    text: str | None = None
    """What the model wrote, where it wrote."""


class Probe(Protocol):
    """One strategy. Pure but for the tokenizer."""

    name: str
    estimates: Estimates
    max_words: int
    """Tokens that the model may write; 0 reads only the first token's probabilities."""

    def applies(self, question: Question) -> bool: ...

    def prompt(self, model: LlamaModel, question: Question) -> list[int]:
        """Token ids to evaluate; what they share with the question's is not computed again."""

    def read(self, model: LlamaModel, question: Question, said: Said, prior: Float | None) -> Reading:
        """
        Args:
            prior: [num_options], the same probe's log-probabilities on a question without content.
        """


class OptionProbe:
    """One token is read as a distribution over a template's options; the value is its mean worth."""

    max_words = 0

    def __init__(self, template: Template, estimates: Estimates, *, takes_prior: bool) -> None:
        if not template.options:
            raise InvalidSetting(f"the template {template.name}.txt needs options and {{answer}}; correct it")
        self.name = template.name
        self.estimates = estimates
        self.takes_prior = takes_prior
        self._template = template

    def applies(self, question: Question) -> bool:
        return True

    def options(self, question: Question) -> list[str]:
        return list(self._template.options)

    def prompt(self, model: LlamaModel, question: Question) -> list[int]:
        return self._encode(model, question)[0]

    def read(self, model: LlamaModel, question: Question, said: Said, prior: Float | None) -> Reading:
        logprobs = self.option_logprobs(model, question, said)
        return self.interpret(question, logprobs if prior is None else _normalised(logprobs - prior))

    def option_logprobs(self, model: LlamaModel, question: Question, said: Said) -> Float:
        """[num_options], normalised among the options."""
        ids = self._encode(model, question)[1]
        sharing = np.array([ids.count(token) for token in ids])  # 1 each, but for unusual tokenizers
        return _normalised(said.logprobs[ids] - np.log(sharing))

    def without_content(self, question: Question) -> str:
        """The question that the prior is measured on."""
        return NO_CONTENT

    def interpret(self, question: Question, logprobs: Float) -> Reading:
        probs = np.exp(logprobs)
        worth = np.array(list(self._template.options.values()))
        value = float(probs @ worth)
        return Reading(
            self.name,
            value,
            {self.name: value},
            {option: float(p) for option, p in zip(self._template.options, probs, strict=True)},
        )

    def _encode(self, model: LlamaModel, question: Question) -> tuple[list[int], list[int]]:
        """The prompt, and the token id of each option after it: the first in which they differ."""
        if self._template.shares_question:
            head, text = list(question.token_ids), self._template.mouth
        else:
            head, text = [], self._template.with_question(question.text)
        encoded = [model.tokenize(text + option) for option in self.options(question)]
        shared = min(common_prefix(encoded[0], other) for other in encoded[1:])
        shared = min(shared, *(len(ids) - 1 for ids in encoded))
        return head + encoded[0][:shared], [ids[shared] for ids in encoded]


class GuessProbe(OptionProbe):
    """Own confidence in an answer given at once: the likeliest option's probability, without its prior."""

    def applies(self, question: Question) -> bool:
        return not question.letters

    def interpret(self, question: Question, logprobs: Float) -> Reading:
        probs = np.exp(logprobs)
        options = dict(zip(self.options(question), map(float, probs), strict=True))
        return Reading(self.name, 1.0 - float(probs.max()), guess_features(self.name, logprobs), options)


class LetterProbe(GuessProbe):
    """Own confidence on a multiple-choice question."""

    def applies(self, question: Question) -> bool:
        return bool(question.letters)

    def options(self, question: Question) -> list[str]:
        return list(question.letters)

    def without_content(self, question: Question) -> str:
        return multiple_choice(NO_CONTENT, [NO_CONTENT] * len(question.letters))


class ConfidenceProbe:
    """Own confidence in the first token of the answer: the row is there once the question is read."""

    name = "confidence"
    estimates: Estimates = "difficulty"
    max_words = 0

    def applies(self, question: Question) -> bool:
        return True

    def prompt(self, model: LlamaModel, question: Question) -> list[int]:
        return list(question.token_ids)

    def read(self, model: LlamaModel, question: Question, said: Said, prior: Float | None) -> Reading:
        probs = np.exp(said.logprobs)
        entropy = -float(probs @ np.where(probs > 0, said.logprobs, 0.0))
        best = float(probs.max())
        return Reading(
            self.name, 1.0 - best, {"confidence": 1.0 - best, "confidence.entropy": entropy}, {"best": best}
        )


class DraftConfidenceProbe:
    """Own confidence in the first tokens of a draft answer: their mean and their lowest probability."""

    name = "confidence-draft"
    estimates: Estimates = "difficulty"

    def __init__(self, num_tokens: int = 16) -> None:
        self.max_words = num_tokens

    def applies(self, question: Question) -> bool:
        return True

    def prompt(self, model: LlamaModel, question: Question) -> list[int]:
        return list(question.token_ids)

    def read(self, model: LlamaModel, question: Question, said: Said, prior: Float | None) -> Reading:
        probs = np.exp(said.token_logprobs)
        features = {
            "confidence-draft.mean": 1.0 - float(probs.mean()),
            "confidence-draft.lowest": 1.0 - float(probs.min()),
        }
        return Reading(self.name, 1.0 - float(probs.mean()), features, text=said.text)


class WrittenProbe:
    """The model writes freely and its words are parsed; None where they say nothing."""

    def __init__(
        self,
        template: Template,
        estimates: Estimates,
        max_words: int,
        tokens_per_word: float | None = None,
    ) -> None:
        """
        Args:
            tokens_per_word: of the model's answers; unset measures its tokenizer on the sample text.
        """
        self.name = template.name
        self._tokens_per_word = tokens_per_word
        self.estimates = estimates
        self.max_words = max_words
        self._template = template

    def applies(self, question: Question) -> bool:
        return True

    def prompt(self, model: LlamaModel, question: Question) -> list[int]:
        asked = Message("user", self._template.with_question(question.text))
        return model.render_chat([*question.messages[:-1], asked])

    def read(self, model: LlamaModel, question: Question, said: Said, prior: Float | None) -> Reading:
        if self.estimates == "difficulty":
            value = parse_verdict(said.text)
        else:
            words = parse_num_words(said.text)
            value = None if words is None else words * (self._tokens_per_word or sample_ratio(model.tokenize))
        return Reading(self.name, value, text=said.text)


def default_probes(folder: Path | None = None) -> list[Probe]:
    """Those that decide: one token each, so that all of them cost little more than reading the question."""
    return [
        ConfidenceProbe(),
        LetterProbe(load_template("letters", folder), "difficulty", takes_prior=True),
        OptionProbe(load_template("who", folder), "difficulty", takes_prior=True),
        OptionProbe(load_template("rating", folder), "difficulty", takes_prior=True),
        OptionProbe(load_template("bins", folder), "length", takes_prior=False),
    ]


def all_probes(folder: Path | None = None, tokens_per_word: float | None = None) -> list[Probe]:
    """Every strategy, for comparison; some let the model write.

    Args:
        tokens_per_word: see `WrittenProbe`.
    """
    return [
        *default_probes(folder),
        *(
            OptionProbe(load_template(name, folder), "difficulty", takes_prior=True)
            for name in (
                "know",
                "grade",
                "steps",
                "who-prompt",
                "rating-prompt",
                "who-few-shot",
                "rating-few-shot",
            )
        ),
        LetterProbe(load_template("letters-prompt", folder), "difficulty", takes_prior=True),
        LetterProbe(load_template("letters-few-shot", folder), "difficulty", takes_prior=True),
        GuessProbe(load_template("digit", folder), "difficulty", takes_prior=True),
        DraftConfidenceProbe(),
        WrittenProbe(load_template("ten-times", folder), "difficulty", max_words=32),
        WrittenProbe(load_template("words-first-line", folder), "length", 12, tokens_per_word),
    ]


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """A question and its options as this project writes them."""
    return "\n".join(
        [question, *(f"{letter}. {choice}" for letter, choice in zip("ABCDEF", choices, strict=False))]
    )


GUESSES = ("letters", "letters-prompt", "letters-few-shot", "digit")
"""Probes that read an answer given at once."""

SHAPE_FEATURES = ("prompt_tokens.", "shape.")
"""How the names of `cheap_features` begin."""


def cheap_features(question: Question) -> dict[str, float]:
    """What can be seen without the model: length and shape of the question."""
    text = question.text
    return {
        "prompt_tokens.log": float(np.log(max(1, len(question.token_ids)))),
        "shape.choices": float(bool(question.letters)),
        "shape.digits": sum(c.isdigit() for c in text) / max(1, len(text)),
        "shape.numbers.log": float(np.log1p(len(_NUMBER.findall(text)))),
        "shape.sentences.log": float(np.log1p(len(_SENTENCE_END.findall(text)))),
        "shape.code": float("```" in text or "def " in text or "{" in text),
    }


def _normalised(logprobs: Float) -> Float:
    peak = logprobs.max()
    normalised: Float = logprobs - peak - np.log(np.exp(logprobs - peak).sum())
    return normalised


def guess_features(name: str, logprobs: Float) -> dict[str, float]:
    """What a guess says of its own worth.

    Args:
        name: of the probe.
        logprobs: [num_options], normalised, nats.
    """
    probs = np.exp(logprobs)
    best, second = np.sort(logprobs)[-1:-3:-1]
    return {
        name: 1.0 - float(probs.max()),
        f"{name}.margin": float(best - second),
        f"{name}.entropy": -float(probs @ logprobs),
    }


def parse_failure_rate(readings: Sequence[Reading]) -> float:
    """Share of readings whose words could not be understood."""
    return sum(reading.value is None for reading in readings) / len(readings)
