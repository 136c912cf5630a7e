"""Drafts without a model: what is copied from the text and from documents, and when copies are preferred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.drafting.base import Proposal, Source
from edge_agent.drafting.combined import MIN_TRUST, CombinedDrafter, Trust
from edge_agent.drafting.copying import NOTHING, Copy, cut
from edge_agent.drafting.lookup import LookupCopier
from edge_agent.drafting.retrieval import DEPTH, MIN_MATCH, SuffixIndex
from shared.sampling import Sampling
from shared.stopping import Never

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def slow_lookup(text: Sequence[int], num_tokens: int, min_ngram: int, max_ngram: int) -> tuple[int, ...]:
    """What `LookupCopier` must find, by trying everything."""
    for size in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                copied = list(text)
                for i in range(num_tokens):
                    copied.append(copied[end + i])
                return tuple(copied[len(text) :])
    return ()


@given(texts=st.lists(TOKENS, min_size=1, max_size=6), num_tokens=st.integers(1, 9))
def test_lookup_copies_what_followed_the_longest_latest_match_whatever_texts_it_saw_before(texts, num_tokens):
    copier = LookupCopier(min_ngram=2, max_ngram=4)
    for text in texts:  # each may cut the one before back anywhere
        assert copier.copy(text, num_tokens).token_ids == slow_lookup(text, num_tokens, 2, 4)


def test_a_lookup_match_is_measured_beyond_the_longest_ngram_that_is_sought():
    text = [*range(10), 99, *range(10)]
    assert LookupCopier(max_ngram=3).copy(text, 1) == Copy((99,), 10)


def test_lookup_works_only_on_tokens_that_are_new():
    copier = LookupCopier()
    text = [i % 50 for i in range(2000)]
    copier.copy(text, 4)
    appended = []
    copier._append = appended.append  # type: ignore[method-assign]
    copier._follow([*text, 1, 2])
    assert appended == [1, 2]


@pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3)])
def test_ngrams_that_do_not_exist_are_refused(least, most):
    with pytest.raises(ValueError, match="do not exist"):
        LookupCopier(min_ngram=least, max_ngram=most)


def longest_match(documents: list[list[int]], text: list[int]) -> int:
    found = [
        size
        for size in range(MIN_MATCH, min(DEPTH, len(text)) + 1)
        for document in documents
        for begin in range(len(document) - size + 1)
        if document[begin : begin + size] == text[-size:]
    ]
    return max(found, default=0)


@given(documents=st.lists(TOKENS, max_size=5), text=TOKENS)
def test_retrieval_goes_on_as_some_document_does_after_the_longest_end_of_the_text(documents, text):
    found = SuffixIndex(documents).copy(text, 4)
    longest = longest_match(documents, text)
    if found == NOTHING:
        # A match at a document's very end has nothing to go on with.
        assert (
            all(
                document[begin : begin + longest] != text[-longest:]
                for document in documents
                for begin in range(len(document) - longest)
            )
            or longest == 0
        )
        return
    assert found.match_length == longest
    wanted = [*text[-longest:], *found.token_ids]
    assert any(
        document[begin : begin + len(wanted)] == wanted
        for document in documents
        for begin in range(len(document))
    )


def test_retrieval_takes_the_most_frequent_continuation():
    index = SuffixIndex([[1, 2, 7, 7], [1, 2, 8, 9], [5, 1, 2, 8, 6], [1, 2, 8, 9]])
    assert index.copy([0, 1, 2], 2) == Copy((8, 9), 2)


def test_a_context_that_stands_very_often_is_judged_by_a_sample_of_all_its_places():
    many = [[1, 2, 3]] * 100 + [[1, 2, 9]] * 900
    assert SuffixIndex(many).copy([1, 2], 1) == Copy((9,), 2)


def test_nothing_is_copied_from_one_document_into_the_next():
    assert SuffixIndex([[1, 2], [3, 4]]).copy([1, 2], 4) == NOTHING
    assert SuffixIndex([[1, 2], [3, 4]]).copy([2, 3], 4) == NOTHING


def test_an_empty_store_copies_nothing():
    assert SuffixIndex([]).copy([1, 2, 3], 4) == NOTHING
    assert len(SuffixIndex([])) == 0


def test_a_copy_ends_with_an_end_of_text_and_before_what_the_target_lacks():
    assert cut([1, 2, 3], end_token_ids={2}, masked_ids={3}) == (1, 2)
    assert cut([1, 3, 2], end_token_ids={2}, masked_ids={3}) == (1,)


# The combination


class FixedCopier:
    """A fake: finds the same copy every time."""

    def __init__(self, found: Copy) -> None:
        self.found = found

    def copy(self, text_ids: Sequence[int], num_tokens: int) -> Copy:
        return self.found


class FixedModel:
    """A fake: drafts the same token over and over."""

    async def propose(self, text_ids, num_tokens, **_) -> list[Proposal]:
        return [Proposal(77, 0.5, Source.MODEL)] * num_tokens


async def propose(drafter: CombinedDrafter, start: int = 0, num_tokens: int = 3) -> list[Proposal]:
    return await drafter.propose(
        [1], num_tokens, sampling=Sampling(), seed=0, start=start, end_token_ids={9}, stop=Never()
    )


def copying(match_length: int, *, model: bool = True, trust: Trust | None = None) -> CombinedDrafter:
    copiers = [(Source.LOOKUP, FixedCopier(Copy((4, 5, 6), match_length)))]
    return CombinedDrafter(copiers, FixedModel() if model else None, trust=trust)


async def test_a_long_match_is_copied_and_no_model_is_asked():
    assert await propose(copying(5)) == [Proposal(t, None, Source.LOOKUP) for t in (4, 5, 6)]


async def test_a_short_match_leaves_the_draft_to_the_model():
    assert {p.source for p in await propose(copying(2))} == {Source.MODEL}


async def test_without_a_model_any_match_is_copied_and_no_match_proposes_nothing():
    assert {p.source for p in await propose(copying(2, model=False))} == {Source.LOOKUP}
    assert await propose(CombinedDrafter([(Source.LOOKUP, FixedCopier(NOTHING))], None)) == []


async def test_copies_that_were_rejected_lately_are_left_to_the_model_and_come_back_when_they_hit():
    drafter = copying(4)
    for position in range(4):
        await propose(drafter, start=position)
        drafter.verified(position, [8])
    assert {p.source for p in await propose(drafter)} == {Source.MODEL}
    trust = Trust()
    for _ in range(10):
        trust.learn(Source.LOOKUP, 2, True)
    assert {p.source for p in await propose(copying(2, trust=trust))} == {Source.LOOKUP}


async def test_the_most_trusted_copy_wins_and_the_first_of_equals():
    short, long = FixedCopier(Copy((1,), 3)), FixedCopier(Copy((2,), 4))
    copiers = [(Source.LOOKUP, short), (Source.RETRIEVAL, long)]
    assert [p.token_id for p in await propose(CombinedDrafter(copiers, None))] == [2]
    copiers = [(Source.LOOKUP, long), (Source.RETRIEVAL, FixedCopier(Copy((3,), 4)))]
    assert [p.token_id for p in await propose(CombinedDrafter(copiers, None))] == [2]


async def test_who_proposed_each_committed_token_is_known():
    drafter = copying(5)
    await propose(drafter, start=10)
    assert drafter.verified(10, [4, 5, 8]) == [Source.LOOKUP, Source.LOOKUP, None]
    assert drafter.verified(13, [6]) == [None]


async def test_drafts_in_flight_behind_a_rejection_teach_nothing():
    trust = Trust()
    drafter = copying(5, trust=trust)
    await propose(drafter, start=0)
    await propose(drafter, start=3)
    drafter.verified(0, [8])
    expected = trust.expects(Source.LOOKUP, 5)
    assert drafter.verified(1, [5, 6, 4, 5]) == [None] * 4
    assert trust.expects(Source.LOOKUP, 5) == expected


@given(st.lists(st.booleans()), st.integers(1, 40))
def test_trust_is_a_probability(outcomes, length):
    trust = Trust()
    for outcome in outcomes:
        trust.learn(Source.RETRIEVAL, length, outcome)
    assert 0.0 <= trust.expects(Source.RETRIEVAL, length) <= 1.0


def test_trust_follows_what_is_seen():
    good, bad = Trust(), Trust()
    for _ in range(50):
        good.learn(Source.LOOKUP, 1, True)
        bad.learn(Source.LOOKUP, 30, False)
    assert good.expects(Source.LOOKUP, 1) > 0.8 > MIN_TRUST
    assert bad.expects(Source.LOOKUP, 30) < 0.2 < MIN_TRUST
    assert np.isclose(bad.expects(Source.RETRIEVAL, 30), 0.9), "sources are judged apart"
