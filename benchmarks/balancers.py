"""nginx and Envoy in front of replicas on this machine, as deploy/loadbalancer configures them.

Only addresses are replaced: the port that is listened on and those of the replicas.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from edge_agent.access import Access
from edge_agent.remote import Cloud
from tests.ports import free_port

CONFIGURATIONS = Path(__file__).parents[1] / "deploy" / "loadbalancer"


@dataclass(frozen=True, slots=True)
class Balancer:
    address: str
    ca: bytes
    """The certificate that it shows vouches for itself."""
    reload: Callable[[Sequence[str]], None]
    """Take these replicas from now on; streams that run are left alone. nginx only."""

    def cloud(self) -> Cloud:
        """A client of an edge, over TLS."""
        access = Access(grpc.ssl_channel_credentials(self.ca))
        return Cloud(self.address, connect_timeout_s=5, silence_timeout_s=60, access=access)


@contextmanager
def nginx(replicas: Sequence[str], folder: Path) -> Iterator[Balancer]:
    """nginx over the replicas; its files lie in `folder`, which is new."""
    ca = _certificate(folder / "tls")
    (folder / "temp").mkdir()
    port = free_port()
    text = (CONFIGURATIONS / "nginx.conf").read_text()
    (folder / "nginx.conf").write_text(text.replace("listen 8443", f"listen 127.0.0.1:{port}"))

    def write(addresses: Sequence[str]) -> None:
        lines = [f"server {address} max_fails=0;\n" for address in addresses]
        (folder / "replicas.conf").write_text("".join(lines))

    program = shutil.which("nginx") or "/usr/sbin/nginx"
    start = [program, "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"]

    def reload(addresses: Sequence[str]) -> None:
        write(addresses)
        subprocess.run([*start[:5], "-s", "reload"], check=True, capture_output=True)

    write(replicas)
    with _running(start, port):
        yield Balancer(f"localhost:{port}", ca, reload)


@contextmanager
def envoy(replicas: Sequence[str], folder: Path) -> Iterator[Balancer]:
    """Envoy over the replicas; its files lie in `folder`, which is new."""
    ca = _certificate(folder / "tls")
    port = free_port()
    config = yaml.safe_load((CONFIGURATIONS / "envoy.yaml").read_text())
    [listener] = config["static_resources"]["listeners"]
    listener["address"] = _envoy_address(f"127.0.0.1:{port}")
    [cluster] = config["static_resources"]["clusters"]
    [group] = cluster["load_assignment"]["endpoints"]
    group["lb_endpoints"] = [{"endpoint": {"address": _envoy_address(replica)}} for replica in replicas]
    config["admin"]["address"] = _envoy_address(f"127.0.0.1:{free_port()}")
    (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
    program = str(Path(sys.executable).with_name("envoy"))
    options = ["--use-dynamic-base-id", "--concurrency", "2", "--log-level", "error"]
    with _running([program, "-c", "envoy.yaml", *options], port, folder):

        def fixed(addresses: Sequence[str]) -> None:
            raise NotImplementedError("Envoy finds out by its health checks")

        yield Balancer(f"localhost:{port}", ca, fixed)


def _envoy_address(address: str) -> dict[str, object]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _certificate(folder: Path) -> bytes:
    """Write cert.pem and key.pem for localhost; returns the certificate."""
    folder.mkdir(parents=True)
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*make, "-days", "1", *files, *names], check=True, capture_output=True)
    return (folder / "cert.pem").read_bytes()


@contextmanager
def _running(command: list[str], port: int, folder: Path | None = None) -> Iterator[None]:
    """A balancer that listens; ended with the block."""
    name = Path(command[0]).name
    if not Path(command[0]).exists():
        raise SystemExit(f"{name} is missing: run `make deploy-tools`")
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 20
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                _, said = process.communicate()
                reason = " ".join(said.split())[-500:]
                raise SystemExit(f"{name} did not start: {reason}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
