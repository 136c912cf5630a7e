from __future__ import annotations

import os

import pytest

# A terminal under test is forked beside gRPC's threads: handlers could hang the child before it is duet.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from tests.tiny_pair import TinyPair, write_tiny_pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny_pair"))
