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
    connections: list[bytearray] = field(default_factory=list)
    """What came from edges on each that reached the cloud."""

    @property
    def received(self) -> bytes:
        """Of all connections."""
        return b"".join(self.connections)

    @property
    def num_call_bytes(self) -> int:
        """Of what calls consist of: HTTP/2's HEADERS, CONTINUATION and DATA frames (RFC 9113, section 6). A
        channel that connects again by itself, which gRPC's do, sends none of them."""
        return sum(map(_num_call_bytes, self.connections))


def _num_call_bytes(received: bytearray) -> int:
    num, at = 0, _PREFACE_BYTES
    while at + 4 <= len(received):
        frame_bytes = _FRAME_HEAD_BYTES + int.from_bytes(received[at : at + 3], "big")
        num += frame_bytes if received[at + 3] in (_HEADERS, _CONTINUATION, _DATA) else 0
        at += frame_bytes
    return num


_PREFACE_BYTES, _FRAME_HEAD_BYTES = 24, 9
_DATA, _HEADERS, _CONTINUATION = 0, 1, 9


@asynccontextmanager
async def wiretap(target: str) -> AsyncIterator[Wiretap]:
    """Listen on a free port. While nothing listens at `target`, a connection ends at once."""
    tap = Wiretap()
    host, port = target.split(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, recorded: bytearray | None
    ) -> None:
        try:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    if recorded is not None:
                        recorded += data
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
        tap.connections.append(bytearray())
        tasks.add(asyncio.create_task(pump(reader, cloud_writer, tap.connections[-1])))
        tasks.add(asyncio.create_task(pump(cloud_reader, writer, None)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    tap.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
