"""The adapter of an early exit as a file: one attention and two norms, bound to its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cloud_service.tensor_file import read_tensors
from shared.errors import InvalidSetting, ModelUnsupported

FAMILIES = ("llama", "qwen2")
"""What GGUF calls the architectures whose blocks are cut."""

_FORMAT = "duet-adapter-1"
_REMEDY = "make one with `duet-cloud make-draft train`"


@dataclass(frozen=True, slots=True)
class Adapter:
    """h + attention(norm(h)), then a final norm before the target's own head (Kangaroo, section 3.1)."""

    target_sha256: str
    """Of the GGUF file that it was trained for."""
    num_layers: int
    """Blocks of the target below it."""
    tensors: Mapping[str, NDArray[np.float32]]
    """By the names of Hugging Face's modules, [out, in]: self_attn.{q,k,v,o}_proj.weight (and .bias where
    the family has them), input_layernorm.weight, norm.weight."""

    def save(self, path: Path) -> None:
        metadata = {
            "format": _FORMAT,
            "target_sha256": self.target_sha256,
            "num_layers": str(self.num_layers),
        }
        save_file({name: np.ascontiguousarray(t) for name, t in self.tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """
        Raises:
            InvalidSetting: the file is missing, or is no adapter.
        """
        metadata, tensors = read_tensors(path, f"the adapter {path}", _REMEDY)
        try:
            if metadata["format"] != _FORMAT:
                raise KeyError("format")
            return cls(metadata["target_sha256"], int(metadata["num_layers"]), tensors)
        except (KeyError, ValueError):
            raise InvalidSetting(f"{path} is not an adapter; {_REMEDY}") from None

    def check_target(self, target_sha256: str, num_layers: int) -> None:
        """
        Raises:
            InvalidSetting: it was trained for another target, or on top of another block.
        """
        if self.target_sha256 != target_sha256:
            raise InvalidSetting(
                f"the adapter belongs to a target of sha256 {self.target_sha256[:12]}..., this one has"
                f" {target_sha256[:12]}...; train one for this target with `duet-cloud make-draft train`"
            )
        if self.num_layers != num_layers:
            raise InvalidSetting(
                f"the adapter was trained on top of {self.num_layers} layers: use --layers {self.num_layers}"
            )


def check_layers(num_layers: int, num_blocks: int) -> None:
    """
    Raises:
        InvalidSetting: the target of `num_blocks` has no such exit.
    """
    if not 1 <= num_layers < num_blocks:
        raise InvalidSetting(
            f"--layers must be from 1 to {num_blocks - 1}, as the target has {num_blocks}; got {num_layers}"
        )


def check_family(architecture: str) -> None:
    """
    Raises:
        ModelUnsupported: the target's blocks are not built as those that can be cut.
    """
    if architecture not in FAMILIES:
        raise ModelUnsupported(
            f"a draft can be cut from the families {' and '.join(FAMILIES)}; this target is {architecture!r}"
        )
