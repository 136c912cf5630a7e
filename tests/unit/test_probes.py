"""Probes on a scripted model: it says what the test lets it say, and knows no language."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.routing.probes import (
    ConfidenceProbe,
    DraftConfidenceProbe,
    GuessProbe,
    LetterProbe,
    OptionProbe,
    Question,
    Said,
    WrittenProbe,
    cheap_features,
    default_probes,
)
from edge_agent.routing.template import Template, load_template
from edge_agent.routing.words import answers_ratio, sample_ratio, sample_text, tokens_per_word
from shared.errors import InvalidSetting
from shared.messages import Message

CHOICES = "Which?\nA. one\nB. two\nC. three"


class ScriptedModel:
    """A tokenizer of one token a character, and a chat template that is the text itself."""

    name = "scripted"

    def tokenize(self, text):
        return [ord(character) for character in text]

    def render_chat(self, messages):
        return self.tokenize("".join(message.content for message in messages))


MODEL = ScriptedModel()


def asked(text="Why?"):
    return Question((Message("user", text),), tuple(MODEL.tokenize(text)))


def says(**probs) -> Said:
    """The first token's probabilities, by character; the rest is shared by all others."""
    rest = (1.0 - sum(probs.values())) / (128 - len(probs))
    row = np.full(128, max(rest, 1e-12))
    for character, p in probs.items():
        row[ord(character.lstrip("_"))] = p
    return Said(np.log(row))


def option_probe(options, prompt="{question}Hard? {answer}"):
    return OptionProbe(Template("who", prompt, options), "difficulty", takes_prior=False)


def test_options_are_read_as_a_distribution_and_the_value_is_their_mean_worth():
    reading = option_probe({"y": 1.0, "n": 0.0}).read(MODEL, asked(), says(y=0.3, n=0.1), None)
    assert reading.distribution == pytest.approx({"y": 0.75, "n": 0.25})
    assert reading.value == pytest.approx(0.75)


def test_a_prior_is_taken_off():
    prior = np.log([0.75, 0.25])
    reading = option_probe({"y": 1.0, "n": 0.0}).read(MODEL, asked(), says(y=0.3, n=0.1), prior)
    assert reading.value == pytest.approx(0.5)


def test_only_the_suffix_follows_the_question():
    question = asked()
    prompt = option_probe({"y": 1.0, "n": 0.0}).prompt(MODEL, question)
    assert prompt == [*question.token_ids, *MODEL.tokenize("Hard? ")]


def test_a_prompt_with_examples_stands_alone():
    probe = option_probe({"y": 1.0, "n": 0.0}, "Sum? n\n{question} {answer}")
    assert probe.prompt(MODEL, asked()) == MODEL.tokenize("Sum? n\nWhy? ")


def test_options_of_several_tokens_are_told_apart_by_the_first_that_differs():
    reading = option_probe({"yes": 1.0, "no": 0.0}).read(MODEL, asked(), says(y=0.2, n=0.2), None)
    assert reading.value == pytest.approx(0.5)


def test_options_that_begin_alike_share_a_probability():
    probe = option_probe({"a1": 1.0, "a2": 0.0, "b": 0.0})
    reading = probe.read(MODEL, asked(), says(a=0.6, b=0.3), None)
    assert reading.distribution == pytest.approx({"a1": 1 / 3, "a2": 1 / 3, "b": 1 / 3})


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        (CHOICES, "ABC"),
        ("Which?\n(A) one\n(B) two", "AB"),
        ("Which?\nA) one\nB) two\nC) x\nD) y", "ABCD"),
        ("A. is a letter", ""),
        ("Sort:\nB. x\nA. y", ""),
        ("Why?", ""),
        ("A. Smith wrote this.\nWhich?\nA. one\nB. two", "AB"),
    ],
)
def test_a_multiple_choice_question_is_known_by_its_options(text, letters):
    assert "".join(asked(text).letters) == letters


def test_confidence_in_a_letter_is_what_is_left_without_its_prior():
    probe = LetterProbe(load_template("letters"), "difficulty", takes_prior=True)
    said = says(A=0.4, B=0.4, C=0.1)
    likes_a = np.log([0.8, 0.1, 0.1])
    reading = probe.read(MODEL, asked(CHOICES), said, likes_a)
    assert max(reading.distribution, key=reading.distribution.__getitem__) == "B"
    assert reading.value == pytest.approx(1 - reading.distribution["B"])


def test_a_guess_is_asked_of_questions_without_options_and_says_how_sure_it_is():
    probe = GuessProbe(load_template("digit"), "difficulty", takes_prior=False)
    assert probe.applies(asked("How many?"))
    assert not probe.applies(asked(CHOICES))
    sure = probe.read(MODEL, asked("How many?"), says(_7=0.98), None)
    unsure = probe.read(MODEL, asked("How many?"), says(_7=0.2, _3=0.2), None)
    assert sure.value < unsure.value
    assert sure.features["digit.entropy"] < unsure.features["digit.entropy"]
    assert sure.features["digit.margin"] > unsure.features["digit.margin"]


