"""Names for chats, by which balancers keep them on one replica."""

from __future__ import annotations

import pytest

from shared.affinity import session_key
from shared.messages import Message

SYSTEM = Message("system", "Be brief.")
FIRST = Message("user", "Why is the sky blue?")
TURNS = [SYSTEM, FIRST, Message("assistant", "Scattering."), Message("user", "And red at dusk?")]


def test_all_turns_of_a_chat_have_one_name():
    assert len({session_key(TURNS[:end], b"salt") for end in (2, 3, 4)}) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([FIRST], id="another system prompt"),
        pytest.param([SYSTEM, Message("user", "Why?")], id="another first question"),
    ],
)
def test_chats_that_begin_otherwise_have_another_name(other):
    assert session_key(other, b"salt") != session_key(TURNS, b"salt")


def test_a_name_tells_nothing_without_the_salt():
    assert session_key(TURNS, b"one") != session_key(TURNS, b"two")


def test_a_refused_stream_is_led_elsewhere():
    assert len({session_key(TURNS, b"salt", attempt) for attempt in range(8)}) == 8


def test_token_ids_are_known_by_their_beginning():
    ids = list(range(200))
    assert session_key(ids, b"salt") == session_key(ids[:150], b"salt") != session_key(ids[1:], b"salt")
