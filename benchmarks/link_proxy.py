"""`duet-link`: a loopback TCP proxy that behaves like a slow or failing link, by a schedule.

    python -m benchmarks.link_proxy --listen 127.0.0.1:7001 --to 127.0.0.1:7000 --rtt-ms 50 --jitter-ms 5
    python -m benchmarks.link_proxy --listen 127.0.0.1:7001 --to 127.0.0.1:7000 --schedule link.yaml

A schedule is a list of phases; the last one holds from then on. Time 0 is when the proxy listens:

    seed: 1
    phases:
      - {for_s: 10, rtt_ms: 50, jitter_ms: 5, mbit_per_s: 20}
      - {for_s: 2, outage: true}
      - {rtt_ms: 200, stalls_per_s: 0.2, stall_ms: 300}

Each direction is one first-in-first-out line that all connections share. What is read waits for the line
(bandwidth), travels half the round trip and up to `jitter_ms` more, and is held while the line stalls. An
outage resets every connection and refuses new ones. The opening of a connection itself is not delayed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import struct
import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import AddressInUse, DuetError, InvalidSetting, outcome

_CHUNK_BYTES = 16_384
_CHUNKS_ON_THE_LINE = 256
"""Per connection and direction; the sender then waits, so that memory is bounded (4 MiB)."""


class Phase(BaseModel):
    """How the link behaves for a while."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    for_s: float | None = Field(None, gt=0.0)
    """Seconds; unset in the last phase and only there."""
    rtt_ms: float = Field(0.0, ge=0.0)
    """There and back; each way takes half of it."""
    jitter_ms: float = Field(0.0, ge=0.0)
    """Each way takes up to so much longer, uniformly; order is kept."""
    mbit_per_s: float | None = Field(None, gt=0.0)
    """Each way; unset is unlimited."""
    stalls_per_s: float = Field(0.0, ge=0.0)
    """How often each way stalls, as a Poisson process: a lost packet holds up all that follow it."""
    stall_ms: float = Field(200.0, gt=0.0)
    """How long a stall lasts: the sender's retransmission time."""
    outage: bool = False


class Schedule(BaseModel):
    """Phases one after the other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phases: tuple[Phase, ...] = Field(min_length=1)
    seed: int = 0

    @model_validator(mode="after")
    def _only_the_last_is_endless(self) -> Schedule:
        endless = [i for i, phase in enumerate(self.phases) if phase.for_s is None]
        if endless != [len(self.phases) - 1]:
            raise ValueError("every phase but the last needs for_s, and the last has none")
        return self

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Read a YAML file. Raises InvalidSetting."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InvalidSetting(f"cannot read the schedule {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise InvalidSetting(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            raise _invalid(str(path), error) from None

    @property
    def changes_s(self) -> list[float]:
        """When each phase after the first begins."""
        return list(accumulate(phase.for_s or 0.0 for phase in self.phases[:-1]))

    def at(self, seconds: float) -> Phase:
        """The phase in force. A phase holds from its first instant."""
        return self.phases[bisect_right(self.changes_s, seconds)]


def _invalid(where: str, error: ValidationError) -> InvalidSetting:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return InvalidSetting(f"{where}: {name + ': ' if name else ''}{first['msg']}")


class Line:
    """One direction of the link: decides when what is sent now arrives. Pure: times are passed in."""

    def __init__(self, schedule: Schedule, seed: int) -> None:
        self._schedule = schedule
        self._random = random.Random(seed)
        self._free_at = 0.0
        self._last_arrival = 0.0
        self._phase: Phase | None = None
        self._stall_at = float("inf")

    def arrival(self, now: float, num_bytes: int) -> float:
        """Seconds on the schedule's clock at which bytes that are sent at `now` arrive; never decreases."""
        phase = self._schedule.at(now)
        if phase is not self._phase:
            self._phase = phase
            self._stall_at = now + self._gap(phase)
        sending_s = num_bytes * 8e-6 / phase.mbit_per_s if phase.mbit_per_s else 0.0
        self._free_at = max(self._free_at, now) + sending_s
        travel_s = 1e-3 * (phase.rtt_ms / 2 + self._random.uniform(0.0, phase.jitter_ms))
        self._last_arrival = max(self._last_arrival, self._past_stalls(phase, self._free_at + travel_s))
        return self._last_arrival

    def _past_stalls(self, phase: Phase, arrival: float) -> float:
        while self._stall_at <= arrival:
            end = self._stall_at + 1e-3 * phase.stall_ms
            arrival = max(arrival, end)
            self._stall_at = end + self._gap(phase)
        return arrival

    def _gap(self, phase: Phase) -> float:
        return self._random.expovariate(phase.stalls_per_s) if phase.stalls_per_s else float("inf")


