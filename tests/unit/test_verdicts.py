"""Free-form verdicts of the ten-times prompt, and word counts, as models write them."""

from __future__ import annotations

import pytest

from edge_agent.routing.probes import Reading, parse_failure_rate
from edge_agent.routing.verdicts import parse_num_words, parse_verdict

VERDICTS = [
    ("the more powerful model", 1.0),
    ("The more powerful model.", 1.0),
    ("\"The more powerful model\" is better suited to answer this question.", 1.0),
    ("It is better for the more powerful model to answer.", 1.0),
    ("It would be better for the 10-times more powerful model to answer.", 1.0),
    ("A 10x more powerful model would give a better answer.", 1.0),
    ("**More powerful model**", 1.0),
    ("I think the stronger model should answer.", 1.0),
    ("I cannot answer this well.", 1.0),
    ("I can't do this reliably; ask the larger model.", 1.0),
    ("I'm not able to answer this with confidence.", 1.0),
    ("This is beyond my abilities.", 1.0),
    ("This is too hard for me.", 1.0),
    ("The larger model, not me.", 1.0),
    ("The bigger model would be better than me here.", 1.0),
    ("Use the cloud.", 1.0),
    ("Verdict: the more capable model", 1.0),
    ("I should not answer this one.", 1.0),
    ("Better leave this to an expert.", 1.0),
    ("The other model.", 1.0),
    ("me", 0.0),
    ("Me.", 0.0),
    ("\"me\"", 0.0),
    ("**Me**", 0.0),
    ("Answer: me", 0.0),
    ("It is better for me to answer.", 0.0),
    ("I can answer this.", 0.0),
    ("I can answer this question without a more powerful model.", 0.0),
    ("I should answer this myself.", 0.0),
    ("There is no need for a more powerful model.", 0.0),
    ("A more powerful model is not needed.", 0.0),
    ("You don't need the more powerful model for this.", 0.0),
    ("A stronger model would be overkill.", 0.0),
    ("Me, rather than the more powerful model.", 0.0),
    ("The smaller model can answer this.", 0.0),
    ("Either model can answer this.", 0.5),
    ("Both of us could do it.", 0.5),
    ("Sure!\nThe more powerful model should answer.", 1.0),
    ("To determine which option is better for you or for the more powerful model, we need to", None),
    ("Is it better for me or for the more powerful model? The more powerful model.", 1.0),
    ("The question is whether \"me\" or \"the more powerful model\" should answer: me.", 0.0),
    ("The capital of France is Paris.", None),
    ("", None),
    ("```python\ndef fibonacci(n):\n    return n\n```", None),
    ("To solve this, let x be the number of apples.", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "verdict"), VERDICTS)
def test_a_verdict_is_read_from_free_text(text, verdict):
    assert parse_verdict(text) == verdict


def test_at_least_forty_varied_verdicts_are_tried():
    assert len({text for text, _ in VERDICTS}) >= 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("50", 50),
        ("50 words\nThe answer is ...", 50),
        ("\n\n120\nText", 120),
        ("About 50-100 words.", 75),
        ("100 to 200", 150),
        ("1,200 words", 1200),
        ("Twenty", 20),
        ("One word.", 1),
        ("Paris is the capital.", None),
        ("", None),
    ],
)
def test_a_number_of_words_is_read_from_the_first_line(text, words):
    assert parse_num_words(text) == words


def test_what_cannot_be_understood_is_counted():
    readings = [Reading("ten-times", parse_verdict(text)) for text in ("me", "Paris.", "Hello", "The cloud")]
    assert parse_failure_rate(readings) == 0.5