@pytest.mark.parametrize("name", ["letters-prompt", "letters-few-shot"])
def test_a_letter_can_be_asked_for_in_a_prompt_of_its_own(name):
    probe = LetterProbe(load_template(name), "difficulty", takes_prior=True)
    prompt = "".join(map(chr, probe.prompt(MODEL, asked(CHOICES))))
    assert prompt.endswith(f"{CHOICES}\nAnswer: ")
    assert set(probe.read(MODEL, asked(CHOICES), says(B=0.9), None).distribution) == {"A", "B", "C"}


def test_confidence_is_the_first_tokens_probability():
    sure = ConfidenceProbe().read(MODEL, asked(), says(P=0.99), None)
    unsure = ConfidenceProbe().read(MODEL, asked(), says(P=0.2, Q=0.2), None)
    assert sure.value == pytest.approx(0.01)
    assert sure.features["confidence.entropy"] < unsure.features["confidence.entropy"]


def test_confidence_in_a_draft_is_its_mean_and_its_lowest_probability():
    said = Said(says(P=0.9).logprobs, "Paris", tuple(np.log([0.9, 0.5, 1.0])))
    reading = DraftConfidenceProbe().read(MODEL, asked(), said, None)
    assert reading.features == pytest.approx({"confidence-draft.mean": 0.2, "confidence-draft.lowest": 0.5})


@pytest.mark.parametrize(
    ("name", "estimates", "text", "value"),
    [
        ("ten-times", "difficulty", "The more powerful model.", 1.0),
        ("ten-times", "difficulty", "Paris.", None),
        ("words-first-line", "length", "100\nParis is", 150.0),
        ("words-first-line", "length", "Paris", None),
    ],
)
def test_written_answers_are_parsed_and_failures_are_none(name, estimates, text, value):
    probe = WrittenProbe(load_template(name), estimates, max_words=8, tokens_per_word=1.5)
    reading = probe.read(MODEL, asked(), Said(says(P=0.5).logprobs, text), None)
    assert reading.value == value
    assert reading.text == text


def test_without_a_calibration_words_count_by_what_the_tokenizer_takes_for_the_sample_text():
    probe = WrittenProbe(load_template("words-first-line"), "length", max_words=8)
    reading = probe.read(MODEL, asked(), Said(says(P=0.5).logprobs, "10"), None)
    characters_a_word = len(sample_text()) / len(sample_text().split())
    assert reading.value == pytest.approx(10 * characters_a_word)


def test_the_ratio_is_that_of_all_texts_together():
    assert tokens_per_word(MODEL.tokenize, ["a bc", "defg"]) == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="no words"):
        tokens_per_word(MODEL.tokenize, [" ", ""])


@pytest.mark.parametrize(
    ("num_words", "own"),
    [pytest.param(10_000, True, id="many"), pytest.param(10, False, id="fewer than the sample holds")],
)
def test_the_models_own_answers_count_where_they_hold_enough_words(num_words, own):
    ratio = answers_ratio(2 * num_words, num_words, MODEL.tokenize)
    assert ratio == (2.0 if own else sample_ratio(MODEL.tokenize))


def test_the_literal_prompts_hold_the_question():
    for name in ("ten-times", "words-first-line"):
        probe = WrittenProbe(load_template(name), "difficulty", max_words=8)
        assert "".join(map(chr, probe.prompt(MODEL, asked("Why me?")))).startswith("Why me?")


def test_cheap_features_tell_the_shape():
    features = cheap_features(asked(CHOICES))
    assert features["shape.choices"] == 1.0
    assert cheap_features(asked("```python\n1 + 1\n```"))["shape.code"] == 1.0


# Templates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Is it hard?", r"who\.txt must hold \{question\} once"),
        ("{question} and {question}", r"who\.txt must hold \{question\} once, but it does 2 times"),
        ('options: {"a": 1, "b": 0}\n---\n{question}', r"who\.txt must hold \{answer\} once"),
        ('options: {"a": 1, "b": 0}\n---\n{question}{answer} or', r"who\.txt must end in \{answer\}"),
        ("options: [a]\n---\n{question}{answer}", r"who\.txt must begin with a line such as options"),
        ("{question}", r"who\.txt needs options"),
    ],
)
def test_a_template_that_cannot_work_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "who.txt").write_text(text)
    with pytest.raises(InvalidSetting, match=said):
        default_probes(tmp_path)


def test_a_templates_folder_must_be_one(tmp_path):
    with pytest.raises(InvalidSetting, match="is not a folder"):
        default_probes(tmp_path / "none")
