"""Rows out of the JSON of `vllm serve`, as 0.32 answers it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cloud_service.targets import openai_rows

BY_TOKENS = json.loads("""{
  "choices": [{"index": 0, "finish_reason": "length", "token_ids": [7], "logprobs": {"content": [
    {"token_id": 7, "logprob": -0.5, "rank": 1, "top_logprobs": [
      {"token_id": 7, "logprob": -0.5, "rank": 1}, {"token_id": 3, "logprob": -1.5, "rank": 2}]}]}}],
  "prompt_logprobs": [null,
    {"9": {"logprob": -8.0, "rank": 40, "decoded_token": null},
     "4": {"logprob": -0.1, "rank": 1, "decoded_token": null},
     "2": {"logprob": -3.0, "rank": 2, "decoded_token": null}},
    {"5": {"logprob": -0.2, "rank": 1, "decoded_token": null},
     "6": {"logprob": -9999.0, "rank": 2, "decoded_token": null}}],
  "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 2}}
}""")
COMPLETION = json.loads("""{
  "choices": [{"index": 0, "text": "x", "token_ids": [7],
    "logprobs": {"tokens": ["token_id:7"], "token_logprobs": [-0.5],
                 "top_logprobs": [{"token_id:7": -0.5, "token_id:3": -1.5}]},
    "prompt_logprobs": [null, {"4": {"logprob": -0.1, "rank": 1, "decoded_token": "a"}}]}],
  "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3, "prompt_tokens_details": null}
}""")


def test_rows_of_the_prompt_are_read_from_the_end():
    assert openai_rows.prompt_rows(BY_TOKENS, 1) == [[(5, -0.2), (6, -9999.0)]]
    assert openai_rows.prompt_rows(BY_TOKENS, 2)[0] == [(9, -8.0), (4, -0.1), (2, -3.0)]
    assert openai_rows.prompt_rows(COMPLETION, 1) == [[(4, -0.1)]]


def test_the_prompts_first_token_has_no_row():
    with pytest.raises(ValueError, match="missing"):
        openai_rows.prompt_rows(BY_TOKENS, 3)


@pytest.mark.parametrize("answer", [BY_TOKENS, COMPLETION], ids=["token ids", "completion"])
def test_the_generated_tokens_row_is_read_from_either_endpoint(answer):
    assert openai_rows.next_row(answer) == [(7, -0.5), (3, -1.5)]


def test_rows_are_ordered_and_cut_to_one_length():
    ids, logprobs = openai_rows.as_arrays(openai_rows.prompt_rows(BY_TOKENS, 2))
    assert ids.tolist() == [[4, 2], [5, 6]]
    assert logprobs.tolist() == [[-0.1, -3.0], [-0.2, -np.inf]]


def test_equal_tokens_are_ordered_by_id():
    ids, _ = openai_rows.as_arrays([[(9, -1.0), (2, -1.0), (5, -1.0)]])
    assert ids.tolist() == [[2, 5, 9]]


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        pytest.param({"prompt_tokens_details": {"cached_tokens": 64}}, 64, id="some"),
        pytest.param({"prompt_tokens_details": {"cached_tokens": 0}}, 0, id="none"),
        pytest.param({"prompt_tokens_details": {"cached_tokens": None}}, 0, id="null is none"),
        pytest.param({"prompt_tokens_details": None}, None, id="not told"),
        pytest.param(None, None, id="no usage"),
    ],
)
def test_what_the_cache_gave_is_known_only_where_the_service_tells(usage, cached):
    assert openai_rows.cached_tokens({"usage": usage}) == cached


def test_the_texts_own_token_is_found_in_its_row_however_unlikely():
    assert openai_rows.own_logprobs(openai_rows.prompt_rows(BY_TOKENS, 2), [9, 6]).tolist() == [-8.0, -np.inf]


def test_a_token_that_its_row_leaves_out_is_not_said_to_be_possible():
    assert openai_rows.own_logprobs(openai_rows.prompt_rows(BY_TOKENS, 2), [3, 5]).tolist() == [-np.inf, -0.2]


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        ({"choices": [{"token_ids": [1, 2], "finish_reason": None}]}, [1, 2]),
        ({"choices": [{"token_ids": [3], "finish_reason": "stop"}]}, [3]),
        ({"choices": [{"token_ids": None, "finish_reason": "length"}]}, []),
        ({"choices": [], "usage": {}}, []),
    ],
)
def test_events_of_a_stream_bring_tokens(event, tokens):
    assert list(openai_rows.new_tokens(event)) == tokens


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": {"message": "EngineCore died", "code": 500}}, "EngineCore died"),
        ({"choices": [{"token_ids": [], "finish_reason": "abort"}]}, "given up"),
    ],
)
def test_an_event_that_reports_a_failure_is_one(event, message):
    with pytest.raises(ValueError, match=message):
        openai_rows.new_tokens(event)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"error": {"message": "a\nb"}}, "a b"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        ("x", "x"),
    ],
)
def test_an_error_is_told_in_one_line(answer, text):
    assert openai_rows.error_text(answer) == text
