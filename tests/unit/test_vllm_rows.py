"""Rows out of vLLM's answers: read from the end, checked for being there, padding and ties put right."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cloud_service.targets.vllm_rows import (
    KnownRows,
    asked_width,
    best_rows,
    join,
    last_rows,
    logprobs_of,
    num_prompt_rows,
    own_logprobs,
)
from shared.sampling import Rows

NO_PADDING = np.zeros(100, bool)


@dataclass
class Flat:
    """`vllm.logprobs.FlatLogprobs` as vLLM fills it."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, *entries: tuple[int, float]) -> Flat:
        """A position: the text's own token, then the likeliest."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids += [token for token, _ in entries]
        self.logprobs += [logprob for _, logprob in entries]
        self.end_indices.append(len(self.token_ids))
        return self


def rows(*token_ids: list[int]) -> Rows:
    ids = np.array(token_ids)
    return Rows(ids, -1.0 - np.arange(ids.shape[1]) + 0.0 * ids)


# What is asked


@pytest.mark.parametrize(("width", "asked"), [(1, 5), (4, 8), (64, 80)])
def test_more_is_asked_than_needed_so_that_padding_and_equal_ones_can_be_put_right(width, asked):
    assert asked_width(width, vocab_size=1000) == asked


def test_no_more_is_asked_than_there_are_tokens():
    assert asked_width(64, vocab_size=70) == 70


# What is there


@pytest.mark.parametrize(
    ("num_positions", "num_cached", "there"),
    [
        pytest.param(40, 0, 39, id="nothing cached: all but the first token's"),
        pytest.param(40, 32, 7, id="V1 runner: rows of all positions, garbage where they are cached"),
        pytest.param(8, 32, 7, id="V2 runner: rows of the computed tail only"),
        pytest.param(5, 32, 4, id="rows that were lost on the way do not count"),
        pytest.param(40, 39, 0, id="all but the last token cached"),
    ],
)
def test_rows_of_cached_positions_do_not_count(num_positions, num_cached, there):
    assert num_prompt_rows(num_positions, 40, num_cached) == there


# How it is read


def test_rows_are_read_from_the_end_without_the_texts_own_token():
    flat = Flat().add().add((9, -9.0), (1, -0.1), (2, -2.0)).add((3, -0.2), (3, -0.2), (4, -3.0))
    ids, logprobs = last_rows(flat, 2)
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert logprobs.tolist() == [[-0.1, -2.0], [-0.2, -3.0]]


def test_garbage_before_the_end_is_never_looked_at():
    flat = Flat().add().add((-7, float("nan")), (2**40, 1e9)).add((1, -1.0), (2, -0.5))
    assert last_rows(flat, 1)[0].tolist() == [[2]]


def test_equal_ones_go_by_id_and_padding_goes_last():
    padding = NO_PADDING.copy()
    padding[5] = True
    best = best_rows(np.array([[5, 8, 3, 4]]), np.array([[-0.1, -1.0, -1.0, -2.0]]), width=4, padding=padding)
    assert best.token_ids.tolist() == [[3, 8, 4, 5]]
    assert best.logprobs.tolist() == [[-1.0, -1.0, -2.0, -np.inf]]


def test_rows_are_cut_to_their_width():
    best = best_rows(np.array([[2, 1, 3]]), np.array([[-1.0, -2.0, -3.0]]), width=2, padding=NO_PADDING)
    assert best.token_ids.tolist() == [[2, 1]]


@pytest.mark.parametrize(
    "logprobs",
    [pytest.param([np.nan, -1.0], id="a NaN"), pytest.param([-np.inf, -np.inf], id="nothing possible")],
)
def test_what_is_no_distribution_is_refused(logprobs):
    with pytest.raises(ValueError, match="the model"):
        best_rows(np.array([[1, 2]]), np.array([logprobs]), width=1, padding=NO_PADDING)


# How likely a draft is


def test_the_texts_own_token_comes_first_in_each_position():
    flat = Flat().add().add((9, -9.0), (1, -0.1), (2, -2.0)).add((3, -0.2), (3, -0.2), (4, -3.0))
    assert own_logprobs(flat, 2).tolist() == [-9.0, -0.2]


def test_an_own_token_of_no_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        own_logprobs(Flat().add().add((9, np.nan), (1, -0.1)), 1)


def test_draft_tokens_outside_their_rows_are_known_from_the_text():
    found = logprobs_of([7, 8], rows([10, 11], [20, 21], [30, 31]), own=np.array([-5.0, -6.0]))
    assert found.tolist() == [-5.0, -6.0]


@pytest.mark.parametrize(
    ("token", "logprob"),
    [
        pytest.param(21, -2.0, id="in the row"),
        pytest.param(7, -np.inf, id="outside the row, so that no threshold lets it stand"),
    ],
)
def test_a_last_draft_token_that_no_text_holds_is_looked_for_in_its_row(token, logprob):
    found = logprobs_of([9, token], rows([10, 11], [20, 21]), own=np.array([-5.0]))
    assert found.tolist() == [-5.0, logprob]


def test_a_first_draft_token_is_looked_for_in_the_row_of_the_round_before():
    found = logprobs_of([11, 8], rows([10, 11], [20, 21], [30, 31]), own=np.array([-6.0]))
    assert found.tolist() == [-2.0, -6.0]


def test_an_empty_draft_has_no_probabilities():
    assert logprobs_of([], rows([10]), own=np.empty(0)).tolist() == []


# What a stream still knows


def test_the_last_row_of_a_round_is_the_first_of_the_next():
    known = KnownRows()
    known.remember([1, 2, 3], rows([10, 11], [20, 21]))  # they follow 2 and 3
    found = known.leading([1, 2, 3, 4, 5], num_rows=3, count=1)  # they follow 3, 4 and 5
    assert found is not None
    assert found.token_ids.tolist() == [[20, 21]]


@pytest.mark.parametrize(
    ("text", "num_rows", "count"),
    [
        pytest.param([1, 2, 9, 4, 5], 3, 1, id="the text is another one"),
        pytest.param([1, 2, 3, 4, 5], 3, 2, id="more rows are missing than are known"),
        pytest.param([1, 2, 3, 4], 4, 1, id="the missing row is older"),
    ],
)
def test_rows_of_another_place_are_not_taken(text, num_rows, count):
    known = KnownRows()
    assert known.leading(text, num_rows, count) is None
    known.remember([1, 2, 3], rows([10], [20]))
    assert known.leading(text, num_rows, count) is None


def test_rows_are_joined_in_order():
    assert join(rows([1]), rows([2], [3])).token_ids.tolist() == [[1], [2], [3]]
