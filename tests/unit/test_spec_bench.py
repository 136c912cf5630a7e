"""The table of drafting methods: its rounds and its figures, from texts that are written here."""

from __future__ import annotations

import pytest

from benchmarks.spec_bench import (
    Method,
    Round,
    Text,
    Times,
    combined_rounds,
    copied_rounds,
    model_rounds,
    other_answers,
    row_of,
)
from edge_agent.drafting.combined import Trust
from edge_agent.drafting.lookup import LookupCopier

TIMES = Times(verify={1: 0.010, 7: 0.016}, passes={}, copies={})


def text(*token_ids: int, prompt: tuple[int, ...] = ()) -> Text:
    return Text("t", "qa", list(prompt), list(token_ids))


@pytest.mark.parametrize(
    ("agrees", "rounds"),
    [
        pytest.param([1, 1, 1], [Round(2, 2, 2)], id="the target's own token closes the last round"),
        pytest.param([1, 1, 1, 1], [Round(3, 3, 3)], id="a whole draft and a bonus"),
        pytest.param([0, 1, 1], [Round(2, 0, 2), Round(1, 1, 1)], id="a correction, then from behind it"),
        pytest.param([1], [Round(0, 0, 0)], id="one token needs no draft"),
        pytest.param([1, 1, 1, 1, 0], [Round(3, 3, 3), Round(0, 0, 0)], id="the bonus is the target's"),
    ],
)
def test_rounds_of_a_model_that_reads_along(agrees, rounds):
    assert model_rounds(text(*range(len(agrees))), agrees, draft_tokens=3) == rounds


def test_lookup_drafts_from_the_prompt_as_the_text_grows():
    repeats = text(3, 4, 5, 9, prompt=(1, 2, 3, 4, 5, 6, 1, 2))
    assert copied_rounds(repeats, LookupCopier(), draft_tokens=6) == [Round(3, 3, 0)]


def test_copies_come_before_the_model_where_a_long_match_is_trusted():
    repeats = text(5, 6, 7, 20, 21, prompt=(1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3, 4))
    # The model would have known 20 and 21 only; the copy goes wrong behind 7.
    rounds = combined_rounds(repeats, [0, 0, 0, 1, 1], Trust(), draft_tokens=6)
    assert rounds == [Round(4, 3, 0), Round(0, 0, 0)]


def test_the_model_drafts_where_there_is_nothing_to_copy():
    rounds = combined_rounds(text(5, 6, 7, 8), [1, 0, 1, 1], Trust(), draft_tokens=2)
    assert rounds == [Round(2, 1, 2), Round(1, 1, 1)]


def test_where_nothing_matches_a_round_is_the_targets_own_token():
    assert copied_rounds(text(7, 8), LookupCopier(), draft_tokens=6) == [Round(0, 0, 0), Round(0, 0, 0)]


def test_no_text_is_retrieved_from_itself():
    texts = [text(1, 2, 3, 4), text(1, 2, 9, 9)]
    assert other_answers(texts, texts[0]).copy([1, 2], 2).token_ids == (9, 9)


def test_a_row_has_acceptance_cost_and_both_speed_ups():
    method = Method("model", {6: [[Round(6, 6, 6), Round(6, 0, 6)]]}, seconds_per_pass=0.002)
    name, length, tau, positions, drafted, passes, cost, formula, timed = row_of(method, 6, TIMES)
    assert (name, length, positions, drafted, passes) == ("model", "6", "0.50 0.50 0.50 0.50", "6.0", "1.00")
    assert tau.startswith("4.000 ")  # 8 tokens in 2 rounds
    assert cost == "0.200"
    assert formula.startswith(f"{4 / (6 * 0.2 + 1):.3f} ")
    assert timed.startswith(f"{4 / (6 * 0.2 + 1.6):.3f} ")


def test_positions_count_only_drafts_that_reach_them():
    method = Method("copies", {6: [[Round(2, 1, 0), Round(4, 4, 0)]]}, seconds_per_draft=0.0)
    assert row_of(method, 6, TIMES)[3] == "1.00 0.50 1.00 -"


def test_a_method_that_never_drafts_is_the_targets_own_stream():
    row = row_of(Method("nothing", {6: [[Round(0, 0, 0)] * 3]}), 6, TIMES)
    assert row[2:7] == ["1.000 (1.000 to 1.000)", "- - - -", "0.0", "0", "-"]
    assert row[8] == "1.000 (1.000 to 1.000)"
