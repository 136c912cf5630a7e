"""The two default models, pulled if they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.models import Registry, resolve
from tests.service import RunningServer, running_cloud


@pytest.fixture(scope="session")
def draft_path() -> Path:
    return resolve(DEFAULT_DRAFT, Registry.load()).path


@pytest.fixture(scope="session")
def target_path() -> Path:
    return resolve(DEFAULT_TARGET, Registry.load()).path


@pytest.fixture(scope="session")
def real_cloud(target_path) -> Iterator[RunningServer]:
    """`duet-cloud serve` with the default target, in a process of its own."""
    with running_cloud(target_path, threads=2, context_tokens=1024, slots=4) as cloud:
        yield cloud
