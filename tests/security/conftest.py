from __future__ import annotations

from pathlib import Path

import pytest

from cloud_service.certificates import Pair, make_authority, make_client, make_server


class Team:
    """An authority and what it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca: Pair = make_authority(folder)
        self.server: Pair = make_server(folder, ["localhost", "127.0.0.1"])

    def client(self, name: str) -> Pair:
        return make_client(self.folder, name)


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    return Team(tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """Another authority, of which the team knows nothing."""
    return Team(tmp_path_factory.mktemp("strangers"))
