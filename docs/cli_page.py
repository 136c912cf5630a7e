"""Writes docs/cli.md, the reference of both commands, from themselves: `python docs/cli_page.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cloud_service.cli import app as cloud_app
from edge_agent.cli import app as edge_app

PAGE = Path(__file__).parent / "cli.md"
PROGRAMS = {"duet": edge_app, "duet-cloud": cloud_app}


def page() -> str:
    """The whole page."""
    parts = [
        "<!-- Made by `python docs/cli_page.py`; do not edit. -->",
        "# Commands",
        "A setting may be given as an option, as a variable (`DUET_` or `DUET_CLOUD_` and its name), or in"
        " `duet.yaml` or `duet-cloud.yaml`: options win over variables over files over defaults.\n"
        "`--install-completion` installs completion for your shell.",
    ]
    for program, app in PROGRAMS.items():
        for path, command in commands(typer.main.get_command(app), program):
            parts += section(path, command)
    return "\n\n".join(parts) + "\n"


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands below one, groups left out, with their paths."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands(below, f"{path} {name}")


def section(path: str, command: Any) -> list[str]:
    """One command: what it does, what it takes, examples."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join([path, *map(_argument, arguments), "[OPTIONS]"])
    parts = [f"## {path}", f"```text\n{usage}\n```", _paragraphs(command.help)]
    rows = [(f"`{each.name.upper()}`", each.help) for each in arguments]
    rows += [
        (", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts)), each.help) for each in options
    ]
    if rows:
        lines = [f"| {_cell(name)} | {_cell(said or '')} |" for name, said in rows]
        parts.append("\n".join(["| | |", "|---|---|", *lines]))
    if command.epilog:
        parts.append("```console\n" + "\n".join(command.epilog.split("\n\n")[1:]) + "\n```")
    return parts


def _argument(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
