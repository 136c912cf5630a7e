"""Reads what duet keeps as safetensors: judge heads, hidden states, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shared.errors import InvalidSetting


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a file.

    Args:
        what: it is, for the message.
        remedy: what to do where it cannot be read.
    Raises:
        InvalidSetting: it is missing, or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidSetting(f"{what} cannot be read: {' '.join(str(error).split())}; {remedy}") from None
