"""What a line that begins with a slash means. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from shared.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    """One of `COMMANDS`."""
    argument: str
    """The rest of the line; empty where there is none."""


COMMANDS = {
    "help": ("", "these lines"),
    "mode": ("[auto|local|cloud|speculate|guide]", "who answers from now on; without a name, who does now"),
    "route": ("[QUESTION]", "who would answer it, and why; without one, why the last answer came as it did"),
    "system": ("[TEXT|off]", "set, remove or show the system prompt"),
    "stats": ("", "what this chat took so far"),
    "save": ("NAME", "keep this chat"),
    "load": ("[NAME]", "go on with a saved chat; without a name, those that are saved"),
    "clear": ("", "forget what was said, and begin again"),
    "quit": ("", "leave; Ctrl-D does too"),
}  # fmt: skip
"""Name -> arguments, and what it does."""


def parse(line: str) -> Command | None:
    """Read a line; None where it is a message to the model.

    Raises:
        InvalidRequest: no such command; names the nearest one.

    >>> parse("/mode cloud")
    Command(name='mode', argument='cloud')
    >>> parse("What is 1/2?")
    """
    if not line.startswith("/"):
        return None
    name, _, argument = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        [near] = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        raise InvalidRequest(
            f"there is no /{name}; did you mean /{near}? /help lists the commands. To say this to the model,"
            " begin with a space"
        )
    return Command(name, argument.strip())


def help_lines() -> list[str]:
    """One line a command."""
    usages = {name: f"/{name} {arguments}".strip() for name, (arguments, _) in COMMANDS.items()}
    width = max(map(len, usages.values()))
    return [f"{usages[name]:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
