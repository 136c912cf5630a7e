"""The pieces of `duet chat` that need no terminal and no model: commands, figures, saved chats."""

from __future__ import annotations

import json
import stat

import pytest

from edge_agent.chat.commands import COMMANDS, Command, help_lines, parse
from edge_agent.chat.conversation import Conversation
from edge_agent.chat.figures import AnswerFigures, ChatFigures, stats_lines, status_line
from edge_agent.chat.saved import SavedChats
from shared.errors import InvalidRequest
from shared.events import Round, Routed, Text
from shared.messages import Message
from shared.routing import Link
from shared.session import Origin

# Commands


@pytest.mark.parametrize(
    ("line", "command"),
    [
        pytest.param("/mode cloud", Command("mode", "cloud"), id="a command and its argument"),
        pytest.param("/system  Be brief. ", Command("system", "Be brief."), id="the rest of the line"),
        pytest.param("/clear", Command("clear", ""), id="no argument"),
        pytest.param("What is 1/2?", None, id="a slash inside a message"),
        pytest.param(" /etc is what?", None, id="a message that begins with a space"),
    ],
)
def test_a_line_is_a_command_or_a_message(line, command):
    assert parse(line) == command


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(InvalidRequest, match="there is no /rout; did you mean /route"):
        parse("/rout")


def test_help_has_a_line_for_every_command():
    assert [line.split()[0].removeprefix("/") for line in help_lines()] == list(COMMANDS)


# Conversation


def test_a_question_follows_the_system_prompt_and_what_was_said():
    chat = Conversation("Be brief.").answered("1?", "one")
    assert [message.content for message in chat.asking("2?")] == ["Be brief.", "1?", "one", "2?"]
    assert chat.num_turns == 1


# Figures


def test_the_status_line_shows_mode_speed_acceptance_and_link():
    answer = AnswerFigures()
    answer.take(Routed("speculate"), 0.0)
    answer.take(Text("a", Origin.ACCEPTED), 1.0)
    answer.take(Text("b", Origin.BONUS), 1.5)
    answer.take(Round(4, 3), 1.5)
    line = status_line("auto", answer, Link(up=True, rtt_s=0.012))
    assert line == "auto: speculate · 2.0 tokens/s · 75% accepted · link 12 ms"


def test_the_status_line_shows_what_is_known_only():
    assert status_line("cloud", AnswerFigures(), Link(up=False, detail="away")) == "cloud · link down"


def test_stats_before_any_answer():
    assert stats_lines(ChatFigures()) == ["no answers yet"]


# Saved chats

CHAT = Conversation("Be brief.", (Message("user", "Grüße 🦀?"), Message("assistant", "ja")))


def test_a_chat_comes_back_as_it_was_saved(tmp_path):
    chats = SavedChats(tmp_path / "chats")
    chats.save("mine", CHAT)
    assert chats.load("mine") == CHAT
    assert chats.names() == ["mine"]


def test_a_saved_chat_is_readable_by_the_user_alone(tmp_path):
    chats = SavedChats(tmp_path / "chats")
    for path in (chats.save("mine", CHAT), chats.typed_lines()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "chats").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", "x" * 65, "-rf", "a\0b"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(InvalidRequest, match="cannot name a chat"):
        SavedChats(tmp_path).save(name, CHAT)


def test_a_missing_chat_names_those_that_are_there(tmp_path):
    chats = SavedChats(tmp_path)
    with pytest.raises(InvalidRequest, match="saved: none"):
        chats.load("other")
    chats.save("mine", CHAT)
    with pytest.raises(InvalidRequest, match="no chat is saved as 'other'; saved: mine"):
        chats.load("other")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"\xff\xfe", id="no UTF-8"),
        pytest.param(json.dumps({"format": 2, "system": None, "messages": []}).encode(), id="a newer format"),
        pytest.param(
            json.dumps({"system": None, "messages": [{"role": "tool", "content": ""}]}).encode(),
            id="an unknown role",
        ),
        pytest.param(b'{"system": null, "messages": [], "more": 1}', id="an unknown field"),
    ],
)
def test_a_file_that_is_no_chat_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InvalidRequest, match="is no saved chat") as refused:
        SavedChats(tmp_path).load("bad")
    assert "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot save the chat"):
        SavedChats(tmp_path / "file").save("mine", CHAT)
