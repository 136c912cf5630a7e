"""What changes a model's distribution before `Sampling` looks at it. Pure: logits and text in, logits out.

A target that verifies from rows cannot tell what these would have done to them, so only a model that writes
alone honours them: mode `local`, or the target in mode `cloud`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequest

MAX_BIAS_TOKENS = 1024
MAX_GRAMMAR_CHARS = 65536


def _short(text: str | None) -> bool:
    return text is None or len(text) <= MAX_GRAMMAR_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """Penalties and bias as OpenAI and vLLM define them, and a form that the text must have."""

    presence_penalty: float = 0.0
    """In [-2, 2]; taken once from the logit of each token that the completion holds."""
    frequency_penalty: float = 0.0
    """In [-2, 2]; taken as often as the completion holds the token."""
    repetition_penalty: float = 1.0
    """In (0, 10]; tokens of prompt and completion have their logits divided by it, negative ones multiplied
    (Keskar et al. 2019, arXiv:1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit, in [-100, 100])."""
    json_schema: str | None = None
    """JSON schema, as text, of the JSON that the text is."""
    grammar: str | None = None
    """GBNF grammar of the text, beginning at `root`."""

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 10.0, "in (0, 10]"),
            (
                "logit_bias",
                len(self.logit_bias) <= MAX_BIAS_TOKENS
                and all(token >= 0 and -100.0 <= bias <= 100.0 for token, bias in self.logit_bias),
                f"at most {MAX_BIAS_TOKENS} token ids with values in [-100, 100]",
            ),
            ("json_schema", _short(self.json_schema), f"of at most {MAX_GRAMMAR_CHARS} characters"),
            ("grammar", _short(self.grammar), f"of at most {MAX_GRAMMAR_CHARS} characters"),
        ):
            if not ok:
                raise InvalidRequest(f"{name} must be {want}")
        if self.json_schema is not None and self.grammar is not None:
            raise InvalidRequest("grammar and json_schema exclude each other")

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the fields that are not at their defaults."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)


NO_SHAPING = Shaping()
EVERY_SHAPE = frozenset(field.name for field in fields(Shaping))
PENALTIES = EVERY_SHAPE - {"json_schema", "grammar"}


def shape_logits(
    logits: NDArray[np.float32],
    shaping: Shaping,
    *,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
) -> None:
    """Apply penalties and bias in place, in vLLM's order: bias, repetition, frequency, presence.

    Args:
        logits: [vocabulary_size], the next token's.
    """
    for token, bias in shaping.logit_bias:
        if token < len(logits):
            logits[token] += bias
    if shaping.repetition_penalty != 1.0:
        seen = np.unique(np.array([*prompt_ids, *completion_ids], np.int64))
        values = logits[seen]
        logits[seen] = np.where(
            values > 0, values / shaping.repetition_penalty, values * shaping.repetition_penalty
        )
    if completion_ids and (shaping.frequency_penalty or shaping.presence_penalty):
        written, counts = np.unique(np.array(completion_ids, np.int64), return_counts=True)
        logits[written] -= (shaping.frequency_penalty * counts + shaping.presence_penalty).astype(np.float32)
