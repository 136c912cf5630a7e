"""Judge heads as safetensors files, bound to the model that they were trained for by its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cloud_service.tensor_file import read_tensors
from shared.errors import InvalidSetting
from shared.judge import JudgeHead

_FORMAT = "duet-judge-1"


def write_head(head: JudgeHead, path: Path) -> None:
    """Raises InvalidSetting where the file cannot be written."""
    tensors: dict[str, NDArray[Any]] = {
        "weight": head.weight.astype(np.float32),
        "bias": np.array([head.bias], np.float32),
        "threshold": np.array([head.threshold], np.float64),
    }
    about = {"format": _FORMAT, "model": head.model, "model_sha256": head.model_sha256}
    try:
        save_file(tensors, path, metadata=about)
    except (OSError, SafetensorError) as error:
        raise InvalidSetting(f"cannot write {path}: {error}; choose another file") from None


def read_head(path: Path) -> JudgeHead:
    """Raises InvalidSetting where the file is missing or holds no judge head."""
    remedy = "make one with `duet-cloud judge train`"
    about, tensors = read_tensors(path, f"the judge head {path}", remedy)
    if about.get("format") != _FORMAT:
        raise InvalidSetting(f"{path} holds no judge head: {remedy}")
    try:
        return JudgeHead(
            model=about["model"],
            model_sha256=about["model_sha256"],
            weight=tensors["weight"].astype(np.float64),
            bias=float(tensors["bias"][0]),
            threshold=float(tensors["threshold"][0]),
        )
    except (KeyError, IndexError) as error:
        raise InvalidSetting(f"the judge head {path} cannot be read: {error}; {remedy}") from None
