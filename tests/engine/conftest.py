from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

# A terminal under test is forked beside gRPC's threads: handlers could hang the child before it is duet.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from tests.service import TargetAlone
from tests.tiny_pair import TinyPair


@pytest.fixture(scope="module")
def alone(tiny_pair: TinyPair) -> Iterator[TargetAlone]:
    with closing(TargetAlone(tiny_pair.target_gguf)) as target:
        yield target
