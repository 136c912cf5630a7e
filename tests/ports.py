"""Ports of this machine, for tests and benchmarks that must know one before anybody listens on it."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
