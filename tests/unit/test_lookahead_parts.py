"""Lookahead decoding without a model: the pool, the window, the tree that one pass evaluates."""

from __future__ import annotations

import pytest

from benchmarks.lookahead import NgramPool, TokenTree, Window


def test_the_pool_keeps_the_latest_ngrams_of_each_first_token():
    pool = NgramPool(size=2)
    for ngram in [(1, 2, 3), (1, 4, 5), (1, 6, 7), (9, 2, 3)]:
        pool.add(ngram)
    assert pool.after(1) == [(6, 7), (4, 5)]
    assert pool.after(9) == [(2, 3)]
    assert pool.after(2) == []


def test_an_ngram_that_comes_again_is_the_latest_and_is_held_once():
    pool = NgramPool(size=3)
    for ngram in [(1, 2, 3), (1, 4, 5), (1, 2, 3)]:
        pool.add(ngram)
    assert pool.after(1) == [(2, 3), (4, 5)]


def test_a_window_over_a_text_that_is_known_collects_the_texts_own_ngrams():
    """Where every guess is right, what each column completes is what stands in the text."""
    text = list(range(100, 130))
    window = Window([text[row : row + 4] for row in range(3)])
    for at in range(5):
        guesses = [text[at + column + 3] for column in range(4)]
        assert window.slide(text[at], guesses) == [
            tuple(text[at + column : at + column + 4]) for column in range(4)
        ]


def test_each_column_is_guessed_behind_the_first_row_up_to_it_and_its_own_other_rows():
    window = Window([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    assert window.paths() == [[20, 30], [11, 21, 31], [11, 12, 22, 32]]


def test_a_window_of_bigrams_has_one_row_and_its_first_column_nothing_behind_the_text():
    window = Window([[10, 11]])
    assert window.paths() == [[], [11]]
    assert window.slide(7, [20, 21]) == [(7, 20), (11, 21)]


def test_common_beginnings_are_evaluated_once():
    tree = TokenTree([5, 6])
    assert tree.add([1, 2, 3]) == [2, 3, 4]
    assert tree.add([1, 2, 4]) == [2, 3, 5]
    assert tree.add([9]) == [6]
    assert tree.token_ids == [5, 6, 1, 2, 3, 4, 9]
    assert tree.leaves() == [4, 5, 6]
    assert tree.way_to(5) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("next_token", "said", "last"),
    [
        pytest.param({0: 8, 1: 0, 2: 0, 3: 0}, [8], 0, id="no branch begins as the model goes on"),
        pytest.param({0: 1, 1: 2, 2: 7, 3: 0}, [1, 2, 7], 2, id="a branch that is right to its end"),
        pytest.param({0: 1, 1: 3, 2: 0, 3: 4}, [1, 3, 4], 3, id="the other branch of the same beginning"),
        pytest.param({0: 5, 1: 0, 2: 0, 3: 0}, [5], 0, id="a branch of the window alone is not followed"),
    ],
)
def test_what_the_model_says_itself_is_taken_from_the_tree(next_token, said, last):
    tree = TokenTree([7])
    tree.read.update([*tree.add([1, 2]), *tree.add([1, 3])])
    tree.add([5, 6])
    assert tree.greedy(next_token) == (said, last)
