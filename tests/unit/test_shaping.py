"""Penalties, bias and thoughts: pure parts of what one model writes alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import wire
from shared.errors import InvalidRequest
from shared.messages import Message, Open
from shared.sampling import Sampling
from shared.shaping import NO_SHAPING, Shaping, shape_logits
from shared.thinking import ThinkingSplitter


def shaped(shaping: Shaping, prompt_ids=(), completion_ids=()) -> list[float]:
    """What becomes of the logits 1, -1, 2, -2."""
    logits = np.array([1.0, -1.0, 2.0, -2.0], np.float32)
    shape_logits(logits, shaping, prompt_ids=prompt_ids, completion_ids=completion_ids)
    return logits.tolist()


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        pytest.param(NO_SHAPING, [1, -1, 2, -2], id="nothing asked, nothing changed"),
        pytest.param(Shaping(presence_penalty=0.5), [1, -1.5, 1.5, -2], id="presence counts once"),
        pytest.param(Shaping(frequency_penalty=0.5), [1, -1.5, 1, -2], id="frequency counts each time"),
        pytest.param(Shaping(repetition_penalty=2.0), [0.5, -2, 1, -2], id="repetition knows the prompt"),
        pytest.param(Shaping(logit_bias=((3, 5.0), (99, 1.0))), [1, -1, 2, 3], id="bias, of known tokens"),
        pytest.param(
            Shaping(logit_bias=((0, 3.0),), repetition_penalty=2.0), [2, -2, 1, -2], id="bias comes first"
        ),
    ],
)
def test_logits_after_prompt_0_and_completion_1_2_2(shaping, expected):
    assert shaped(shaping, prompt_ids=[0], completion_ids=[1, 2, 2]) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((-1, 1.0),)},
        {"grammar": "x" * 65537},
        {"grammar": "root ::= [a]", "json_schema": "{}"},
    ],
)
def test_what_is_out_of_range_is_refused_by_name(bad):
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        Shaping(**bad)


def test_only_what_differs_from_the_default_is_asked():
    assert NO_SHAPING.asked == ()
    assert Shaping(presence_penalty=1.0, grammar="root ::= [a]").asked == ("presence_penalty", "grammar")


@pytest.mark.parametrize(
    "shaping",
    [
        NO_SHAPING,
        Shaping(presence_penalty=0.1, frequency_penalty=-2.0, repetition_penalty=1.3),
        Shaping(logit_bias=((1, -100.0), (7, 0.25)), json_schema='{"type": "object"}'),
    ],
)
def test_a_shaping_travels_unchanged(shaping):
    request = Open(prompt=(Message("user", "hi"),), sampling=Sampling(), seed=1, shaping=shaping)
    assert wire.decode_open(wire.encode_open(request)).shaping == shaping


# Thoughts


def split(pieces) -> tuple[str, str]:
    splitter = ThinkingSplitter()
    runs = [run for piece in pieces for run in splitter.feed(piece)] + splitter.finish()
    return tuple("".join(text for is_thought, text in runs if is_thought is kind) for kind in (True, False))


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a</think>\n\nb", "a", "b"),
        ("\n<think>a</think>b </think> c", "a", "b </think> c"),
        ("<think>never ends", "never ends", ""),
        ("<think></think>b", "", "b"),
        ("no thought <think>a</think>", "", "no thought <think>a</think>"),
        ("<thin", "", "<thin"),
        ("a</thi", "", "a</thi"),
        ("", "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 30), max_size=6))
def test_thoughts_are_told_apart_however_the_text_comes(text, thought, answer, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert split(pieces) == (thought, answer)
