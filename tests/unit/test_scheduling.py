"""Which tokens of which streams go into the next pass of the target."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_service.scheduling import PROMPT_CHUNK, STEP_TOKENS, PassCost, is_step, plan


@pytest.mark.parametrize(
    ("remaining", "num_rows", "max_batch_tokens", "prefill_tokens", "taken"),
    [
        pytest.param([], [], 64, 32, [], id="nobody waits"),
        pytest.param([1, 1, 1], [1, 1, 1], 64, 32, [1, 1, 1], id="every stream takes its step"),
        pytest.param([33], [33], 64, 1, [33], id="a draft that is read whole is a step, however long"),
        pytest.param([16], [1], 64, 1, [16], id="16 tokens are a step even where only one is read"),
        pytest.param([17], [1], 64, 8, [8], id="17 tokens of which one is read are a prompt"),
        pytest.param([1, 5, 300, 40], [1, 5, 1, 1], 64, 32, [1, 5, 16, 16], id="prompts share equally"),
        pytest.param(
            [20, 300], [1, 1], 512, 100, [20, 80], id="a short prompt leaves its rest to the long one"
        ),
        pytest.param([300, 8, 8], [1, 8, 8], 20, 100, [4, 8, 8], id="steps go before prompts"),
        pytest.param([8, 8, 300], [8, 8, 1], 16, 100, [8, 8, 0], id="a prompt that came last waits for room"),
        pytest.param(
            [300, 8, 8], [1, 8, 8], 16, 100, [8, 8, 0], id="the prompt that waits longest is never shut out"
        ),
        pytest.param(
            [10, 10, 4], [10, 10, 4], 15, 8, [10, 0, 4], id="a step without room waits, a later one may fit"
        ),
        pytest.param([40], [5], 64, 38, [35], id="a prompt stops short of rows that one pass cannot read"),
        pytest.param([40], [5], 64, 40, [40], id="a prompt that fits is read at once"),
        pytest.param(
            [300, 300, 300], [1, 1, 1], 512, 2, [1, 1, 0], id="scarce room goes to who waits longest"
        ),
    ],
)
def test_the_next_pass(remaining, num_rows, max_batch_tokens, prefill_tokens, taken):
    assert (
        plan(
            remaining,
            num_rows,
            ["one"] * len(remaining),
            max_batch_tokens=max_batch_tokens,
            max_rows=max_batch_tokens,
            prefill_tokens=prefill_tokens,
        )
        == taken
    )


@pytest.mark.parametrize(
    ("remaining", "num_rows", "max_rows", "taken"),
    [
        pytest.param([8, 8, 8], [8, 8, 8], 16, [8, 8, 0], id="a step whose rows do not fit waits"),
        pytest.param([8, 20], [8, 1], 8, [8, 19], id="a prompt stops before a row that does not fit"),
        pytest.param([8, 20], [8, 1], 9, [8, 20], id="a prompt whose row fits is read"),
    ],
)
def test_rows_have_a_budget_of_their_own(remaining, num_rows, max_rows, taken):
    tenants = ["one"] * len(remaining)
    assert (
        plan(remaining, num_rows, tenants, max_batch_tokens=64, max_rows=max_rows, prefill_tokens=64) == taken
    )


def test_prompts_of_two_tenants_share_a_pass_however_many_each_has():
    taken = plan([300] * 4, [1] * 4, "aaab", max_batch_tokens=512, max_rows=64, prefill_tokens=60)
    assert taken == [10, 10, 10, 30]


LARGEST_DRAFT = 24
streams = st.lists(
    st.tuples(st.integers(1, 80), st.integers(1, LARGEST_DRAFT)).map(lambda s: (s[0], min(s))), max_size=8
)
batch_sizes = st.integers(LARGEST_DRAFT, 64)
prefills = st.integers(1, 64)


@given(streams, batch_sizes, prefills)
def test_a_pass_keeps_to_its_budgets(waiting, max_batch_tokens, prefill_tokens):
    taken = next_pass(waiting, max_batch_tokens, prefill_tokens)
    prompt_tokens = sum(count for count, stream in zip(taken, waiting, strict=True) if not is_step(*stream))
    assert all(0 <= count <= left for count, (left, _) in zip(taken, waiting, strict=True))
    assert sum(taken) <= max_batch_tokens
    assert prompt_tokens <= prefill_tokens


@given(streams, batch_sizes, prefills)
def test_a_step_is_whole_and_rows_come_out_of_one_pass(waiting, max_batch_tokens, prefill_tokens):
    taken = next_pass(waiting, max_batch_tokens, prefill_tokens)
    for count, (left, rows) in zip(taken, waiting, strict=True):
        assert count == left or count <= left - rows
        if is_step(left, rows):
            assert count in (0, left)


@given(streams.filter(len), batch_sizes, prefills)
def test_every_pass_moves_the_most_urgent_stream(waiting, max_batch_tokens, prefill_tokens):
    assert next_pass(waiting, max_batch_tokens, prefill_tokens)[0] > 0


@given(streams, batch_sizes, prefills)
@settings(max_examples=50)
def test_nobody_starves_though_finished_streams_come_back_at_once(waiting, max_batch_tokens, prefill_tokens):
    queue = [(name, left, rows) for name, (left, rows) in enumerate(waiting)]
    unfinished = set(range(len(waiting)))
    for _ in range(sum(left for left, _ in waiting)):
        taken = next_pass([(left, rows) for _, left, rows in queue], max_batch_tokens, prefill_tokens)
        stay, back = [], []
        for count, (name, left, rows) in zip(taken, queue, strict=True):
            if count == left:
                unfinished.discard(name)
                back.append((name, LARGEST_DRAFT, LARGEST_DRAFT))
            else:
                stay.append((name, left - count, rows))
        queue = stay + back
    assert not unfinished


def next_pass(waiting: list[tuple[int, int]], max_batch_tokens: int, prefill_tokens: int) -> list[int]:
    """`plan` for (remaining, num_rows) pairs, with room for as many rows as tokens."""
    return plan(
        [left for left, _ in waiting],
        [rows for _, rows in waiting],
        [i % 3 for i in range(len(waiting))],
        max_batch_tokens=max_batch_tokens,
        max_rows=max_batch_tokens,
        prefill_tokens=prefill_tokens,
    )


def learned(base_s: float, per_token_s: float, sizes=(1, 4, 64, 9, 200) * 10, **options) -> PassCost:
    cost = PassCost(**options)
    for size in sizes:
        cost.observe(size, base_s + per_token_s * size)
    return cost


@given(st.floats(0, 0.1), st.floats(1e-4, 0.05), st.integers(0, 500))
def test_a_linear_cost_is_learned_exactly(base_s, per_token_s, num_tokens):
    predicted = learned(base_s, per_token_s).predict(num_tokens)
    assert predicted == pytest.approx(base_s + per_token_s * num_tokens, rel=1e-3, abs=1e-5)


def test_a_cost_that_changes_is_learned_anew():
    cost = learned(0.01, 0.001)
    for size in (1, 4, 64, 9, 200) * 40:
        cost.observe(size, 0.02 + 0.004 * size)
    assert cost.predict(100) == pytest.approx(0.42, rel=1e-2)


def test_one_stall_of_the_machine_hardly_changes_what_a_pass_is_thought_to_cost():
    cost = learned(0.02, 0.01)
    before = cost.predict(4)
    cost.observe(4, 30.0)
    assert cost.predict(4) < 1.5 * before


def test_one_size_alone_is_taken_as_proportional():
    assert learned(0.0, 0.01, sizes=[8] * 50).predict(16) == pytest.approx(0.16)


def test_before_anything_was_seen_a_pass_is_free_and_prompts_beside_steps_go_in_small_chunks():
    assert (PassCost().predict(100), PassCost().prefill_tokens(3)) == (0.0, STEP_TOKENS)


@given(st.floats(1e-3, 0.1), st.floats(1e-4, 0.01), st.integers(1, 64), st.sampled_from([1.5, 2.0, 3.0]))
def test_prompts_stretch_a_pass_with_steps_as_far_as_allowed_and_no_further(base_s, per_s, steps, stretch):
    cost = learned(base_s, per_s, stretch=stretch)
    prompts = cost.prefill_tokens(steps)
    allowed = stretch * cost.predict(steps)
    assert prompts == 1 or cost.predict(steps + prompts) <= allowed * (1 + 1e-9)
    assert cost.predict(steps + prompts + 1) > allowed * (1 - 1e-9)


@pytest.mark.parametrize("per_token_s", [0.0, 1e-4, 10.0])
def test_prompts_alone_go_in_equal_chunks_on_every_machine(per_token_s):
    assert learned(0.0, per_token_s).prefill_tokens(0) == PROMPT_CHUNK


def test_prompts_progress_however_slow_the_target_is():
    assert learned(0.0, 10.0).prefill_tokens(1) == 1


def test_a_measurement_in_which_larger_passes_were_faster_does_no_harm():
    cost = PassCost()
    for size, seconds in ((1, 0.5), (100, 0.1)) * 5:
        cost.observe(size, seconds)
    assert cost.prefill_tokens(4) == STEP_TOKENS
    assert cost.predict(1000) > 0
