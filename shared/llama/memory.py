"""What a context's KV cache takes, and whether that is there. Pure: sizes in, a number or an error out."""

from __future__ import annotations

from shared.config import CacheType
from shared.errors import OutOfMemory

_BYTES_PER_VALUE = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}
"""Of a cache type; q8_0 keeps 32 values as bytes beside one f16 scale."""


def kv_cache_bytes(
    *,
    num_layers: int,
    num_kv_heads: int,
    key_length: int,
    value_length: int,
    cache_type: CacheType,
    num_tokens: int,
) -> int:
    """Bytes of the keys and values of `num_tokens` positions.

    Args:
        num_layers: that attend.
        num_kv_heads: of each layer; fewer than query heads where these share (arXiv:2305.13245).
        key_length: values per head and position.
        value_length: values per head and position.
        num_tokens: of all sequences together.

    >>> kv_cache_bytes(
    ...     num_layers=28, num_kv_heads=2, key_length=128, value_length=128, cache_type="f16", num_tokens=4096
    ... )
    117440512
    """
    num_values = num_layers * num_kv_heads * (key_length + value_length) * num_tokens
    return int(num_values * _BYTES_PER_VALUE[cache_type])


def check_cache_fits(
    name: str, *, num_sequences: int, context_tokens: int, bytes_per_token: int, free_bytes: int
) -> None:
    """Refuse caches that are larger than the free memory, and say which ones would do.

    Args:
        name: of the model.
        context_tokens: per sequence.
        bytes_per_token: see `kv_cache_bytes`.
    Raises:
        OutOfMemory: they do not fit.
    """
    needed = num_sequences * context_tokens * bytes_per_token
    if needed <= free_bytes:
        return
    num_tokens = free_bytes // bytes_per_token
    fitting = f"a context of {num_tokens // num_sequences} tokens"
    if num_sequences > 1:
        fitting += f" at {num_sequences} slots"
    if num_slots := num_tokens // context_tokens:
        fitting += f", or {num_slots} slots of {context_tokens} tokens"
    raise OutOfMemory(
        f"{name} needs {needed / 1e6:,.1f} MB for the KV caches of {num_sequences} x {context_tokens} tokens,"
        f" but {free_bytes / 1e6:,.1f} MB are free: choose {fitting}"
    )
