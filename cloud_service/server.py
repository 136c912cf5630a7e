"""The process around the servicer: model, listening address, health, reflection, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_service.guards import Guards
from cloud_service.malformed import MalformedRequests
from cloud_service.observing import CallIdentity
from cloud_service.servicer import SpeculationServicer
from cloud_service.targets.base import Target
from cloud_service.tenants import read_tenants
from cloud_service.tls import server_credentials
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.addresses import check_exposure, is_loopback
from shared.config import CloudConfig
from shared.errors import AddressInUse, CloudUnavailable

log = structlog.get_logger("duet.cloud")

SERVICE = pb2.DESCRIPTOR.services_by_name["SpeculationService"].full_name

KEEPALIVE = (
    # An edge that fell silent without a word is noticed, and its slot freed, within twice this.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Edges may ask as often as `dead_link_s` allows; gRPC's own default takes that for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 250),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 250),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.max_pings_without_data", 0),
)
OPTIONS = (
    # Two services on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", wire.MAX_REQUEST_BYTES),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 1024),
    *KEEPALIVE,
)
_MAX_CALLS = 4096
"""Calls at once, those that have not said anything yet included; gRPC refuses more."""


def check_trust(config: CloudConfig) -> None:
    """Say what would keep the service from being trusted, before a model is pulled for nothing.

    Raises:
        InvalidSetting: it would be open to other machines unasked, or a certificate cannot be used.
    """
    check_exposure(
        config.listen,
        encrypted=config.tls_cert is not None,
        authenticated=config.tokens is not None or config.tls_client_ca is not None,
        insecure=config.insecure,
        remedy="set tls_cert and tls_key (`duet-cloud certs` makes them) and tokens (`duet-cloud tokens add`)"
        ", or take --insecure",
    )
    if config.insecure and not is_loopback(config.listen):
        log.warning("open to other machines without TLS or without asking who calls", listen=config.listen)
    server_credentials(config)
    if config.tokens is not None:
        read_tenants(Path(config.tokens))


async def serve(
    config: CloudConfig,
    load: Callable[[], Target],
    *,
    on_ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Listen until SIGTERM or SIGINT, then drain.

    Args:
        load: makes the target, in a thread; called once the address is known to be free.
        on_ready: called with HOST:PORT once requests are answered.
    Raises:
        AddressInUse: the address cannot be bound.
        ModelError, InvalidSetting: from `load`.
        CloudUnavailable: the target's engine died.
    """
    credentials = server_credentials(config)
    server = grpc.aio.server(
        interceptors=[CallIdentity(), MalformedRequests()],
        options=OPTIONS,
        maximum_concurrent_rpcs=_MAX_CALLS,
    )
    address = _bind(server, config.listen, credentials)
    target = await asyncio.to_thread(load)
    await target.warm_up()
    guards = Guards.of(config, target)
    servicer = SpeculationServicer(
        target,
        guards,
        max_draft_tokens=config.max_draft_tokens,
        lossy_policies=config.lossy_policies,
        log_texts=config.log_texts,
    )
    health_servicer = health.aio.HealthServicer()
    pb2_grpc.add_SpeculationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
    log.info(
        "serving",
        address=address,
        model=target.name,
        target=target.engine,
        verification=target.verification,
        context_tokens=target.context_tokens,
    )
    keeping = asyncio.create_task(guards.quotas.keep())
    asked = _stop_signal()  # before anybody is told that the service is there
    try:
        with servicer.metrics.served(config.metrics_listen):
            on_ready(address)
            died = await _died_before(asked, target)
            await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
            if died:
                raise CloudUnavailable(f"the {target.engine} engine has died; its log says why")
            log.info("draining", streams=servicer.num_streams, seconds=config.drain_s)
            await servicer.drain(config.drain_s)
    finally:
        await server.stop(grace=1.0)
        await target.close()
        keeping.cancel()
        await asyncio.wait({keeping})
        log.info("stopped")


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """Take the address; returns it with the port that port 0 became."""
    host, _, _ = listen.rpartition(":")
    try:
        if credentials is None:
            return f"{host}:{server.add_insecure_port(listen)}"
        return f"{host}:{server.add_secure_port(listen, credentials)}"
    except RuntimeError:
        raise AddressInUse(
            f"cannot listen on {listen}: the port is in use or the address is not this machine's;"
            " choose another with --listen HOST:PORT (port 0 takes a free one)"
        ) from None


async def _set_health(
    servicer: health.aio.HealthServicer, status: health_pb2.HealthCheckResponse.ServingStatus
) -> None:
    for service in ("", SERVICE):
        await servicer.set(service, status)


def _stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT from now on."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    return asked


async def _died_before(asked: asyncio.Event, target: Target) -> bool:
    """Wait for the signal; true where the engine died first."""
    waits = {asyncio.create_task(asked.wait()), asyncio.create_task(target.failed())}
    _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return not asked.is_set()
