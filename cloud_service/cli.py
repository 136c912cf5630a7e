"""`duet-cloud`: the operator's command."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.config import CloudConfig
from shared.models import Registry, resolve
from shared.settings import load
from shared.terminal import CommandGroup, pull_progress

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Host the target model that verifies the drafts of many edges.",
)


@app.callback()
def _root() -> None:
    """Keeps `serve` a command of its own while it is the only one."""


def _help(name: str) -> str:
    return CloudConfig.model_fields[name].description or ""


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these settings.", envvar="DUET_CLOUD_CONFIG")
    ] = None,
    target: Annotated[str | None, typer.Option(help=_help("target"))] = None,
    model: Annotated[str | None, typer.Option(help=_help("model"))] = None,
    listen: Annotated[str | None, typer.Option(help=_help("listen"))] = None,
    slots: Annotated[int | None, typer.Option(help=_help("slots"))] = None,
    context_tokens: Annotated[int | None, typer.Option(help=_help("context_tokens"))] = None,
    max_draft_tokens: Annotated[int | None, typer.Option(help=_help("max_draft_tokens"))] = None,
    cache_type: Annotated[str | None, typer.Option(help=_help("cache_type"))] = None,
    threads: Annotated[int | None, typer.Option(help=_help("threads"))] = None,
    gpu_layers: Annotated[int | None, typer.Option(help=_help("gpu_layers"))] = None,
    max_waiting_streams: Annotated[int | None, typer.Option(help=_help("max_waiting_streams"))] = None,
    max_wait_s: Annotated[float | None, typer.Option(help=_help("max_wait_s"))] = None,
    drain_s: Annotated[float | None, typer.Option(help=_help("drain_s"))] = None,
    log_format: Annotated[str | None, typer.Option(help=_help("log_format"))] = None,
    log_level: Annotated[str | None, typer.Option(help=_help("log_level"))] = None,
) -> None:
    """Serve a target model until SIGTERM.

    Flags win over DUET_CLOUD_* variables over the settings file over defaults.
    """
    flags: dict[str, Any] = {name: value for name, value in locals().items() if name != "config"}
    settings, _ = load(
        CloudConfig, flags=flags, file=config, file_name="duet-cloud.yaml", env_prefix="DUET_CLOUD_"
    )
    # gRPC would print its own view of what our errors say; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # The engine and the server are imported here, so that help and bad settings answer at once.
    from cloud_service import server

    server.configure_logging(settings)
    with pull_progress() as progress:
        resolved = resolve(settings.model, Registry.load(), progress=progress)
    asyncio.run(server.serve(settings, lambda: server.load_target(settings, resolved), on_ready=_announce))


def _announce(address: str) -> None:
    """One line on standard output for scripts that wait for the address."""
    typer.echo(f"listening on {address}")


def main() -> None:
    app()
