"""The README is true: its commands run, and print what it says they print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import clean_environment, running_serve
from tests.service import command as command_path

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n(.*?)```", README, flags=re.S)
COMMANDS = [line[2:] for block in CONSOLE for line in block.splitlines() if line.startswith("$ ")]
INSTALLS = ("make ", "pip ", "git ", "cd ")
"""These are run by CI itself, or would change the environment that the test runs in."""


def duet_commands() -> list[str]:
    return [c for c in COMMANDS if not c.startswith((*INSTALLS, "duet-cloud serve"))]


def test_every_command_is_one_that_is_run():
    assert duet_commands()
    assert all(c.startswith("duet ") for c in duet_commands()), COMMANDS
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(c.startswith("duet-cloud serve") for c in COMMANDS)


@pytest.mark.parametrize("command", duet_commands())
def test_a_command_of_the_readme_runs(command, real_cloud, tmp_path):
    environment = clean_environment(tmp_path, {"DUET_CLOUD": real_cloud.address})
    environment["HOME"] = str(Path.home())  # the models are there
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("duet-cloud serve")])
def test_a_service_of_the_readme_starts_and_stops(command, tmp_path):
    arguments = re.sub(r"--listen \S+", "--listen 127.0.0.1:0", command).split()[1:]
    process = subprocess.Popen(
        [command_path("duet-cloud"), *arguments],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | {"HOME": str(Path.home())},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening on ")
    process.terminate()
    assert process.wait(30) == 0


def test_the_openai_client_of_the_readme_prints_what_it_says(real_cloud, draft_path, tmp_path):
    [code] = re.findall(r"```python\n(from openai.*?)```", README, flags=re.S)
    env = {"HOME": str(Path.home())}
    with running_serve(draft_path, env=env, cloud=real_cloud.address) as server:
        (tmp_path / "app.py").write_text(code.replace("http://127.0.0.1:8080", server.address))
        result = subprocess.run(
            [sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert result.returncode == 0, result.stderr
    answer, figures, call = result.stdout.splitlines()
    assert answer.startswith("The three primary colours of light are")
    assert figures.startswith(" speculate ")
    assert call.startswith("""tool_calls Function(arguments='{"city": "Oslo"}', name='get_weather')""")


def test_the_demo_answers_in_three_modes_and_compares_them():
    result = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    for mode in ("local", "cloud", "speculate"):
        assert f"duet ask --mode {mode}" in result.stdout
    print(result.stdout)
    table = result.stdout[result.stdout.index("The same question, three ways") :]
    assert re.search(r"│ speculate .*│ +\d\.\d\d │", table)
