"""The options that several commands of `duet` have; each sets the field of EdgeConfig of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from edge_agent.models_cli import model_names
from shared.config import EdgeConfig


def help_of(name: str) -> str:
    """What EdgeConfig says of a field."""
    return EdgeConfig.model_fields[name].description or ""


def _modes(incomplete: str) -> list[str]:
    modes = get_args(EdgeConfig.model_fields["mode"].annotation)
    return [mode for mode in modes if mode.startswith(incomplete)]


ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any setting.", envvar="DUET_CONFIG")
]
Question = Annotated[str | None, typer.Argument(help="The question; standard input without it.")]
Mode = Annotated[
    str | None,
    typer.Option(help=f"auto, local, cloud, speculate or guide. {help_of('mode')}", autocompletion=_modes),
]
Cloud = Annotated[str | None, typer.Option(help=help_of("cloud"))]
TlsCa = Annotated[str | None, typer.Option(help=help_of("tls_ca"))]
Insecure = Annotated[bool | None, typer.Option("--insecure", help=help_of("insecure"))]
Model = Annotated[str | None, typer.Option(help=help_of("model"), autocompletion=model_names)]
System = Annotated[str | None, typer.Option(help=help_of("system"))]
MaxTokens = Annotated[int | None, typer.Option(help=help_of("max_tokens"))]
Temperature = Annotated[float | None, typer.Option(help=help_of("temperature"))]
Seed = Annotated[int | None, typer.Option(help=help_of("seed"))]
Drafters = Annotated[list[str] | None, typer.Option("--drafter", help=f"{help_of('drafters')} Repeatable.")]
Private = Annotated[bool | None, typer.Option("--private", help=help_of("private"))]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
