"""The target's token at a position: the noise, the distribution, and that speculation changes neither."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import InvalidRequest
from shared.policies import num_accepted
from shared.sampling import (
    Rows,
    Sampling,
    check_rows,
    draw,
    gumbel,
    logprobs_from_logits,
    logprobs_in_rows,
    philox4x32,
    rows_from_logits,
)
from tests.chi_square import chi_square_tail, p_value

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
LARGEST_SEED = 2**64 - 1
NUM_SEEDS = 20_000
SEEDS = np.arange(NUM_SEEDS, dtype=np.uint64)[:, None]
"""As a column these broadcast through `draw`: one row of the target, one token for each seed."""


def rows(*probs, ids=None) -> Rows:
    """Rows of probabilities, best first; ids count from 0."""
    table = np.atleast_2d(np.array(probs))
    ids = np.broadcast_to(np.arange(table.shape[1]) if ids is None else ids, table.shape)
    with np.errstate(divide="ignore"):
        return Rows(ids, np.log(table))


# --- The noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        pytest.param("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
        pytest.param(
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
            id="ones",
        ),
        pytest.param(
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="digits of pi",
        ),
    ],
)
def test_philox_gives_the_words_that_its_authors_publish(counter, key, words):
    """Known-answer vectors of Random123 (Salmon et al. 2011)."""

    def numbers(text):
        return tuple(int(word, 16) for word in text.split())

    given_counter = tuple(np.array([word], np.uint64) for word in numbers(counter))
    assert tuple(int(word[0]) for word in philox4x32(given_counter, numbers(key))) == numbers(words)


@pytest.mark.parametrize(
    ("seed", "position", "token_id", "noise"),
    [
        (0, 0, 0, 0.084820273247),
        (1, 0, 0, 2.152075454839),
        (0, 1, 0, 0.134590008077),
        (0, 0, 1, 3.570159657365),
        (42, 7, 151_643, 2.871713253468),
        (2**32, 0, 0, 4.784003014708),
        (LARGEST_SEED, 4095, 152_063, 1.973490094428),
    ],
)
def test_the_noise_has_pinned_values(seed, position, token_id, noise):
    assert noise_at(seed, position, token_id) == pytest.approx(noise, abs=1e-12)


def noise_at(seed, position, token_id) -> float:
    return float(gumbel(seed, np.array(position), np.array(token_id)))


def test_the_noise_table_of_the_protocol_page_is_what_the_code_gives():
    lines = PROTOCOL.read_text(encoding="utf-8").split("## Noise, for other languages")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = [row for row in cells if row[0].isdigit()]
    assert len(table) >= 5
    for seed, position, token_id, word0, word1, noise in table:
        counter = tuple(np.array([n], np.uint64) for n in (int(token_id), int(position), 0, 0))
        words = philox4x32(counter, (int(seed) % 2**32, int(seed) >> 32))
        assert [f"{int(word[0]):08x}" for word in words[:2]] == [word0, word1]
        assert f"{noise_at(int(seed), int(position), int(token_id)):.12f}" == noise


@given(st.integers(0, LARGEST_SEED), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_reference_of_the_protocol_page_agrees_with_the_code(seed, position, token_id):
    assert documented_noise()(seed, position, token_id) == pytest.approx(
        noise_at(seed, position, token_id), rel=1e-12, abs=1e-12
    )


@cache
def documented_noise():
    block = PROTOCOL.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(block, names)
    return names["noise"]


@pytest.mark.parametrize(
    ("word", "uniform"),
    [
        pytest.param(0, 2.0**-53, id="the smallest words"),
        pytest.param(2**32 - 1, 1 - 2.0**-53, id="the largest words"),
    ],
)
def test_the_uniform_lies_strictly_between_0_and_1(monkeypatch, word, uniform):
    words = (np.array([word], np.uint64),) * 4
    monkeypatch.setattr("shared.sampling.philox4x32", lambda counter, key: words)
    [noise] = gumbel(0, np.array([0]), np.array([0]))
    assert math.isfinite(noise)
    assert noise == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_the_noise_is_gumbel_distributed():
    """Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 is the critical value at p = 0.001."""
    ordered = np.sort(gumbel(5, np.arange(100)[:, None], np.arange(200)).ravel())
    expected = np.exp(-np.exp(-ordered))
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.max(expected - ranks[:-1]), np.max(ranks[1:] - expected))
    assert distance * math.sqrt(len(ordered)) < 1.95


# --- One draw ----------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest():
    assert draw(rows([0.6, 0.4], [0.5, 0.3], ids=[7, 3]), Sampling(), seed=0, start=0).tolist() == [7, 7]


def test_a_tie_goes_to_the_lowest_id_greedy_and_sampled():
    tied = rows_from_logits([np.array([0, 2, 1, 2, 2], np.float32)], 3)
    assert tied.token_ids.tolist() == [[1, 3, 4]]
    assert draw(tied, Sampling(), seed=0, start=0).tolist() == [1]
    same_id_noise = Rows(np.array([[9, 4]]), np.log([[0.5, 0.5]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.sampling.gumbel", lambda seed, positions, ids: np.zeros(ids.shape))
        assert draw(same_id_noise, Sampling(temperature=1.0), seed=0, start=0).tolist() == [4]


@pytest.mark.parametrize("temperature", [1e-3, 1e-310, 5e-324])
def test_next_to_no_temperature_is_as_good_as_greedy(temperature):
    row = rows([0.5, 0.3, 0.2], ids=[7, 3, 5])
    for seed in range(20):
        assert draw(row, Sampling(temperature=temperature), seed, start=0).tolist() == [7]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        pytest.param(Sampling(temperature=1.0), [0.5, 0.25, 0.15, 0.1], id="the target's own"),
        pytest.param(
            Sampling(temperature=0.5),
            [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345],
            id="temperature 0.5 squares",
        ),
        pytest.param(
            Sampling(temperature=1.0, min_p=0.3),
            [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0],
            id="min-p drops what is under a share of the likeliest",
        ),
        pytest.param(
            Sampling(temperature=1.0, min_p=0.5),
            [2 / 3, 1 / 3, 0, 0],
            id="min-p keeps what equals the share",
        ),
        pytest.param(Sampling(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], id="top-k renormalises"),
        pytest.param(
            Sampling(temperature=1.0, top_p=0.7),
            [2 / 3, 1 / 3, 0, 0],
            id="top-p keeps the token that crosses the mass",
        ),
        pytest.param(
            Sampling(temperature=1.0, top_p=0.74, top_k=2),
            [2 / 3, 1 / 3, 0, 0],
            id="top-p counts after top-k renormalised",
        ),
        pytest.param(
            Sampling(temperature=1.0, top_p=0.6, top_k=2),
            [1, 0, 0, 0],
            id="top-p counts the mass that top-k left",
        ),
        pytest.param(
            Sampling(temperature=0.5, top_p=0.72),
            [1, 0, 0, 0],
            id="top-p counts after temperature",
        ),
        pytest.param(
            Sampling(temperature=0.5, min_p=0.3),
            [1, 0, 0, 0],
            id="min-p looks after temperature",
        ),
        pytest.param(Sampling(temperature=1.0, top_p=1e-9), [1, 0, 0, 0], id="the best always stays"),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_the_request_asks_for(sampling, expected):
    drawn = draw(rows([0.5, 0.25, 0.15, 0.1]), sampling, SEEDS, start=3)
    counts = Counter(drawn.tolist())
    assert p_value(counts, dict(enumerate(expected))) > 0.001


def test_top_p_stops_at_the_token_that_reaches_the_mass_exactly():
    assert set(draw(rows([0.5, 0.5]), Sampling(temperature=1.0, top_p=0.5), SEEDS, start=0)) == {0}


def test_a_token_of_probability_0_is_never_drawn():
    logits = np.array([-np.inf, 1.0, -np.inf, 0.0], np.float32)
    for sampling in (Sampling(), Sampling(temperature=50.0), Sampling(temperature=1.0, top_p=0.99)):
        drawn = draw(rows_from_logits([logits], 4), sampling, SEEDS, start=0)
        assert set(drawn.tolist()) <= {1, 3}


@pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED, 12345])
def test_a_position_has_one_token_for_a_seed_however_many_are_drawn_at_once(seed):
    table = np.random.default_rng(1).dirichlet(np.ones(12), size=20)
    order = np.argsort(-table, axis=1)
    whole = Rows(order, np.log(np.take_along_axis(table, order, axis=1)))
    sampling = Sampling(temperature=0.8, top_k=10, top_p=0.95)
    at_once = draw(whole, sampling, seed, start=100).tolist()
    for length in (1, 3, 7):
        apart: list[int] = []
        for first in range(0, 20, length):
            part = slice(first, first + length)
            apart += draw(
                Rows(whole.token_ids[part], whole.logprobs[part]), sampling, seed, 100 + first
            ).tolist()
        assert apart == at_once


def test_wider_rows_than_top_k_asks_for_change_nothing():
    wide, narrow = rows([0.4, 0.3, 0.2, 0.1]), rows([0.4, 0.3])
    sampling = Sampling(temperature=1.0, top_k=2)
    assert draw(wide, sampling, SEEDS, 0).tolist() == draw(narrow, sampling, SEEDS, 0).tolist()


def test_seeds_differ_in_both_halves():
    row = rows(np.full(64, 1 / 64))
    texts = {
        tuple(draw(Rows(*(np.repeat(part, 8, 0) for part in (row.token_ids, row.logprobs))), HOT, seed, 0))
        for seed in (0, 1, 2**32, 2**32 + 1, LARGEST_SEED)
    }
    assert len(texts) == 5


def test_a_column_of_seeds_draws_what_each_seed_draws_alone():
    """The statistical tests of this file rest on it."""
    row = rows([0.4, 0.3, 0.2, 0.1])
    alone = [int(draw(row, HOT, int(seed), start=2)[0]) for seed in SEEDS[:200, 0]]
    assert draw(row, HOT, SEEDS[:200], start=2).tolist() == alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("top_k", 0),
        ("top_k", 65),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=f"^{field} must be .*, got {value!r}$"):
        Sampling(**{field: value})


def test_the_ends_of_every_range_are_legal():
    assert Sampling(temperature=0.0, min_p=0.0, top_k=1, top_p=1e-300).greedy
    assert Sampling(temperature=1e300, min_p=1.0, top_k=64, top_p=1.0).row_width == 64


def test_a_greedy_draw_needs_one_token_a_row():
    assert (Sampling().row_width, Sampling(temperature=1.0, top_k=20).row_width) == (1, 20)


# --- Rows from logits --------------------------------------------------------------------------------

logit_rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(5, 30)),
    elements=st.sampled_from([-np.inf, -3.0, 0.0, 0.25, 1.0, 30.0]) | st.floats(-60, 60, width=32),
).filter(lambda table: np.isfinite(table).any(axis=1).all())


@given(logit_rows, st.integers(1, 5))
def test_rows_hold_the_likeliest_tokens_best_first_and_equal_ones_by_id(logits, k):
    made = rows_from_logits(list(logits), k)
    for row, ids, logprobs in zip(logits.tolist(), made.token_ids.tolist(), made.logprobs, strict=True):
        assert ids == sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        total = math.log(math.fsum(math.exp(logit) for logit in row))
        assert logprobs == pytest.approx([row[i] - total for i in ids], abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([-np.inf] * 4, id="every token masked"),
        pytest.param([1.0, np.nan, 0.0, 2.0], id="a NaN among numbers"),
        pytest.param([1.0, 1.0, 1.0, np.nan], id="a NaN behind equal numbers"),
        pytest.param([np.nan] * 4, id="nothing but NaN"),
        pytest.param([0.0, np.inf, 0.0, 0.0], id="an infinite logit"),
    ],
)
def test_logits_that_are_no_distribution_are_refused(bad, k):
    with pytest.raises(ValueError, match="the model gave"):
        rows_from_logits([np.array(bad, np.float32)], k)


def test_a_tokens_log_probability_counts_the_whole_vocabulary_and_not_its_rank():
    logits = [np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32), np.array([1, 2, -np.inf, 0], np.float32)]
    logprobs = logprobs_from_logits(logits, [3, 2])
    assert np.exp(logprobs[0]) == pytest.approx(0.05)
    assert logprobs[1] == -np.inf


def test_logits_and_rows_as_wide_as_the_vocabulary_agree_on_every_token():
    logits = [np.random.default_rng(0).normal(size=16).astype(np.float32) for _ in range(16)]
    ids = list(range(16))
    np.testing.assert_allclose(
        logprobs_in_rows(rows_from_logits(logits, 16), ids), logprobs_from_logits(logits, ids), rtol=1e-12
    )


def test_a_token_outside_its_row_is_not_said_to_be_possible():
    assert logprobs_in_rows(rows([0.6, 0.4], [0.6, 0.4]), [1, 2]).tolist() == [np.log(0.4), -np.inf]


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        pytest.param([0.9, 0.2], "sum to 1.1, not to one", id="more than there is"),
        pytest.param([np.nan, 0.2], "NaN", id="a NaN"),
        pytest.param([np.inf, 0.2], "no finite", id="an infinity"),
        pytest.param([0.0, 0.0], "no finite", id="nothing possible"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        check_rows(rows([0.6, 0.4], probs))


def test_rows_of_the_likeliest_tokens_need_not_hold_everything():
    check_rows(rows([0.6, 0.4], [0.01, 0.01], [1.0, 0.0]))


# --- Speculation leaves the distribution alone -----------------------------------------------------------

HOT = Sampling(temperature=1.0)
TOP_4 = Sampling(temperature=0.9, top_k=4)
NEVER = 5
"""A token that top-k cuts off everywhere."""


@cache
def target_rows(prefix: tuple[int, ...]) -> Rows:
    """A target that depends on all that came before: 4 tokens in any order, and 2 that top-k cuts off."""
    rng = np.random.default_rng([17, *prefix])
    likely = np.sort(rng.dirichlet(np.full(4, 2.0)))[::-1]
    return rows([*(0.9 * likely + 0.02), 0.015, 0.005], ids=[*rng.permutation(4), 4, NEVER])


@cache
def target_tokens(prefix: tuple[int, ...], noise: int = 0) -> list[int]:
    """What the target says after a prefix, for each seed; after a token that it never says, anything."""
    if NEVER in prefix:
        return [NEVER] * NUM_SEEDS
    return draw(target_rows(prefix), TOP_4, SEEDS + np.uint64(noise), start=len(prefix)).tolist()


@cache
def coupled_tokens(position: int) -> list[int]:
    """A drafter with a distribution of its own and the target's noise."""
    return draw(rows([0.4, 0.3, 0.2, 0.1], ids=[2, 0, 3, 1]), TOP_4, SEEDS, start=position).tolist()


