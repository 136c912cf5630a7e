from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_pair import TinyPair, write_tiny_pair

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder that an operator takes."""
    return DEPLOY


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny_pair"))
