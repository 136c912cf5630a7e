"""What an adapter learns from: token sequences of equal length, the last tenth kept for validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidSetting
from shared.json_lines import numbered_lines

MIN_SEQUENCES = 10
"""Fewer leave nothing to validate with."""
VALIDATION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Corpus:
    """[sequences, tokens] each."""

    training: NDArray[np.int64]
    validation: NDArray[np.int64]


def read_texts(path: Path) -> list[str]:
    """Documents of a file: JSON lines with a `text`, `prompt` or `question`, else one plain text.

    Raises:
        InvalidSetting: the file cannot be read, or a line is of another kind.
    """
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{path} cannot be read: {error}") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        return [content]
    texts = []
    for number, line in numbered_lines(content):
        try:
            row = json.loads(line)
            texts.append(next(row[key] for key in ("text", "prompt", "question") if key in row))
        except (ValueError, TypeError, StopIteration):
            raise InvalidSetting(
                f"{path}, line {number}: expected a JSON object with text, prompt or question"
            ) from None
    return texts


def pack(texts: Sequence[str], encode: Callable[[str], list[int]], end_token_id: int, length: int) -> Corpus:
    """Join the texts by ends of text and cut the whole into sequences; what is left over is dropped.

    Args:
        length: tokens a sequence.
    Raises:
        InvalidSetting: too short to train on and to validate with.
    """
    token_ids: list[int] = []
    for text in texts:
        token_ids += [*encode(text), end_token_id]
    num_sequences = len(token_ids) // length
    if num_sequences < MIN_SEQUENCES:
        raise InvalidSetting(
            f"the text has {len(token_ids)} tokens, and {MIN_SEQUENCES * length} are the least that can be"
            " learnt from: give a longer one"
        )
    sequences = np.array(token_ids[: num_sequences * length], np.int64).reshape(num_sequences, length)
    num_validation = max(1, round(VALIDATION_SHARE * num_sequences))
    return Corpus(sequences[:-num_validation], sequences[-num_validation:])