@cache
def likeliest(prefix: tuple[int, ...]) -> int:
    return int(target_rows(prefix).token_ids[0, 0])


DRAFTERS = {
    "a draft that is always wrong": lambda seed, prefix: NEVER,
    "a draft that is right half the time": lambda seed, prefix: likeliest(prefix),
    "a fixed draft": lambda seed, prefix: (1, 3, 0)[len(prefix)],
    "a draft made with the same noise": lambda seed, prefix: coupled_tokens(len(prefix))[seed],
}


def speculate(seed: int, drafter, draft_length: int, *, redraw: bool = False) -> tuple[int, ...]:
    """Three tokens by drafting and verifying; `redraw` is the mistake of other noise after a rejection."""
    committed: tuple[int, ...] = ()
    while len(committed) < 3:
        draft: tuple[int, ...] = ()
        while len(draft) < min(draft_length, 2 - len(committed)):  # the target's own token closes a round
            draft += (drafter(seed, committed + draft),)
        wanted = [target_tokens(committed + draft[:i])[seed] for i in range(len(draft) + 1)]
        accepted = num_accepted(draft, wanted)
        own = wanted[accepted]
        if redraw and accepted < len(draft):
            own = target_tokens(committed + draft[:accepted], noise=NUM_SEEDS)[seed]
        committed += (*draft[:accepted], own)
    return committed


