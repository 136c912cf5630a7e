"""Named models: what they are (`registry`), where they come from (`sources`), where they lie (`cache`)."""

from __future__ import annotations

from shared.models.cache import ModelCache, ResolvedModel, default_cache_dir, file_sha256, resolve
from shared.models.registry import ModelEntry, Registry
from shared.models.sources import Progress
from shared.models.weights import ResolvedWeights, folder_sha256, resolve_weights

__all__ = [
    "ModelCache",
    "ModelEntry",
    "Progress",
    "Registry",
    "ResolvedModel",
    "ResolvedWeights",
    "default_cache_dir",
    "file_sha256",
    "folder_sha256",
    "resolve",
    "resolve_weights",
]
