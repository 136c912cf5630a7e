"""What a KV cache takes, and what is said where it does not fit."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import OutOfMemory
from shared.llama.memory import check_cache_fits, kv_cache_bytes


@pytest.mark.parametrize(
    ("layers", "heads", "key", "value", "cache_type", "num_tokens", "expected"),
    [
        pytest.param(1, 1, 1, 1, "f32", 1, 8, id="one key and one value of 4 bytes"),
        pytest.param(1, 1, 1, 1, "f16", 3, 12, id="every token has its own"),
        pytest.param(24, 2, 64, 64, "f16", 8192, 96 * 2**20, id="Qwen2.5-0.5B, two streams of 4096"),
        pytest.param(24, 2, 64, 64, "q8_0", 8192, 51 * 2**20, id="q8_0 adds a scale to 32 values"),
        pytest.param(1, 1, 192, 128, "f16", 1, 640, id="keys and values may differ in length"),
        pytest.param(24, 0, 64, 64, "f16", 8192, 0, id="a model without attention has no cache"),
    ],
)
def test_bytes_of_a_cache(layers, heads, key, value, cache_type, num_tokens, expected):
    assert (
        kv_cache_bytes(
            num_layers=layers,
            num_kv_heads=heads,
            key_length=key,
            value_length=value,
            cache_type=cache_type,
            num_tokens=num_tokens,
        )
        == expected
    )


@pytest.mark.parametrize("bytes_per_token", [0, 1, 99, 100])
def test_what_fits_is_let_through(bytes_per_token):
    check_cache_fits(
        "m", num_sequences=4, context_tokens=100, bytes_per_token=bytes_per_token, free_bytes=40_000
    )


@pytest.mark.parametrize(
    ("num_sequences", "context_tokens", "advice"),
    [
        pytest.param(1, 2000, "a context of 1000 tokens", id="of one stream only the context can shrink"),
        pytest.param(
            4, 500, "a context of 250 tokens at 4 slots, or 2 slots of 500 tokens", id="either can shrink"
        ),
        pytest.param(4, 1001, "a context of 250 tokens at 4 slots", id="no slot of this length fits"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(num_sequences, context_tokens, advice):
    with pytest.raises(OutOfMemory) as caught:
        check_cache_fits(
            "m",
            num_sequences=num_sequences,
            context_tokens=context_tokens,
            bytes_per_token=10_000,
            free_bytes=10_000_000,
        )
    message = str(caught.value)
    assert message.endswith(f"choose {advice}")
    assert f"{num_sequences * context_tokens / 100:,.1f} MB" in message
    assert "10.0 MB are free" in message
    assert "\n" not in message


@given(st.integers(1, 256), st.integers(64, 10**6), st.integers(1, 10**6), st.integers(10**9, 10**12))
def test_the_advice_itself_fits(num_sequences, context_tokens, bytes_per_token, free_bytes):
    sizes = {"bytes_per_token": bytes_per_token, "free_bytes": free_bytes}
    try:
        check_cache_fits("m", num_sequences=num_sequences, context_tokens=context_tokens, **sizes)
    except OutOfMemory as error:
        advice = str(error).partition("choose ")[2]
        [context] = re.findall(r"context of (\d+) tokens", advice)
        check_cache_fits("m", num_sequences=num_sequences, context_tokens=int(context), **sizes)
        for slots in re.findall(r"(\d+) slots of", advice):
            check_cache_fits("m", num_sequences=int(slots), context_tokens=context_tokens, **sizes)
