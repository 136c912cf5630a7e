"""A proxy in front of a cloud that records all that comes in: the proof of what leaves the device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Wiretap:
    address: str = ""
    num_connections: int = 0
    received: bytearray = field(default_factory=bytearray)
    """From edges, of all connections."""


@asynccontextmanager
async def wiretap(target: str) -> AsyncIterator[Wiretap]:
    """Listen on a free port. While nothing listens at `target`, a connection ends at once."""
    tap = Wiretap()
    host, port = target.split(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, recorded: bool) -> None:
        try:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    if recorded:
                        tap.received += data
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tap.num_connections += 1
        try:
            cloud_reader, cloud_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        for pair, recorded in (((reader, cloud_writer), True), ((cloud_reader, writer), False)):
            tasks.add(asyncio.create_task(pump(*pair, recorded=recorded)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    tap.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
