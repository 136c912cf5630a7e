"""From token bytes to text that may be shown."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text import TextStream


def shown(pieces, stop=()) -> tuple[list[str], bool]:
    """What each piece sets free, then what the end does; and whether a stop string was met."""
    stream: TextStream[int] = TextStream(stop)
    runs = [stream.feed(piece, tag) for tag, piece in enumerate(pieces)] + [stream.finish()]
    return ["".join(text for text, _ in run) for run in runs], stream.stopped


def split(data: bytes, borders) -> list[bytes]:
    cuts = [0, *sorted(min(border, len(data)) for border in borders), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(cuts)]


code_points = st.integers(0, 0xD7FF) | st.integers(0xE000, 0x10FFFF)
texts = st.lists(code_points.map(chr), max_size=30).map("".join) | st.sampled_from(
    ["naïve café", "你好，世界", "👩‍👩‍👧 and 🇨🇭", "e\u0301 o\u0308\u0323", "\u0000\ufffd"]
)
borders = st.lists(st.integers(0, 120), max_size=20)


@given(texts, borders)
def test_any_text_comes_out_whole_however_its_bytes_are_split(text, cuts):
    parts, stopped = shown(split(text.encode(), cuts))
    assert "".join(parts) == text
    assert not stopped


@pytest.mark.parametrize("text", ["é", "你", "👍", "o\u0308"])
def test_a_character_is_shown_when_its_last_byte_comes_and_no_sooner(text):
    *early, last = text[-1].encode()
    parts, _ = shown([text[:-1].encode(), *(bytes([byte]) for byte in early), bytes([last])])
    assert parts == [text[:-1], *[""] * len(early), text[-1], ""]


def test_a_character_that_never_ends_becomes_a_replacement_character():
    assert shown(["你".encode()[:2]]) == (["", "\ufffd"], False)


def test_bytes_that_are_no_text_become_replacement_characters():
    assert shown([b"a\xffb"]) == (["a\ufffdb", ""], False)


def test_no_tokens_are_no_text():
    assert shown([]) == ([""], False)


@pytest.mark.parametrize(
    ("pieces", "stop", "parts", "stopped"),
    [
        pytest.param([b"one", b" END two"], ["END"], ["one", " ", ""], True, id="inside a token"),
        pytest.param(
            [b"one E", b"N", b"D two"], ["END"], ["one ", "", "", ""], True, id="over token borders"
        ),
        pytest.param([b"END"], ["END"], ["", ""], True, id="at the very start"),
        pytest.param(
            [b"one E", b"NOUGH"], ["END"], ["one ", "ENOUGH", ""], False, id="begun and not completed"
        ),
        pytest.param(
            [b"one E", b"N"], ["END"], ["one ", "", "EN"], False, id="cut off by the end of the text"
        ),
        pytest.param([b"aa", b"ab"], ["aab"], ["", "a", ""], True, id="begun anew inside its own beginning"),
        pytest.param([b"x\n", b"\n"], ["\n\n"], ["x", "", ""], True, id="an empty line"),
        pytest.param(
            ["你".encode()[:1], "你".encode()[1:]], ["你"], ["", "", ""], True, id="split in a character"
        ),
        pytest.param([b"1 B A"], ["A", "B"], ["1 ", ""], True, id="the earliest in the text wins"),
        pytest.param([b"abcd"], ["abcd", "bc"], ["a", ""], True, id="the first to be complete wins"),
        pytest.param([b"xab"], ["b", "ab"], ["x", ""], True, id="of two that end together the longer wins"),
        pytest.param([b"END", b"more", b"END"], ["END"], ["", "", "", ""], True, id="nothing follows it"),
        pytest.param([b"one"], [], ["one", ""], False, id="none is asked for"),
    ],
)
def test_the_text_ends_before_a_stop_string(pieces, stop, parts, stopped):
    assert shown(pieces, stop) == (parts, stopped)


abc = st.text("abc", min_size=1, max_size=4)


@given(st.text("abc", max_size=20), borders, st.lists(abc, max_size=3))
def test_where_the_text_ends_does_not_depend_on_how_it_is_split(text, cuts, stop):
    parts, stopped = shown(split(text.encode(), cuts), stop)
    answer = "".join(parts)
    assert text.startswith(answer)
    assert not any(word in answer for word in stop)
    assert stopped == any(word in text for word in stop)
    assert stopped or answer == text
    whole, _ = shown([text.encode()], stop)
    assert answer == "".join(whole)


@given(st.text("abc", max_size=20), borders, st.lists(abc, min_size=1, max_size=3))
def test_only_a_suffix_that_could_become_a_stop_string_is_held_back(text, cuts, stop):
    stream: TextStream[None] = TextStream(stop)
    seen = out = ""
    for piece in split(text.encode(), cuts):
        seen += piece.decode()
        out += "".join(part for part, _ in stream.feed(piece, None))
        if stream.stopped:
            return
        held = seen.removeprefix(out)
        assert held == "" or any(word.startswith(held) for word in stop)


def test_each_character_carries_the_tag_of_the_piece_that_completed_it():
    stream: TextStream[str] = TextStream()
    first, rest = b"a" + "é".encode()[:1], "é".encode()[1:] + b"b"
    assert stream.feed(first, "draft") == [("a", "draft")]
    assert stream.feed(rest, "target") == [("éb", "target")]


def test_text_that_was_held_back_keeps_its_own_tags():
    stream: TextStream[str] = TextStream(["END"])
    assert stream.feed(b"E", "draft") == []
    assert stream.feed(b"N", "draft") == []
    assert stream.feed(b"O", "target") == [("EN", "draft"), ("O", "target")]


def test_the_end_shows_what_was_held_back_with_its_tags():
    stream: TextStream[str] = TextStream(["END"])
    stream.feed(b"E", "draft")
    stream.feed(b"N", "target")
    assert stream.finish() == [("E", "draft"), ("N", "target")]


@pytest.mark.parametrize(
    ("shown_pieces", "pieces", "stop", "preview"),
    [
        pytest.param([b"a"], [b"b", b"c"], (), "bc", id="what drafts would add"),
        pytest.param([b"a"], [], (), "", id="nothing where nothing is pending"),
        pytest.param(["é".encode()[:1]], ["é".encode()[1:], b"x"], (), "éx", id="a character half committed"),
        pytest.param([b"a"], ["é".encode()[:1]], (), "", id="whole characters only"),
        pytest.param([b"aST"], [b"x"], ("STOP",), "STx", id="what a stop string holds back comes first"),
        pytest.param([b"aST"], [b"OPx"], ("STOP",), "", id="nothing past a stop string"),
        pytest.param([b"a"], [b"bSTO", b"Pc"], ("STOP",), "b", id="nothing past a stop string of drafts"),
        pytest.param([b"aSTOP"], [b"b"], ("STOP",), "", id="nothing once stopped"),
    ],
)
def test_a_preview_is_what_would_follow(shown_pieces, pieces, stop, preview):
    stream: TextStream[int] = TextStream(stop)
    for tag, piece in enumerate(shown_pieces):
        stream.feed(piece, tag)
    assert stream.preview(pieces) == preview


@given(texts, borders, borders)
def test_a_preview_changes_nothing_and_comes_true(text, cuts, drafted):
    whole, previews = "", []
    stream: TextStream[int] = TextStream()
    for piece in split(text.encode(), cuts):
        previews.append(whole + stream.preview(split(piece, drafted)))
        whole += "".join(run for run, _ in stream.feed(piece, 0))
        assert previews[-1] == whole
