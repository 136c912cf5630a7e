"""The pair of models that tests make themselves, once for all of them."""

from __future__ import annotations

import pytest

from tests.tiny_pair import TinyPair, write_tiny_pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny_pair"))
