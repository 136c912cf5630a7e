"""How a chat that outgrew the context is shortened."""

from __future__ import annotations

import pytest

from edge_agent.agent import without_oldest_turn
from shared.messages import Message

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def chat(words: str) -> list[Message]:
    """`s0 u1` is a system prompt and a question."""
    return [Message(ROLES[word[0]], word) for word in words.split()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("u1 a1 u2", "u2", id="the oldest question goes with its answer"),
        pytest.param("s0 u1 a1 u2 a2 u3", "s0 u2 a2 u3", id="the system prompt stays"),
        pytest.param("s0 u1 u2 a2 u3", "s0 u2 a2 u3", id="a question without an answer goes alone"),
        pytest.param("u1 a1 a1 u2", "u2", id="an answer in two parts goes whole"),
        pytest.param("a0 u1 a1 u2", "u1 a1 u2", id="a greeting counts as the oldest turn"),
        pytest.param("s0 u1 a1", "s0 a1", id="the last message stays, even an answer"),
    ],
)
def test_the_oldest_turn_is_left_out(before, after):
    assert without_oldest_turn(chat(before)) == chat(after)


@pytest.mark.parametrize("words", ["u1", "s0 u1", "s0", ""])
def test_a_chat_of_one_message_cannot_be_shortened(words):
    assert without_oldest_turn(chat(words)) is None


def test_the_chat_that_was_given_is_left_as_it_is():
    messages = chat("s0 u1 a1 u2")
    without_oldest_turn(messages)
    assert messages == chat("s0 u1 a1 u2")


def test_shortening_again_and_again_ends_with_the_last_message():
    messages = chat("s0 u1 a1 u2 a2 u3 a3 u4")
    steps = 0
    while (shorter := without_oldest_turn(messages)) is not None:
        messages, steps = shorter, steps + 1
    assert (messages, steps) == (chat("s0 u4"), 3)
