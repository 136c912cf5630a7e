"""Which pairs of models may speculate together, and which tokens the edge keeps to itself."""

from __future__ import annotations

import hashlib

import pytest

from shared.errors import VocabularyMismatch
from shared.vocab import TokenKind, Vocabulary, ids_to_mask

TEXT, SPECIAL, PADDING = TokenKind.TEXT, TokenKind.SPECIAL, TokenKind.PADDING
FAMILY = [(b"a", TEXT), (b"b", TEXT), (b"<end>", SPECIAL)]


def vocabulary(*tokens, name="m") -> Vocabulary:
    return Vocabulary(name, [piece for piece, _ in tokens], [kind for _, kind in tokens])


def padding(count, piece=b"") -> list:
    return [(piece, PADDING)] * count


@pytest.mark.parametrize(
    ("edge", "target"),
    [
        pytest.param(FAMILY, FAMILY, id="equal tables"),
        pytest.param([*FAMILY, *padding(2)], [*FAMILY, *padding(5)], id="a target padded further"),
        pytest.param([*FAMILY, *padding(5)], FAMILY, id="an edge padded further"),
        pytest.param(
            [*FAMILY, *padding(1, b"[PAD3]")],
            [*FAMILY, *padding(1, b"<unused>")],
            id="padding by other names",
        ),
    ],
)
def test_models_of_one_family_share_a_vocabulary_whatever_their_padding(edge, target):
    assert vocabulary(*edge).sha256 == vocabulary(*target).sha256
    assert ids_to_mask(vocabulary(*edge), vocabulary(*target)) == frozenset()


@pytest.mark.parametrize(
    ("edge", "target", "masked"),
    [
        pytest.param(
            [*FAMILY, (b"<tool>", SPECIAL)], FAMILY, {3}, id="a special token past the target's end"
        ),
        pytest.param(
            [*FAMILY, (b"<tool>", SPECIAL)], [*FAMILY, *padding(1)], {3}, id="a special token in the padding"
        ),
        pytest.param(
            [*FAMILY, (b"<tool>", SPECIAL)],
            [*FAMILY, (b"<think>", SPECIAL)],
            {3},
            id="special tokens of other names",
        ),
        pytest.param(
            [*FAMILY, (b"c", SPECIAL)],
            [*FAMILY, (b"c", TEXT)],
            {3},
            id="special at the edge, text at the target",
        ),
        pytest.param(
            FAMILY, [*FAMILY, (b"<tool>", SPECIAL)], set(), id="a special token of the target's own"
        ),
        pytest.param(FAMILY, [*FAMILY, (b"c", TEXT)], set(), id="a text token of the target's own"),
        pytest.param(
            [*FAMILY, *padding(1)], [*FAMILY, (b"c", TEXT)], set(), id="padding where the target has text"
        ),
    ],
)
def test_the_edge_masks_exactly_its_own_special_tokens(edge, target, masked):
    assert ids_to_mask(vocabulary(*edge), vocabulary(*target)) == masked


@pytest.mark.parametrize(
    "target",
    [
        pytest.param([(b"a", TEXT), (b"x", TEXT), (b"<end>", SPECIAL)], id="other bytes"),
        pytest.param([(b"a", TEXT), (b"", PADDING), (b"<end>", SPECIAL)], id="padding"),
        pytest.param([(b"a", TEXT), (b"b", SPECIAL), (b"<end>", SPECIAL)], id="a special token"),
        pytest.param([(b"a", TEXT)], id="nothing"),
    ],
)
def test_a_text_token_that_means_something_else_is_refused_by_name(target):
    with pytest.raises(VocabularyMismatch) as caught:
        ids_to_mask(vocabulary(*FAMILY, name="small"), vocabulary(*target, name="large"))
    message = str(caught.value)
    assert "small and large" in message
    assert "token 1 is b'b'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([(b"a", TEXT), (b"x", TEXT), (b"<end>", SPECIAL)], id="bytes"),
        pytest.param([(b"b", TEXT), (b"a", TEXT), (b"<end>", SPECIAL)], id="order"),
        pytest.param([(b"a", TEXT), (b"b", TEXT), (b"<end>", TEXT)], id="kind"),
        pytest.param([(b"ab", TEXT), (b"", TEXT), (b"<end>", SPECIAL)], id="where one token ends"),
        pytest.param([*padding(1), *FAMILY], id="ids"),
    ],
)
def test_the_fingerprint_depends_on(other):
    assert vocabulary(*other).sha256 != vocabulary(*FAMILY).sha256


def test_the_fingerprint_is_the_one_that_the_protocol_page_describes():
    entry = bytes.fromhex("050000000101000000") + b"a"
    assert vocabulary(*padding(5), (b"a", TEXT)).sha256 == hashlib.sha256(entry).hexdigest()


def test_the_fingerprint_does_not_depend_on_the_name():
    assert vocabulary(*FAMILY, name="x").sha256 == vocabulary(*FAMILY, name="y").sha256


def test_padding_is_not_legal_and_all_else_is():
    assert vocabulary(*padding(1), *FAMILY, *padding(2)).legal_ids == {1, 2, 3}
