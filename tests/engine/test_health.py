"""`duet-cloud health`, which containers and Kubernetes run beside the service."""

from __future__ import annotations

from pathlib import Path

from benchmarks.services import scripted_cloud
from tests.service import run_duet


def health(address: str, folder: Path) -> tuple[int, bytes]:
    env = {"DUET_CLOUD_LISTEN": address}
    done = run_duet("health", program="duet-cloud", folder=folder, env=env)
    return done.returncode, done.stdout + done.stderr


def test_a_service_that_answers_is_said_to_serve_and_one_that_is_gone_in_one_line_not(tmp_path: Path) -> None:
    with scripted_cloud() as (address, _):
        assert health(address, tmp_path) == (0, b"serving\n")
        everywhere = f"0.0.0.0:{address.rpartition(':')[2]}"
        assert health(everywhere, tmp_path)[0] == 0
    code, said = health(address, tmp_path)
    assert code == 5
    assert said.startswith(b"duet-cloud: nothing answers at 127.0.0.1:")
    assert said.count(b"\n") == 1
