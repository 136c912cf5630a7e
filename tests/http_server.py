"""`duet serve` inside the test's own process, over the tiny pair: what requests hold can be counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn

from edge_agent.agent import Agent
from edge_agent.edge_model import EdgeModel
from edge_agent.http.app import create_app
from edge_agent.routing.router import load_router
from shared.config import EdgeConfig
from tests.service import (
    CONTEXT_TOKENS,
    InProcessCloud,
    connection,
    eventually,
    in_process_cloud,
    loaded_edge,
)
from tests.tiny_pair import TinyPair


@dataclass
class InProcessServer:
    url: str
    agent: Agent
    edge: EdgeModel
    cloud: InProcessCloud
    num_slots: int
    tasks_before: int

    @property
    def is_idle(self) -> bool:
        """No request holds or waits for anything, here or at the cloud."""
        return (
            self.edge.num_free_slots == self.num_slots and self.edge.num_waiting == 0 and self.cloud.is_idle
        )


@asynccontextmanager
async def in_process_server(
    pair: TinyPair,
    *,
    slots: int = 2,
    cloud_slots: int = 4,
    step_s: float = 0.0,
    api_key: str | None = None,
    stall_timeout_s: float = 30.0,
    send_buffer: int | None = None,
    **settings: object,
) -> AsyncIterator[InProcessServer]:
    """
    Args:
        slots: of the edge model.
        step_s: least duration of a pass of the target.
        send_buffer: bytes that the kernel keeps for a client.
    """
    async with (
        in_process_cloud(pair.target_gguf, slots=cloud_slots, step_s=step_s) as cloud,
        connection(cloud.address) as remote,
    ):
        config = EdgeConfig.model_validate(
            {
                "cloud": cloud.address,
                "max_tokens": 24,
                "threads": 1,
                "context_tokens": CONTEXT_TOKENS,
                **settings,
            }
        )
        async with loaded_edge(pair.draft_gguf, num_slots=slots, **dict(config)) as edge:
            router = load_router(edge, remote, config, lambda: "none", every=False)
            agent = Agent(config, edge=edge, cloud=remote, router=router)
            app = create_app(agent, api_key=api_key, stall_timeout_s=stall_timeout_s)
            async with _listening(app, send_buffer) as url:
                yield InProcessServer(url, agent, edge, cloud, slots, len(asyncio.all_tasks()))


@asynccontextmanager
async def _listening(app: object, send_buffer: int | None) -> AsyncIterator[str]:
    with socket.socket() as bound:
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))  # type: ignore[arg-type]
        serving = asyncio.create_task(server._serve([bound]))
        await eventually(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await serving
