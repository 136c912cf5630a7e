"""Where an engine that reads Hugging Face folders finds a model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ModelFileInvalid, ModelUnsupported
from shared.models.cache import file_sha256
from shared.models.registry import Registry

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ResolvedWeights:
    name: str
    """What people call the model."""
    source: str
    """A folder that is there, or the id of a repository that the engine fetches."""


def resolve_weights(model: str, registry: Registry) -> ResolvedWeights:
    """Find the weights of a registered name, a folder or a repository's id.

    Raises:
        UnknownModel: none of the three.
        ModelUnsupported: a registered model of which only GGUF files are known.
        ModelFileInvalid: a GGUF file, or a folder without config.json.
    """
    if model in registry:
        weights = registry.entry(model).weights
        if weights is None:
            raise ModelUnsupported(f"{model} is known as GGUF only: {_how_to_convert('MODEL.gguf')}")
        return ResolvedWeights(model, weights)
    path = Path(model).expanduser()
    if path.is_file():
        raise ModelFileInvalid(f"{model} is a file, and vLLM reads folders: {_how_to_convert(model)}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelFileInvalid(f"{model} is not a Hugging Face folder: it has no config.json")
        return ResolvedWeights(path.absolute().name, str(path.absolute()))
    if _REPOSITORY.fullmatch(model):
        return ResolvedWeights(model.rpartition("/")[2], model)
    return ResolvedWeights(registry.entry(model).name, model)  # it is no name: raises, with the nearest ones


def folder_sha256(folder: Path) -> str:
    """In hexadecimal, of all in a Hugging Face folder that its hidden states depend on: config.json and the
    weights, by their names. Reads all of them."""
    files = {folder / "config.json"}.union(*(folder.glob(pattern) for pattern in _WEIGHTS))
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _how_to_convert(file: str) -> str:
    return f"run `duet-cloud convert {file} DIR` and serve DIR"
