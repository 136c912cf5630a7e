"""One answer at a terminal: what is solid, what is dim, what flashes, and what scrolls away."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text as RichText

from edge_agent.chat.display import (
    DRAFT_STYLE,
    FLASH_S,
    FLASH_STYLE,
    AnswerDisplay,
    line_starts,
    printable,
)

WIDTH, HEIGHT = 20, 10


def styled(lines: list[RichText], style: str) -> str:
    """The text that has this style, lines joined."""
    return "".join(
        line.plain[span.start : span.end] for line in lines for span in line.spans if span.style == style
    )


def plain(lines: list[RichText]) -> list[str]:
    return [line.plain for line in lines]


def test_a_draft_is_dim_behind_the_solid_text():
    display = AnswerDisplay()
    display.commit("The sky ", 0.0)
    display.propose("is green")
    lines = display.live(WIDTH, HEIGHT, 0.0)
    assert plain(lines) == ["The sky is green"]
    assert styled(lines, DRAFT_STYLE) == "is green"


def test_a_confirmed_draft_turns_solid_in_place():
    display = AnswerDisplay()
    display.propose("The sky is")
    display.commit("The sky", 0.0)
    lines = display.live(WIDTH, HEIGHT, 0.0)
    assert plain(lines) == ["The sky is"]
    assert styled(lines, DRAFT_STYLE) == " is"


def test_a_draft_that_was_wrong_is_gone():
    display = AnswerDisplay()
    display.propose("The sky is green")
    display.commit("The sea", 0.0)
    assert plain(display.live(WIDTH, HEIGHT, 0.0)) == ["The sea"]


def test_the_whole_corrected_word_flashes_and_then_no_more():
    display = AnswerDisplay()
    display.commit("num", 0.0)
    display.commit("ber", 1.0, correction=True)
    display.commit("s are", 1.1)
    assert styled(display.live(WIDTH, HEIGHT, 1.1), FLASH_STYLE) == "numbers"
    assert display.is_flashing(1.0 + FLASH_S / 2)
    assert not display.is_flashing(1.0 + FLASH_S)
    assert styled(display.live(WIDTH, HEIGHT, 1.0 + FLASH_S), FLASH_STYLE) == ""


def test_a_correction_to_white_space_has_no_word_to_flash():
    display = AnswerDisplay()
    display.commit(" \n", 0.0, correction=True)
    assert not display.is_flashing(0.0)


def test_a_line_is_handed_out_once_and_the_one_being_written_is_kept():
    display = AnswerDisplay()
    display.commit("first\nsecond\nthi", 0.0)
    assert plain(display.settle(WIDTH, 0.0)) == ["first", "second"]
    assert plain(display.settle(WIDTH, 0.0)) == []
    display.commit("rd", 0.0)
    assert plain(display.live(WIDTH, HEIGHT, 0.0)) == ["third"]
    assert plain(display.finish(WIDTH)) == ["third"]


def test_a_line_that_flashes_stays_until_it_does_not():
    display = AnswerDisplay()
    display.commit("one\ntwo\n", 0.0)
    display.commit("three", 0.0, correction=True)
    display.commit("\nfour", 0.0)
    assert plain(display.settle(WIDTH, 0.1)) == ["one", "two"]
    assert styled(display.live(WIDTH, HEIGHT, 0.1), FLASH_STYLE) == "three"
    assert plain(display.settle(WIDTH, FLASH_S)) == ["three"]


def test_what_was_never_confirmed_is_not_left_behind():
    display = AnswerDisplay()
    display.commit("yes", 0.0)
    display.propose(" and no")
    assert plain(display.finish(WIDTH)) == ["yes"]


def test_a_live_part_taller_than_the_terminal_shows_its_end():
    display = AnswerDisplay()
    display.propose("\n".join("abcdef"))
    assert plain(display.live(WIDTH, 2, 0.0)) == ["e", "f"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        pytest.param("", 5, [""], id="nothing is one empty line"),
        pytest.param("one two", 7, ["one two"], id="what fits stays together"),
        pytest.param("one two", 6, ["one ", "two"], id="a word that does not fit moves down"),
        pytest.param("abcdef", 4, ["abcd", "ef"], id="a word longer than the line is cut"),
        pytest.param("one  two", 3, ["one  ", "two"], id="spaces hang over the end of a line"),
        pytest.param("a\n\nb", 5, ["a\n", "\n", "b"], id="newlines begin lines"),
        pytest.param("世界", 3, ["世", "界"], id="wide characters take two cells"),
    ],
)
def test_lines_break_before_words(text, width, lines):
    starts = line_starts(text, width)
    assert [text[a:b] for a, b in pairwise([*starts, len(text)])] == lines


TEXTS = st.text(alphabet="ab 世\n", max_size=60)


@given(TEXTS, st.integers(2, 12))
def test_no_line_is_wider_than_the_terminal(text, width):
    starts = line_starts(text, width)
    for a, b in pairwise([*starts, len(text)]):
        assert cell_len(text[a:b].rstrip("\n ")) <= width


@given(st.lists(TEXTS, max_size=8), st.integers(2, 12))
def test_what_scrolls_away_and_what_is_left_are_the_whole_text(pieces, width):
    display = AnswerDisplay()
    shown = []
    for now, piece in enumerate(pieces):
        display.commit(piece, float(now), correction=now % 2 == 0)
        shown += plain(display.settle(width, float(now)))
    shown += plain(display.finish(width))
    assert "".join("".join(shown).split()) == "".join("".join(pieces).split())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("\x1b[2Jgone", "\N{REPLACEMENT CHARACTER}[2Jgone", id="an escape sequence"),
        pytest.param("a\rb\x08\x07", "a\ufffdb\ufffd\ufffd", id="carriage return, backspace, bell"),
        pytest.param("\x9b31m", "\ufffd31m", id="the one-byte form of an escape"),
        pytest.param("a\tb\n", "a    b\n", id="a tab becomes spaces, a newline stays"),
    ],
)
def test_a_model_cannot_command_the_terminal(text, shown):
    assert printable(text) == shown
