"""systemd units and the install script."""

from __future__ import annotations

import os
import sys

import pytest

from tests.deploy.conftest import DEPLOY
from tests.deploy.tools import output, run

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
INSTALL = DEPLOY / "install.sh"
ROOT = DEPLOY.parent


def install(*arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    done = run("bash", INSTALL, *arguments, env={**os.environ, "PYTHON": sys.executable})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_but_that_it_is_not_installed_here(unit):
    done = run("systemd-analyze", "verify", unit)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert all("/opt/duet/bin/" in line and "not executable" in line for line in complaints), complaints


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_exposes_little(unit):
    report = output("systemd-analyze", "security", "--offline=true", unit)
    exposure = float(report.rsplit("level for", 1)[1].split(":")[1].split()[0])
    assert exposure <= 2.5, report


@pytest.mark.parametrize(
    "script",
    [*sorted(DEPLOY.rglob("*.sh")), *sorted(ROOT.glob("ci/*.sh")), ROOT / ".ci" / "run"],
    ids=lambda s: s.name,
)
def test_shellcheck_finds_nothing(script):
    output("shellcheck", script)


@pytest.mark.parametrize(
    ("arguments", "unit", "extra", "settings"),
    [
        (["--role", "cloud", "--engine", "vllm"], "duet-cloud.service", "[vllm]", "duet-cloud-vllm.yaml"),
        (
            ["--role", "cloud", "--engine", "llama-cpp"],
            "duet-cloud.service",
            "[cloud]",
            "duet-cloud-llama-cpp.yaml",
        ),
        (["--role", "edge"], "duet-edge.service", "[edge]", "duet.yaml"),
    ],
    ids=["a GPU server", "a server without a GPU", "an edge"],
)
def test_a_dry_run_prints_each_step_and_takes_none(arguments, unit, extra, settings):
    code, printed = install(*arguments, "--dry-run")
    assert code == 0, printed
    for step in (
        f"+ systemctl enable {unit}",
        extra,
        f"{settings} /etc/duet/",
        "/opt/duet/bin/python -m pip install",
    ):
        assert step in printed
    assert not os.path.exists("/opt/duet")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--role cloud or --role edge"),
        (["--role", "boat"], "unknown role boat"),
        (["--role"], "--role needs a value"),
        (["--role", "edge", "--engine", "vllm"], "--engine is for a cloud"),
        (["--role", "cloud", "--engine", "steam"], "unknown engine steam"),
        (["--roel", "cloud"], "unknown option --roel"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said):
    code, printed = install(*arguments, "--dry-run")
    assert code == 2
    assert said in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_python_that_is_too_old_or_missing_is_named():
    done = run("bash", INSTALL, "--role", "edge", "--dry-run", env={**os.environ, "PYTHON": "python2.7"})
    assert done.returncode == 1
    assert "python2.7 is not Python 3.10 to 3.13" in done.stderr


@pytest.mark.parametrize("name", ["duet-cloud-vllm.yaml", "duet-cloud-llama-cpp.yaml", "duet.yaml"])
def test_the_settings_that_are_installed_can_be_read(name):
    from shared.config import CloudConfig, EdgeConfig
    from shared.settings import load

    cls, prefix = (EdgeConfig, "DUET_") if name == "duet.yaml" else (CloudConfig, "DUET_CLOUD_")
    settings, origin = load(cls, flags={}, file=DEPLOY / name, file_name=name, env_prefix=prefix)
    assert settings
    assert origin["model"] != "default"
