"""Help ends in examples that are real commands, and shells complete commands, modes and models."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from docs.cli_page import PROGRAMS, commands
from tests.service import clean_environment, command

COMMANDS = dict(
    pair for program, app in PROGRAMS.items() for pair in commands(typer.main.get_command(app), program)
)


def examples(path: str) -> list[str]:
    return [line[2:] for line in (COMMANDS[path].epilog or "").split("\n\n") if line.startswith("$ ")]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_examples_of_itself(path):
    """A new command needs a line in its program's examples.py."""
    assert examples(path)
    assert all(path in example for example in examples(path))


@pytest.mark.parametrize("path", COMMANDS)
def test_the_options_of_examples_are_there(path):
    known = {name for option in COMMANDS[path].params for name in (*option.opts, *option.secondary_opts)}
    for example in examples(path):
        used = example[example.index(path) :].split(" | ")[0].partition(')"')[0].split()
        named = {word.partition("=")[0] for word in used if word.startswith("--")}
        assert {name for name in named if not name.startswith("--engine.")} <= known, example


@pytest.mark.parametrize(
    ("program", "typed", "offered"),
    [
        pytest.param("duet", "duet do", {"doctor"}, id="a command"),
        pytest.param("duet", "duet models p", {"pull", "path"}, id="a command of a group"),
        pytest.param(
            "duet", "duet ask --mode ", {"auto", "local", "cloud", "speculate", "guide"}, id="the modes",
        ),
        pytest.param("duet", "duet models pull qwen2.5-coder-0", {"qwen2.5-coder-0.5b"}, id="a model"),
        pytest.param("duet-cloud", "duet-cloud conv", {"convert"}, id="a command of the service"),
    ],
)  # fmt: skip
def test_a_shell_completes(program: str, typed: str, offered: set[str], tmp_path: Path) -> None:
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = typed.split(" ")
    done = subprocess.run(
        [command(program)],
        env=clean_environment(tmp_path)
        | {variable: "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


NO_DETECTION = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
"""Typer takes the shell that is named, and does not look for the one that runs it, which CI has none of."""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_can_be_shown(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_DETECTION, "1")
    for program, app in PROGRAMS.items():
        done = CliRunner().invoke(app, ["--show-completion", shell], prog_name=program)
        assert done.exit_code == 0, done.output
        assert f"_{program.replace('-', '_').upper()}_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_tells_its_version(program: str) -> None:
    said = CliRunner().invoke(PROGRAMS[program], ["--version"])
    assert (said.exit_code, said.stdout) == (0, f"{program} {version('duet-llm')}\n")
