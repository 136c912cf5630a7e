"""Prompts of the probes: text files that anybody may edit, checked when they are read.

A file is the prompt, in which `{question}` stands for the question. Where it ends in `{answer}`, one token
is read there instead of writing an answer; a first line `options: {...}` and a line `---` before the prompt
give the tokens that may stand there and what each is worth. A prompt that begins with `{question}` and reads
one token goes on after the chat as the model sees it, in the model's own mouth: such probes share one reading
of the question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from shared.errors import InvalidSetting

QUESTION = "{question}"
ANSWER = "{answer}"
_SEPARATOR = "\n---\n"


@dataclass(frozen=True, slots=True)
class Template:
    name: str
    prompt: str
    """Holds `{question}` once; where there are options it ends in `{answer}`."""
    options: Mapping[str, float]
    """Texts of one token -> what they are worth; empty for a prompt that is answered freely."""

    def __post_init__(self) -> None:
        for placeholder, wanted in ((QUESTION, 1), (ANSWER, 1 if self.options else 0)):
            if (found := self.prompt.count(placeholder)) != wanted:
                raise InvalidSetting(
                    f"the template {self.name}.txt must hold {placeholder} {_TIMES[wanted]}, but it does"
                    f" {found} times; correct it, or remove it from routing_templates"
                )
        if self.options and not self.prompt.endswith(ANSWER):
            raise InvalidSetting(f"the template {self.name}.txt must end in {ANSWER}; correct it")

    @property
    def shares_question(self) -> bool:
        """Whether only what follows the chat has to be computed."""
        return bool(self.options) and self.prompt.startswith(QUESTION)

    @property
    def mouth(self) -> str:
        """Of a template that shares the question: what follows it, up to the answer's token."""
        return self.prompt.removeprefix(QUESTION).removesuffix(ANSWER)

    def with_question(self, question: str) -> str:
        return self.prompt.removesuffix(ANSWER).replace(QUESTION, question)


_TIMES = {0: "nowhere", 1: "once"}


def load_template(name: str, folder: Path | None = None) -> Template:
    """Read a template, from `folder` where it has one of this name, else the shipped one.

    Raises:
        InvalidSetting: it cannot be read, or lacks a placeholder; the message names the file.
    """
    file_name = f"{name}.txt"
    own = folder / file_name if folder else None
    if folder and not folder.is_dir():
        raise InvalidSetting(f"routing_templates = {str(folder)!r} is not a folder")
    try:
        if own is not None and own.exists():
            text = own.read_text("utf-8")
        else:
            text = (files("edge_agent.routing") / "templates" / file_name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"the template {own or file_name} cannot be read: {error}") from None
    return _parse(name, text)


def templates_in_force(folder: Path | None = None) -> list[Template]:
    """Every prompt by its name, as `load_template` finds it."""
    shipped = {file.name for file in files("edge_agent.routing").joinpath("templates").iterdir()}
    return [load_template(name.removesuffix(".txt"), folder) for name in sorted(shipped)]


def templates_sha256(folder: Path | None = None) -> str:
    """Of all prompts in force: tells whether two runs asked the same."""
    digest = hashlib.sha256()
    for template in templates_in_force(folder):
        digest.update(
            repr((f"{template.name}.txt", template.prompt, sorted(template.options.items()))).encode()
        )
    return digest.hexdigest()


def _parse(name: str, text: str) -> Template:
    header, separator, prompt = text.partition(_SEPARATOR)
    if not separator:
        return Template(name, text.rstrip("\n"), {})
    try:
        options = yaml.safe_load(header)["options"]
        return Template(name, prompt.rstrip("\n"), {str(k): float(v) for k, v in options.items()})
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise InvalidSetting(
            f"the template {name}.txt must begin with a line such as"
            ' options: {"Yes": 1, "No": 0}; correct it'
        ) from None
