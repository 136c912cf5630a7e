"""Rounds of sessions that stay in vLLM's engine, and the steps that it has CUDA graphs for; without vLLM."""

from __future__ import annotations

import pytest

from cloud_service.targets.resident_rounds import MAX_GRAPH_TOKENS, PendingRound, graph_sizes

STEP_TOKENS = 17


@pytest.mark.parametrize(
    ("draft", "outputs", "made", "done"),
    [
        pytest.param([], [[9]], [9], True, id="an empty draft is answered by one token"),
        pytest.param([5, 6], [[5, 6, 9]], [5, 6, 9], True, id="a right draft is followed by the bonus"),
        pytest.param([5, 6], [[5, 9]], [5, 9], True, id="a wrong token ends a round"),
        pytest.param([5, 6], [[5, 6]], [5, 6], False, id="a round without the target's own token goes on"),
        pytest.param([5, 6], [[5], [6], [9]], [5, 6, 9], True, id="an answer may come in pieces"),
        pytest.param([5, 6], [[5], [9]], [5, 9], True, id="and turn wrong in a later one"),
    ],
)
def test_a_round_is_done_once_the_target_differs_or_goes_on(
    draft: list[int], outputs: list[list[int]], made: list[int], done: bool
) -> None:
    round_ = PendingRound(start=3, draft=draft)
    for output in outputs:
        assert not round_.done
        round_.receive(output)
    assert (round_.made, round_.done, round_.end) == (made, done, 3 + len(made))


def test_what_is_left_of_a_draft_is_what_was_not_answered() -> None:
    round_ = PendingRound(start=0, draft=[1, 2, 3, 4, 5])
    assert round_.rest(2) == [1, 2]
    round_.receive([1, 2])
    assert round_.rest(8) == [3, 4, 5]


@pytest.mark.parametrize("num_streams", [1, 2, 7, 16, 64, 100, 256, 1024])
@pytest.mark.parametrize("step_tokens", [5, 9, STEP_TOKENS])
def test_every_step_of_so_many_streams_fits_a_graph_closely(num_streams: int, step_tokens: int) -> None:
    sizes = graph_sizes(num_streams, step_tokens)
    assert sizes == sorted(set(sizes))
    assert all(size % step_tokens == 0 for size in sizes), "vLLM would round them up to these"
    assert MAX_GRAPH_TOKENS - step_tokens < sizes[-1] or sizes[-1] == num_streams * step_tokens
    assert sizes[-1] <= MAX_GRAPH_TOKENS
    for num_tokens in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= num_tokens)
        assert padded - num_tokens < max(step_tokens, padded / 8)


@pytest.mark.parametrize("num_streams", [1, 7, 64, 100, 256])
def test_where_any_size_will_do_plain_steps_are_hardly_padded(num_streams: int) -> None:
    sizes = graph_sizes(num_streams, STEP_TOKENS, any_size=True)
    assert sizes == sorted(set(sizes))
    assert {1, 2, 4, num_streams} <= set(sizes)
    assert sizes[-1] == min(num_streams * STEP_TOKENS, MAX_GRAPH_TOKENS)
    for num_tokens in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= num_tokens)
        assert padded - num_tokens < max(8, padded / 8)
    assert len(sizes) <= 50


def test_64_streams_with_drafts_of_8_have_a_graph_that_vllm_would_not_capture_itself() -> None:
    sizes = graph_sizes(64, STEP_TOKENS)
    assert any(64 * 9 <= size < 64 * 9 * 1.125 for size in sizes)
    assert len(sizes) <= 40, "each takes time at the start, and memory"


@pytest.mark.parametrize(
    ("max_batched_tokens", "largest"),
    [
        pytest.param(512, 510, id="no graph is larger than a step may be"),
        pytest.param(8192, 1088, id="nor than all streams need"),
        pytest.param(16, 17, id="one there is always"),
    ],
)
def test_graphs_end_where_steps_do(max_batched_tokens: int, largest: int) -> None:
    assert graph_sizes(64, STEP_TOKENS, max_batched_tokens)[-1] == largest
