"""`duet doctor` as a user runs it: all well, no cloud, another vocabulary, a damaged model file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.service import RunningServer, run_duet, running_cloud
from tests.tiny_pair import TinyPair, write_tiny_model

pytestmark = pytest.mark.engine

NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32") as cloud:
        yield cloud


class Doctor:
    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {"DUET_THREADS": "1", **env}

    def says(self, *arguments: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Any]]:
        """Exit code, findings by check, and the whole."""
        done = run_duet("doctor", "--json", *arguments, folder=self.folder, env=self.env)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        said = json.loads(done.stdout)
        return done.returncode, {finding["check"]: finding for finding in said["findings"]}, said


@pytest.fixture
def doctor(tiny_pair: TinyPair, tmp_path: Path, service: RunningServer) -> Doctor:
    return Doctor(tmp_path, {"DUET_CLOUD": service.address, "DUET_MODEL": str(tiny_pair.draft_gguf)})


def test_a_machine_where_all_is_well(doctor: Doctor) -> None:
    code, findings, said = doctor.says()
    assert code == 0
    good = ("python", "model", "memory", "clock", "cloud", "tls", "vocabulary", "link")
    assert {findings[check]["status"] for check in good} == {"ok"}
    assert said["measured"]["draft"]["draft_tokens_per_s"] > 0
    assert said["measured"]["link"]["rtt_s"] > 0
    assert set(said["measured"]["link"]["t_verify_s"]) == {"1", "2", "4", "8", "16"}
    assert said["auto"][1].startswith("auto answers other questions by speculate")


def test_for_people_each_finding_is_a_line_and_what_to_do_another(doctor: Doctor) -> None:
    done = run_duet("doctor", "--mode", "local", folder=doctor.folder, env=doctor.env)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    findings = lines[: lines.index("")]
    assert any(line.startswith("ok    cloud") and "mode local asks none" in line for line in findings)
    for line in findings:
        assert line.startswith(("ok  ", "warn", "fail")) or line.strip().startswith("to do: ")
    assert lines[-1].startswith("auto answers every question here")


@pytest.mark.parametrize(("mode", "code", "status"), [("auto", 0, "warn"), ("speculate", 1, "fail")])
def test_no_cloud_matters_as_much_as_the_mode_needs_it(
    doctor: Doctor, mode: str, code: int, status: str
) -> None:
    doctor.env["DUET_CLOUD"] = NOBODY
    got, findings, said = doctor.says("--mode", mode)
    assert (got, findings["cloud"]["status"]) == (code, status)
    assert "refuses connections" in findings["cloud"]["found"]
    assert "duet-cloud serve" in findings["cloud"]["do"]
    assert said["measured"]["link"] is None
    assert said["auto"][0].startswith("auto answers every question here: no cloud")


def test_another_vocabulary_is_found(doctor: Doctor, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", name="other", seed=2, rotate_bytes_by=1)
    doctor.env["DUET_MODEL"] = str(other.gguf)
    code, findings, _ = doctor.says()
    assert code == 0
    assert findings["vocabulary"]["status"] == "warn"
    assert "do not share a vocabulary" in findings["vocabulary"]["found"]


def test_a_damaged_model_file_is_found_and_not_loaded(
    doctor: Doctor, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    whole = tiny_pair.draft_gguf.read_bytes()
    entry = {
        "description": "a model of the test",
        "license": "none",
        "role": "draft",
        "vocabulary": "tiny",
        "file": "mine.gguf",
        "size_bytes": len(whole),
        "sha256": hashlib.sha256(whole).hexdigest(),
        "tested": True,
        "sources": [{"path": str(tiny_pair.draft_gguf)}],
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {"mine": entry}}))
    doctor.env |= {
        "DUET_MODELS_FILE": str(tmp_path / "models.yaml"),
        "DUET_CACHE_DIR": str(tmp_path / "cache"),
        "DUET_MODEL": "mine",
    }
    code, findings, _ = doctor.says()
    assert (code, findings["model"]["status"]) == (0, "warn")
    assert findings["model"]["do"] == "duet models pull mine"

    file = tmp_path / "cache" / "mine" / "mine.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, findings, said = doctor.says()
    assert (code, findings["model"]["status"]) == (1, "fail")
    assert "is damaged" in findings["model"]["found"]
    assert said["measured"]["draft"] is None

    assert run_duet("models", "pull", "mine", folder=tmp_path, env=doctor.env).returncode == 0
    code, findings, _ = doctor.says()
    assert (code, findings["model"]["status"]) == (0, "ok")
