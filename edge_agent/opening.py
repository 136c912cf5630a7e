"""Opens what requests need: the edge model, the connection to the cloud, the router. Closes them, too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.config import EdgeConfig
from shared.errors import InvalidSetting
from shared.models import Registry, resolve
from shared.terminal import resolve_visibly

if TYPE_CHECKING:
    from edge_agent.agent import Agent
    from edge_agent.edge_model import EdgeModel
    from edge_agent.remote import Cloud
    from edge_agent.routing.router import Router


@asynccontextmanager
async def open_parts(
    settings: EdgeConfig, *, num_slots: int = 1
) -> AsyncIterator[tuple[EdgeModel | None, Cloud | None]]:
    """Load and connect what the mode needs, and nothing else; closed afterwards.

    Args:
        num_slots: requests that use the edge model at once.
    """
    # llama.cpp and gRPC take a moment to import: help and bad settings answer without them.
    from edge_agent.edge_model import EdgeModel
    from edge_agent.remote import Cloud

    if "model" not in settings.drafters and settings.mode in ("auto", "local", "guide"):
        raise InvalidSetting(
            f"mode {settings.mode} needs the edge model, which is not among the drafters; add"
            " --drafter model, or use --mode speculate"
        )
    edge = None
    async with AsyncExitStack() as stack:
        cloud = None
        if settings.mode != "local":
            cloud = await stack.enter_async_context(Cloud.of(settings))
            # `auto` does without a cloud, and asks for none if the prompt is private.
            if settings.mode != "auto":
                await cloud.check()  # before a model is pulled for nothing
        if settings.mode != "cloud" and "model" in settings.drafters:
            resolved = resolve_visibly(settings.model)
            edge = await EdgeModel.load(resolved.path, resolved.name, settings, num_slots=num_slots)
            stack.push_async_callback(edge.close)
        yield edge, cloud


@dataclass(frozen=True, slots=True)
class Parts:
    """An agent, and what it works with, as far as that is loaded."""

    agent: Agent
    edge: EdgeModel | None
    cloud: Cloud | None
    router: Router | None


@asynccontextmanager
async def open_all(settings: EdgeConfig, *, num_slots: int = 1) -> AsyncIterator[Parts]:
    """See `open_parts`."""
    from edge_agent.agent import Agent
    from edge_agent.speeds import Speeds, speeds_file

    async with open_parts(settings, num_slots=num_slots) as (edge, cloud):
        router = None
        if settings.mode == "auto":
            assert edge is not None
            assert cloud is not None
            router = _router(edge, cloud, settings, every=False)
        speeds = Speeds(speeds_file(settings))
        agent = Agent(settings, edge=edge, cloud=cloud, router=router, speeds=speeds)
        yield Parts(agent, edge, cloud, router)


@asynccontextmanager
async def open_agent(settings: EdgeConfig, *, num_slots: int = 1) -> AsyncIterator[Agent]:
    """See `open_parts`."""
    async with open_all(settings, num_slots=num_slots) as parts:
        yield parts.agent


@asynccontextmanager
async def open_router(settings: EdgeConfig, *, every: bool) -> AsyncIterator[Router]:
    async with open_parts(settings) as (edge, cloud):
        assert edge is not None
        assert cloud is not None
        yield _router(edge, cloud, settings, every=every)


def _router(edge: EdgeModel, cloud: Cloud, settings: EdgeConfig, *, every: bool) -> Router:
    from edge_agent.routing.router import load_router

    return load_router(edge, cloud, settings, lambda: model_sha256_of(settings), every=every)


def model_sha256_of(settings: EdgeConfig) -> str:
    """Of the edge model's file."""
    return resolve(settings.model, Registry.load()).sha256
