"""The benchmark of late evidence judges recorded answers as the running watch would."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.late_evidence import Moved, Recorded, lowest_window, moved, read, separation
from shared.routing import WATCH_TOKENS, DoubtWatch


@pytest.mark.parametrize("num_tokens", [1, WATCH_TOKENS - 1, WATCH_TOKENS, 40])
def test_an_answer_moves_at_exactly_the_thresholds_at_which_the_watch_doubts(num_tokens):
    rng = np.random.default_rng(num_tokens)
    logprobs = np.log(rng.uniform(0.01, 1.0, num_tokens)).tolist()
    lowest = lowest_window(logprobs)
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, lowest * 0.999, min(1.0, lowest * 1.001)):
        watch = DoubtWatch(threshold)
        doubted = any(watch.doubts(logprob) for logprob in logprobs) or watch.doubts_at_end()
        assert doubted == (lowest < threshold)


def test_a_threshold_is_judged_by_what_it_moves():
    answers = [Recorded(False, 0.1), Recorded(False, 0.6), Recorded(True, 0.3), Recorded(True, 0.9)]
    assert moved(answers, 0.4) == Moved(0.4, num_moved=2, num_wrong_moved=1, num_wrong=2, num_answers=4)
    assert moved(answers, 0.0).num_moved == 0
    assert separation(answers)[0] == 0.75


def test_rows_of_both_kinds_are_read_and_those_without_probabilities_passed_over():
    half = math.log(0.5)
    rows = [
        {"id": "a", "correct": True, "logprobs": [half]},
        {"id": "b", "edge": {"correct": False, "logprobs": [half, half]}},
        {"id": "c", "edge": {"correct": True}},
        {"id": "d", "correct": None, "logprobs": [half]},
    ]
    found = read(json.dumps(row) for row in rows)
    assert [answer.correct for answer in found] == [True, False]
    assert [answer.lowest for answer in found] == pytest.approx([0.5, 0.5])