@cache
def enumerated() -> dict[tuple[int, ...], float]:
    """The joint distribution of three tokens, by multiplying it out: 4 x 4 x 4 cells."""

    def prob(prefix, token):
        row = target_rows(prefix)
        weights = np.exp(row.logprobs[0, :4] / TOP_4.temperature)
        return float(weights[row.token_ids[0, :4] == token].sum() / weights.sum())

    return {
        cell: math.prod(prob(cell[:i], cell[i]) for i in range(3))
        for cell in itertools.product(range(4), repeat=3)
    }


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS.keys())
def test_three_speculated_tokens_are_distributed_as_the_targets_own(drafter):
    counts = Counter(speculate(seed, drafter, draft_length=2) for seed in range(NUM_SEEDS))
    assert p_value(counts, enumerated()) > 0.001


def test_the_same_seed_gives_the_same_tokens_whatever_the_drafter_and_its_length():
    for seed in range(300):
        texts = {
            speculate(seed, drafter, draft_length)
            for drafter in DRAFTERS.values()
            for draft_length in (0, 1, 2)
        }
        assert len(texts) == 1


def test_a_correction_drawn_with_other_noise_is_caught():
    """The mistake that this rule exists to exclude fails the very test that the rule passes."""
    drafter = DRAFTERS["a draft that is right half the time"]
    counts = Counter(speculate(seed, drafter, 2, redraw=True) for seed in range(NUM_SEEDS))
    assert p_value(counts, enumerated()) < 1e-6


def test_a_draft_with_the_same_noise_is_accepted_more_often_than_an_independent_one():
    wanted = target_tokens(())
    other_noise = draw(
        rows([0.4, 0.3, 0.2, 0.1], ids=[2, 0, 3, 1]), TOP_4, SEEDS + np.uint64(NUM_SEEDS), start=0
    )

    def agreement(drafted):
        return np.mean(np.equal(drafted, wanted))

    assert agreement(coupled_tokens(0)) > agreement(other_noise) + 0.2


@pytest.mark.parametrize(("freedom", "critical"), [(1, 10.828), (2, 13.816), (3, 16.266), (63, 103.442)])
def test_the_tests_own_chi_square_meets_the_printed_tables(freedom, critical):
    assert chi_square_tail(critical, freedom) == pytest.approx(0.001, rel=1e-3)
