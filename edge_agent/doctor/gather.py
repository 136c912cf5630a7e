"""Looks at this machine, the model's file and the cloud, and measures both. Changes and downloads nothing."""

from __future__ import annotations

import asyncio
import platform
import sys
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from edge_agent.bench import forecast, measure_drafting, measure_link
from edge_agent.doctor.facts import CloudFacts, EngineFacts, Facts, ModelFacts, TlsFacts
from edge_agent.doctor.handshake import shake_hands
from edge_agent.edge_model import EdgeModel
from edge_agent.opening import open_parts
from edge_agent.remote import Cloud
from edge_agent.routing.calibration import Calibration, find_calibration
from edge_agent.routing.router import limits_of
from shared.config import EdgeConfig
from shared.errors import DuetError, VocabularyMismatch
from shared.models import ModelCache, Registry, default_cache_dir, file_sha256, resolve
from shared.routing import Decision, Link, decide
from shared.vocab import ids_to_mask

ACCEPTANCE_RATE = 0.8
"""Assumed by the forecast."""
_USUAL_TOKENS = 64
"""Of the answers that the outlook is about."""


async def gather(settings: EdgeConfig) -> Facts:
    """All facts. What fails becomes a fact, too.

    Raises:
        InvalidSetting: the calibration that the settings name cannot be used.
    """
    available = psutil.virtual_memory().available
    engine = _engine()
    model = await asyncio.to_thread(_model, settings)
    asks = settings.mode != "local" and not settings.private
    tls = await asyncio.to_thread(_tls, settings) if asks else ()
    async with AsyncExitStack() as stack:
        cloud, cloud_error = await _opened_cloud(stack, settings) if asks else (None, None)
        edge, load_error = None, None
        usable = model.path is not None and model.sha256 == (model.expected_sha256 or model.sha256)
        if engine is not None and usable and model.error is None and model.size_bytes < available:
            edge, load_error = await _opened_edge(stack, settings)
        about_cloud = await _cloud(cloud, cloud_error, edge, settings) if asks else None
        draft = await measure_drafting(edge) if edge is not None else None
        link, measure_error = None, None
        rtt_s = None
        if cloud is not None:
            try:
                rtt_s = await cloud.ping()
                link = await measure_link(cloud)
            except DuetError as error:
                measure_error = str(error)
        calibration = _calibration(settings, model)
        up = about_cloud is not None and about_cloud.error is None
        detail = "" if about_cloud is None or about_cloud.error is None else about_cloud.error
        seen = Link(up=up, rtt_s=rtt_s, detail=detail or "not asked")
        can_draft = edge is None or edge.can_draft
        return Facts(
            settings=settings,
            python=sys.version_info[:3],
            system=f"{platform.system()} {platform.machine()}",
            engine=engine,
            available_bytes=available,
            model=replace(model, error=model.error or load_error),
            cache_bytes=_cache_bytes(edge),
            tls=tls,
            cloud=about_cloud,
            unix_time=time.time(),
            calibration=calibration.fitted_on if calibration else None,
            threshold=limits_of(settings, calibration).threshold,
            easy=_decision(0.0, seen, settings, calibration, can_draft=can_draft),
            hard=_decision(1.0, seen, settings, calibration, can_draft=can_draft),
            draft=draft,
            link=link,
            measure_error=measure_error,
            forecast=tuple(forecast(draft, link, ACCEPTANCE_RATE)) if draft and link else (),
            acceptance_rate=ACCEPTANCE_RATE,
        )


def _engine() -> EngineFacts | None:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):  # a build for another CPU or another C library
        return None
    said = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in said.split("|") if "=" in part)
    return EngineFacts(
        version=llama_cpp.__version__,
        features={name.strip(): value.strip() == "1" for name, _, value in pairs},
        offloads=bool(llama_cpp.llama_supports_gpu_offload()),
        cpu_flags=_cpu_flags(),
    )


def _cpu_flags() -> frozenset[str]:
    """Empty where the system has no such file."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def _model(settings: EdgeConfig) -> ModelFacts:
    """The file as it lies there; nothing is pulled."""
    registry = Registry.load()
    entry = registry.entry(settings.model) if settings.model in registry else None
    if entry is None:
        try:
            found = resolve(settings.model, registry)
        except DuetError as error:
            return ModelFacts(settings.model, None, 0, None, None, str(error))
        return ModelFacts(found.name, str(found.path), found.path.stat().st_size, None, None, None)
    path = ModelCache(default_cache_dir()).path(entry)
    if not path.is_file():
        return ModelFacts(entry.name, None, entry.size_bytes, entry.sha256, None, None)
    return ModelFacts(entry.name, str(path), path.stat().st_size, entry.sha256, file_sha256(path), None)


async def _opened_cloud(stack: AsyncExitStack, settings: EdgeConfig) -> tuple[Cloud | None, str | None]:
    try:
        asked = settings.model_copy(update={"mode": "cloud"})
        _, cloud = await stack.enter_async_context(open_parts(asked))
    except DuetError as error:
        return None, str(error)
    return cloud, None


async def _opened_edge(stack: AsyncExitStack, settings: EdgeConfig) -> tuple[EdgeModel | None, str | None]:
    try:
        loaded = settings.model_copy(update={"mode": "auto", "drafters": ("model",)})
        edge, _ = await stack.enter_async_context(open_parts(loaded))
    except DuetError as error:
        return None, str(error)
    return edge, None


async def _cloud(
    cloud: Cloud | None, error: str | None, edge: EdgeModel | None, settings: EdgeConfig
) -> CloudFacts:
    facts = CloudFacts(settings.cloud, error)
    if cloud is None:
        return facts
    try:
        info = await cloud.describe()
    except DuetError as failed:
        return replace(facts, error=str(failed), replicas=tuple(cloud.replicas))
    facts = replace(
        facts,
        replicas=tuple(cloud.replicas),
        model=info.model,
        target=info.target,
        context_tokens=info.context_tokens,
        clock_ahead_s=info.clock_ahead_s,
    )
    if edge is None:
        return facts
    try:
        masked = await asyncio.to_thread(ids_to_mask, edge.model.vocabulary, info.vocabulary)
    except VocabularyMismatch as mismatch:
        return replace(facts, vocabulary_error=str(mismatch))
    return replace(facts, num_masked=len(masked))


def _tls(settings: EdgeConfig) -> tuple[TlsFacts, ...]:
    if not settings.encrypts:
        return ()
    return tuple(shake_hands(address, settings) for address in settings.cloud.split(","))


def _cache_bytes(edge: EdgeModel | None) -> int | None:
    if edge is None:
        return None
    return edge.context.context_tokens * edge.model.cache_bytes_per_token("f16")


def _calibration(settings: EdgeConfig, model: ModelFacts) -> Calibration | None:
    named = Path(settings.routing_calibration).expanduser() if settings.routing_calibration else None
    path = model.path
    if path is None:
        return None
    return find_calibration(model.name, lambda: model.sha256 or file_sha256(Path(path)), named)


def _decision(
    p_cloud: float, link: Link, settings: EdgeConfig, calibration: Calibration | None, *, can_draft: bool
) -> Decision:
    return decide(
        p_cloud=p_cloud,
        predicted_tokens=_USUAL_TOKENS,
        link=link,
        private="the setting private" if settings.private else None,
        fits_edge=True,
        can_draft=can_draft,
        limits=limits_of(settings, calibration),
    )