class LinkProxy:
    """Listens while its context is open; `address` is where."""

    def __init__(self, schedule: Schedule, *, listen: str, to: str) -> None:
        """
        Args:
            listen, to: HOST:PORT; port 0 listens on a free one.
        """
        self._schedule = schedule
        self._listen = _host_and_port(listen)
        self._to = _host_and_port(to)
        self._lines = tuple(Line(schedule, 2 * schedule.seed + way) for way in (0, 1))
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        host, port = self._reserved.getsockname()[:2]
        return f"{host}:{port}"

    async def __aenter__(self) -> LinkProxy:
        # Bound but never listening: the port stays ours through an outage, and connections are refused.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._reserved.bind(self._listen)
            self._began = asyncio.get_running_loop().time()
            await self._follow(self._schedule.phases[0])
        except OSError as error:
            self._reserved.close()
            host, port = self._listen
            raise AddressInUse(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
            ) from None
        self._clock = asyncio.create_task(self._run_schedule())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.cancel()
        await asyncio.gather(self._clock, return_exceptions=True)
        await self._go_down()
        self._reserved.close()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def _run_schedule(self) -> None:
        for begins, phase in zip(self._schedule.changes_s, self._schedule.phases[1:], strict=True):
            await asyncio.sleep(begins - self._now())
            await self._follow(phase)

    async def _follow(self, phase: Phase) -> None:
        if phase.outage:
            await self._go_down()
        elif self._server is None:
            host, port = self._reserved.getsockname()[:2]
            self._server = await asyncio.start_server(self._accept, host, port, reuse_address=True)

    async def cut(self) -> None:
        """Reset every connection, now; new ones are taken as before."""
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _go_down(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self.cut()
        if server is not None:
            await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._carry(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until both ways have ended, one of them breaks, or it is cut."""
        writers = [writer]
        ways: list[asyncio.Task[None]] = []
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            writers.append(far_writer)
            pairs = ((reader, far_writer), (far_reader, writer))
            for line, (source, sink) in zip(self._lines, pairs, strict=True):
                arriving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_ON_THE_LINE)
                ways.append(asyncio.create_task(self._send(source, line, arriving)))
                ways.append(asyncio.create_task(self._deliver(arriving, sink)))
            await asyncio.gather(*ways)
            for each in writers:
                each.close()
        except OSError:  # a reset on one side, or nobody at the far end: the other side gets a reset too
            pass
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in writers:
                if not each.is_closing():
                    _reset(each)

    async def _send(
        self, source: asyncio.StreamReader, line: Line, arriving: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while True:
            chunk = await source.read(_CHUNK_BYTES)
            await arriving.put((line.arrival(self._now(), len(chunk)), chunk))
            if not chunk:
                return

    async def _deliver(
        self, arriving: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        while True:
            due, chunk = await arriving.get()
            if (wait := due - self._now()) > 0.0:
                await asyncio.sleep(wait)
            if not chunk:
                sink.write_eof()
                return
            sink.write(chunk)
            await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Drop a connection so that the other side does not take it for a proper end."""
    linger_no_time = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_time)
    writer.transport.abort()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise InvalidSetting(f"{address!r} is not an address; write HOST:PORT, for example 127.0.0.1:7000")
    return host, int(port)


def _schedule(arguments: argparse.Namespace) -> Schedule:
    if arguments.schedule:
        return Schedule.load(arguments.schedule)
    fields: dict[str, Any] = {
        name: value for name in Phase.model_fields if (value := getattr(arguments, name, None)) is not None
    }
    try:
        return Schedule(phases=(Phase(**fields),), seed=arguments.seed)
    except ValidationError as error:
        raise _invalid("the link", error) from None


async def _serve(arguments: argparse.Namespace) -> None:
    async with LinkProxy(_schedule(arguments), listen=arguments.listen, to=arguments.to) as proxy:
        print(f"listening on {proxy.address}", flush=True)
        await asyncio.Event().wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="duet-link", description=__doc__.split("\n")[0])
    parser.add_argument("--listen", required=True, help="HOST:PORT; port 0 takes a free one")
    parser.add_argument("--to", required=True, help="HOST:PORT of the service")
    parser.add_argument("--schedule", type=Path, help="YAML file; without it, one phase from these:")
    for name in ("rtt_ms", "jitter_ms", "mbit_per_s", "stalls_per_s", "stall_ms"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--seed", type=int, default=0)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(parser.parse_args(arguments)))
    except DuetError as error:
        print(f"duet-link: {error}", file=sys.stderr)
        raise SystemExit(outcome(error).exit_code) from None


if __name__ == "__main__":
    main()
