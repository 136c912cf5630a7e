"""The judge: a linear head that says of a draft token, from what the target makes of it, whether it is right.

Judge Decoding (Bachmann et al. 2025, arXiv:2501.19309): once the target has read a token, its last hidden
state tells whether it takes that token for an error, and one logistic unit reads that. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidSetting

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class JudgeHead:
    """A logistic unit for one model's hidden states."""

    model: str
    """Name of the target that it was trained for."""
    model_sha256: str
    """Of that target's file, or of its folder (`models.folder_sha256`): another quantisation has other hidden
    states."""
    weight: Float
    """[hidden_size]"""
    bias: float
    threshold: float
    """In (0, 1): a token is acceptable whose probability of being right is at least this."""

    def __post_init__(self) -> None:
        """Raises InvalidSetting where numbers are none, or out of range."""
        if self.weight.ndim != 1 or not self.weight.size:
            raise InvalidSetting(f"a judge head has one row of weights, not the shape {self.weight.shape}")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias)):
            raise InvalidSetting("a judge head's weights must be finite: train it again")
        if not 0.0 < self.threshold < 1.0:
            raise InvalidSetting(f"a judge's threshold must be above 0 and below 1, got {self.threshold!r}")

    @property
    def hidden_size(self) -> int:
        return len(self.weight)

    def probabilities(self, hidden: NDArray[np.floating]) -> Float:
        """That each token is right.

        Args:
            hidden: [num_tokens, hidden_size], the target's last hidden state at each token.
        """
        return self._probabilities(hidden.astype(np.float64) @ self.weight)

    def acceptable(self, hidden: NDArray[np.floating]) -> Bool:
        """Which tokens are right enough; never one whose hidden state is no number."""
        return self.probabilities(hidden) >= self.threshold

    def acceptable_by(self, products: NDArray[np.floating]) -> Bool:
        """As `acceptable`, where an engine has multiplied the hidden states with `weight` itself.

        Args:
            products: [num_tokens]
        """
        return self._probabilities(products.astype(np.float64)) >= self.threshold

    def _probabilities(self, products: Float) -> Float:
        with np.errstate(over="ignore"):  # a certain error has probability 0
            return np.asarray(1.0 / (1.0 + np.exp(-(products + self.bias))))

    def check_fits(self, model: str, model_sha256: str, hidden_size: int) -> None:
        """Raises InvalidSetting where the head was trained for another model."""
        if self.model_sha256 != model_sha256:
            another = "another file of that name" if self.model == model else model
            raise InvalidSetting(
                f"the judge head was trained for {self.model}, and the target is {another}:"
                " train one for it with `duet-cloud judge train`, or leave judge_head out"
            )
        if self.hidden_size != hidden_size:
            raise InvalidSetting(
                f"the judge head reads hidden states of {self.hidden_size} numbers, and those of {model} have"
                f" {hidden_size}: train one for it with `duet-cloud judge train`"
            )
