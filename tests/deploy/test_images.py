"""Images and the compose file: linted, and what they are built from is enough to build the package."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from shared.config import CloudConfig, EdgeConfig
from tests.deploy.conftest import DEPLOY
from tests.deploy.tools import output

DOCKER = DEPLOY / "docker"
IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
ROOT = DEPLOY.parent


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_hadolint_finds_nothing(file):
    output("hadolint", "--config", DOCKER / ".hadolint.yaml", file)


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_an_image_is_pinned_runs_without_root_and_tells_its_health(file):
    text = file.read_text()
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)$", text, re.MULTILINE):
        assert re.search(r":v?r?\d+\.\d+", image), f"{image} is not pinned"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001"
    assert "HEALTHCHECK" in text
    assert re.search(r'^ENTRYPOINT \["duet', text, re.MULTILINE)  # a signal reaches the service itself


def test_compose_reads_the_file_in_both_profiles():
    for profile in ([], ["--profile", "gpu"]):
        output("docker-compose", "-f", DOCKER / "compose.yaml", *profile, "config", "--quiet")


@pytest.mark.parametrize("prefix", ["DUET_CLOUD_", "DUET_"])
def test_environment_variables_in_images_and_compose_are_settings(prefix):
    known = CloudConfig.model_fields if prefix == "DUET_CLOUD_" else EdgeConfig.model_fields
    of_clouds = re.compile(r"\bDUET_CLOUD_(\w+)\s*[=:]")
    texts = [file.read_text() for file in (*IMAGES, DOCKER / "compose.yaml")]
    if prefix == "DUET_CLOUD_":
        used = {name for text in texts for name in of_clouds.findall(text)}
    else:
        used = {
            name for text in texts for name in re.findall(r"\bDUET_(\w+)\s*[=:]", of_clouds.sub("", text))
        }
    assert used
    assert {name.lower() for name in used} <= set(known)


def test_what_compose_mounts_is_there():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    mounted = [volume for service in services.values() for volume in service.get("volumes", [])]
    for volume in mounted:
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (DOCKER / source).exists(), source


def test_the_context_of_an_image_is_enough_to_build_the_package(tmp_path):
    context = tmp_path / "context"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for pattern in (line[1:] for line in ignored if line.startswith("!")):
        for source in ROOT.glob(pattern):
            target = context / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
            else:
                shutil.copy(source, target)
    wheels = tmp_path / "wheels"
    output(
        Path(sys.executable).name,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        wheels,
        context,
    )
    assert [wheel.name.split("-")[0] for wheel in wheels.iterdir()] == ["duet_llm"]
