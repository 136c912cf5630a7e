"""Whether the service of these settings answers: for containers, Kubernetes and scripts."""

from __future__ import annotations

import socket
import ssl

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.config import CloudConfig
from shared.errors import CloudUnavailable


def check_health(config: CloudConfig, timeout_s: float) -> None:
    """Ask the standard health service; with TLS, whose clients need certificates, see that it shakes hands.

    Raises:
        CloudUnavailable: nothing answers, or it does not serve: it starts, drains, or its engine has died.
    """
    host, _, port = config.listen.rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    if config.tls_cert is None:
        _ask(f"{here}:{port}", timeout_s)
    else:
        _shake_hands(here.strip("[]"), int(port), timeout_s)


def _ask(address: str, timeout_s: float) -> None:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise CloudUnavailable(f"nothing answers at {address}: {error.code().name.lower()}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise CloudUnavailable(f"the service at {address} does not serve: it starts, drains or has failed")


def _shake_hands(host: str, port: int, timeout_s: float) -> None:
    # It is our own service on this machine: there is nobody to tell it from.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout_s) as plain, context.wrap_socket(plain):
            pass
    except OSError as error:
        raise CloudUnavailable(f"nothing answers at {host}:{port}: {error.strerror or error}") from None
