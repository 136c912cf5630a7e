"""Across vocabularies by way of text: no byte is lost, and nothing becomes a special token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.drafting.base import Proposal, Source
from edge_agent.drafting.translated import TranslatedDrafter, Translation
from shared.byte_tokens import ByteTokenizer, valid_runs
from shared.sampling import Sampling
from shared.stopping import Never
from shared.vocab import TokenKind, Vocabulary

END = b"<|end|>"


def vocabulary(name: str, *merged: str, end: bytes = END) -> Vocabulary:
    """One special token, every byte, then merges in order of rank."""
    pieces = [end, *(bytes([i]) for i in range(256)), *(m.encode() for m in merged)]
    return Vocabulary(name, pieces, [TokenKind.SPECIAL, *[TokenKind.TEXT] * (len(pieces) - 1)])


EDGE = vocabulary("edge", "in", "ing", " t", "he", " the", "é", "👩", "好")
TARGET = vocabulary("target", "th", "the", " the", "ng", "ing", "<|", "|>", "你", "  ", "\r\n", "1")
AWKWARD = {
    "emoji of several characters": "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "combining marks": "e\u0301 Z͑ͫa̴l̡g̢o นี้",
    "code": "def f(x):\r\n\treturn {**x, 'the': \"\\x00\"}  # 1e-9\n",
    "chinese": "你好，世界。",
    "right to left": "שלום \u202eabc\u202c عربي",
    "what looks like a special token": "<|end|><|im_start|>the<|end|>",
    "blanks": " \u00a0\u2003\ufeff \t\n",
    "null": "a\0b",
}
ANY_BYTES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(str.encode),
    st.text(st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF), max_size=5).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    st.sampled_from(list(AWKWARD.values())).map(str.encode),
    st.builds(lambda text, n: text.encode()[n:], st.sampled_from(list(AWKWARD.values())), st.integers(0, 9)),
)


def translation(edge: Vocabulary = EDGE, target: Vocabulary = TARGET) -> Translation:
    own = ByteTokenizer(edge)
    return Translation(edge, target, lambda text: own.encode(text.encode()))


@given(ANY_BYTES)
def test_bytes_come_back_from_tokens(text):
    for tokens in map(ByteTokenizer, (EDGE, TARGET)):
        assert tokens.decode(tokens.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_awkward_text_comes_back_and_holds_no_special_token(text):
    for tokens in map(ByteTokenizer, (EDGE, TARGET)):
        ids = tokens.encode(text.encode())
        assert tokens.decode(ids).decode() == text
        assert 0 not in ids


@given(ANY_BYTES)
def test_runs_of_characters_and_other_bytes_make_up_the_whole(text):
    runs = valid_runs(text)
    assert b"".join(run.encode() if isinstance(run, str) else run for run in runs) == text


@given(ANY_BYTES, st.integers(0, 60))
def test_the_edge_reads_the_bytes_that_the_target_wrote_wherever_the_target_stands(text, cut):
    target_ids = ByteTokenizer(TARGET).encode(text)[:cut]
    edge_ids = translation().to_edge(target_ids)
    assert ByteTokenizer(EDGE).decode(edge_ids) == ByteTokenizer(TARGET).decode(target_ids)


@given(ANY_BYTES, st.integers(1, 20), st.booleans())
def test_a_translated_draft_is_a_prefix_of_what_the_edge_wrote(text, num_tokens, look_ahead):
    drafted = [Proposal(t, 0.5, Source.MODEL) for t in ByteTokenizer(EDGE).encode(text)]
    found = translation().to_target(drafted, num_tokens, look_ahead=look_ahead, ends={})
    back = ByteTokenizer(TARGET).decode([p.token_id for p in found])
    assert text.startswith(back)
    assert len(found) <= num_tokens
    if not look_ahead and len(found) < num_tokens:
        assert back == text, "nothing is lost that there was room for"


def test_merges_follow_their_rank():
    ids = ByteTokenizer(TARGET).encode(b" the thing")
    assert [TARGET.pieces[t] for t in ids] == [b" the", b" ", b"th", b"ing"]


def test_a_byte_that_no_token_holds_ends_the_text():
    few = Vocabulary("few", [b"a", b"b"], [TokenKind.TEXT] * 2)
    assert ByteTokenizer(few).encode(b"abxab") == [0, 1]


def test_padding_and_special_tokens_have_no_bytes():
    odd = Vocabulary("odd", [b"a", b"", b"<s>"], [TokenKind.TEXT, TokenKind.PADDING, TokenKind.SPECIAL])
    assert ByteTokenizer(odd).decode([2, 0, 1]) == b"a"


def edge_draft(*pieces: bytes, prob: float | None = 0.5) -> list[Proposal]:
    return [Proposal(EDGE.pieces.index(piece), prob, Source.MODEL) for piece in pieces]


def test_a_word_that_the_draft_may_have_cut_short_is_not_sent():
    drafted = edge_draft(b" the", b" t", b"he")
    whole = translation().to_target(drafted, 9, look_ahead=False, ends={})
    careful = translation().to_target(drafted, 9, look_ahead=True, ends={})
    assert [TARGET.pieces[p.token_id] for p in whole] == [b" the", b" the"]
    assert [TARGET.pieces[p.token_id] for p in careful] == [b" the"]


def test_a_token_has_the_joint_probability_of_what_begins_in_it():
    [proposal] = translation().to_target(edge_draft(b" t", b"he"), 1, look_ahead=False, ends={})
    assert proposal == Proposal(TARGET.pieces.index(b" the"), 0.25, Source.MODEL)
    [unknown] = translation().to_target(edge_draft(b"1", prob=None), 1, look_ahead=False, ends={})
    assert unknown.prob is None


def test_an_end_of_text_is_carried_over_only_behind_the_whole_text():
    drafted = edge_draft(b"1", b"1", END)
    ids = [p.token_id for p in translation().to_target(drafted, 3, look_ahead=False, ends={0: 0})]
    assert ids[-1] == 0
    assert len(ids) == 3
    assert len(translation().to_target(drafted, 2, look_ahead=False, ends={0: 0})) == 2
    assert 0 not in [p.token_id for p in translation().to_target(drafted, 9, look_ahead=False, ends={})]


def test_ends_of_text_go_by_name_or_to_the_only_one_there_is():
    other = vocabulary("other", end=b"</s>")
    assert translation().ends({0}, {0, 5}) == {0: 0}
    assert translation(target=other).ends({0}, {0}) == {0: 0}
    assert translation(target=other).ends({0}, {0, 5}) == {}


class RecordingDrafter:
    """A fake: drafts one text, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    async def propose(self, text_ids, num_tokens, **rest) -> list[Proposal]:
        self.asked.append({"text_ids": text_ids, "num_tokens": num_tokens, **rest})
        return edge_draft(b"1", b"1", b"1")[:num_tokens]


async def test_the_edge_drafts_its_likeliest_tokens_after_its_own_prompt_and_the_answer_so_far():
    inner = RecordingDrafter()
    drafter = TranslatedDrafter(
        inner, translation(), edge_prompt_ids=[7, 8], edge_end_token_ids={0}, num_prompt_tokens=3
    )
    answer = ByteTokenizer(TARGET).encode("the 好".encode())
    found = await drafter.propose(
        [1, 2, 3, *answer],
        2,
        sampling=Sampling(temperature=1.0),
        seed=5,
        start=4,
        end_token_ids={0},
        stop=Never(),
    )
    [asked] = inner.asked
    assert asked["text_ids"] == [7, 8, *ByteTokenizer(EDGE).encode("the 好".encode())]
    assert asked["num_tokens"] == 3, "one more shows where the last word ends"
    assert asked["sampling"].greedy
    assert [TARGET.pieces[p.token_id] for p in found] == [b"1", b"1"]
    assert (
        await drafter.propose(
            [1, 2, 3], 0, sampling=Sampling(), seed=0, start=0, end_token_ids={0}, stop=Never()
        )
        == []
    )
