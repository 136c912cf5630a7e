"""The process around the HTTP application: the address, TLS, signals, a stop that lets answers finish."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn

from edge_agent.http.app import create_app
from edge_agent.opening import open_agent
from shared import tracing
from shared.addresses import check_exposure
from shared.config import EdgeConfig
from shared.errors import AddressInUse, InvalidSetting
from shared.logs import configure_logging
from shared.pem_files import check_pair

_FINISH_S = 10.0
"""Seconds that running answers get after a signal to stop."""
_LOOK_S = 1.0
"""How often the files of the certificate are looked at."""


async def serve(settings: EdgeConfig, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_ready: called with the URL once requests are answered.
    Raises:
        AddressInUse: the address cannot be bound.
        InvalidSetting: it is open to other machines, and neither protected nor meant to be; or the
            certificate and its key cannot be used.
        DuetError: see `open_agent`.
    """
    check_exposure(
        f"{settings.host}:{settings.port}",
        encrypted=settings.tls_cert is not None,
        authenticated=settings.api_key is not None,
        insecure=settings.serve_insecure,
        remedy="set tls_cert, tls_key and api_key, or serve_insecure where the network itself is trusted",
    )
    if settings.tls_cert is not None and settings.tls_key is not None:
        check_pair(Path(settings.tls_cert), Path(settings.tls_key))
    configure_logging(settings.log_format, settings.log_level)
    tracing.send_to(settings.traces_to, "duet")
    with _bound(settings.host, settings.port) as listening:
        scheme = "https" if settings.tls_cert else "http"
        host, port = listening.getsockname()[:2]
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        async with open_agent(settings, num_slots=settings.slots) as agent:
            key = settings.api_key
            app = create_app(agent, api_key=None if key is None else key.get_secret_value())
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
                timeout_graceful_shutdown=int(_FINISH_S),
            )
            config.load()
            server = _Server(config, lambda: on_ready(url))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            async with _renewed(config.ssl, settings):
                await server.serve(sockets=[listening])


@asynccontextmanager
async def _renewed(context: ssl.SSLContext | None, settings: EdgeConfig) -> AsyncIterator[None]:
    """Meanwhile, new connections get what lies in the files; half a renewal, or garbage, changes nothing."""
    if context is None or settings.tls_cert is None or settings.tls_key is None:
        yield
        return
    looking = asyncio.create_task(_renew(context, Path(settings.tls_cert), Path(settings.tls_key)))
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait({looking})


async def _renew(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    stamp = _stamp(cert, key)
    while True:
        await asyncio.sleep(_LOOK_S)
        if (now := _stamp(cert, key)) == stamp:
            continue
        try:
            check_pair(cert, key)  # first: a pair that does not fit would spoil the context
        except InvalidSetting:
            continue  # half written, most likely
        context.load_cert_chain(cert, key, password="")
        stamp = now


def _stamp(*paths: Path) -> list[tuple[int, int]]:
    """Tells whether one of the files has changed; empty where one is missing."""
    try:
        return [(stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in paths)]
    except OSError:
        return []


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals to us: uvicorn would raise them again after its end."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.should_exit = True


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise AddressInUse(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --host and"
            " --port (port 0 takes a free one)"
        ) from None
    with listening:
        yield listening
