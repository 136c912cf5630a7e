"""`duet-cloud`: the operator's command."""

from __future__ import annotations

import asyncio
import difflib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cloud_service.examples import EXAMPLES
from cloud_service.judging.cli import judge_app
from cloud_service.make_draft.cli import app as make_draft_app
from cloud_service.planning.cli import plan
from cloud_service.security_cli import certs_app, tenants_app, tokens_app
from shared.config import CloudConfig
from shared.errors import UnknownSetting
from shared.settings import load
from shared.terminal import CommandGroup, add_examples, add_version, pull_progress, resolve_visibly

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Host the target model that verifies the drafts of many edges.",
)


app.add_typer(certs_app, name="certs")
app.add_typer(tokens_app, name="tokens")
app.add_typer(tenants_app, name="tenants")
app.add_typer(judge_app, name="judge")
app.add_typer(make_draft_app, name="make-draft")


def _help(name: str) -> str:
    return CloudConfig.model_fields[name].description or ""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these settings.", envvar="DUET_CLOUD_CONFIG")
    ] = None,
    target: Annotated[str | None, typer.Option(help=_help("target"))] = None,
    model: Annotated[str | None, typer.Option(help=_help("model"))] = None,
    upstream: Annotated[str | None, typer.Option(help=_help("upstream"))] = None,
    verification: Annotated[str | None, typer.Option(help=_help("verification"))] = None,
    listen: Annotated[str | None, typer.Option(help=_help("listen"))] = None,
    tls_cert: Annotated[str | None, typer.Option(help=_help("tls_cert"))] = None,
    tls_key: Annotated[str | None, typer.Option(help=_help("tls_key"))] = None,
    tls_client_ca: Annotated[str | None, typer.Option(help=_help("tls_client_ca"))] = None,
    tokens: Annotated[str | None, typer.Option(help=_help("tokens"))] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help=_help("insecure"))] = None,
    slots: Annotated[int | None, typer.Option(help=_help("slots"))] = None,
    context_tokens: Annotated[int | None, typer.Option(help=_help("context_tokens"))] = None,
    max_draft_tokens: Annotated[int | None, typer.Option(help=_help("max_draft_tokens"))] = None,
    lossy_policies: Annotated[
        bool | None, typer.Option("--lossy-policies/--no-lossy-policies", help=_help("lossy_policies"))
    ] = None,
    judge_head: Annotated[str | None, typer.Option(help=_help("judge_head"))] = None,
    cache_type: Annotated[str | None, typer.Option(help=_help("cache_type"))] = None,
    threads: Annotated[int | None, typer.Option(help=_help("threads"))] = None,
    gpu_layers: Annotated[int | None, typer.Option(help=_help("gpu_layers"))] = None,
    admission: Annotated[str | None, typer.Option(help=_help("admission"))] = None,
    max_waiting_streams: Annotated[int | None, typer.Option(help=_help("max_waiting_streams"))] = None,
    max_wait_s: Annotated[float | None, typer.Option(help=_help("max_wait_s"))] = None,
    drain_s: Annotated[float | None, typer.Option(help=_help("drain_s"))] = None,
    log_format: Annotated[str | None, typer.Option(help=_help("log_format"))] = None,
    log_level: Annotated[str | None, typer.Option(help=_help("log_level"))] = None,
    metrics_listen: Annotated[str | None, typer.Option(help=_help("metrics_listen"))] = None,
    traces_to: Annotated[str | None, typer.Option(help=_help("traces_to"))] = None,
) -> None:
    """Serve a target model until SIGTERM.

    Flags win over DUET_CLOUD_* variables over the settings file over defaults. With --target vllm, any option
    of vLLM's engine may follow as --engine.NAME VALUE, for example --engine.tensor-parallel-size 2.
    """
    flags: dict[str, Any] = {n: v for n, v in locals().items() if n not in ("context", "config")}
    own_options = [name for option in context.command.params for name in option.opts]
    flags["engine"] = engine_options(context.args, own_options) or None
    settings, _ = load(
        CloudConfig, flags=flags, file=config, file_name="duet-cloud.yaml", env_prefix="DUET_CLOUD_"
    )
    # gRPC would print its own view of what our errors say; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # The engine and the server are imported here, so that help and bad settings answer at once.
    from cloud_service import server
    from cloud_service.targets.loading import target_loader
    from shared.logs import configure_logging
    from shared.tracing import send_to

    configure_logging(settings.log_format, settings.log_level)
    send_to(settings.traces_to, "duet-cloud")
    server.check_trust(settings)
    with pull_progress() as progress:
        load_target = target_loader(settings, progress)
    asyncio.run(server.serve(settings, load_target, on_ready=_announce))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A registered name or a GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32 (for a CPU).")] = "bfloat16",
) -> None:
    """Write a GGUF model as the Hugging Face folder that --target vllm reads."""
    from cloud_service import convert as conversion

    resolved = resolve_visibly(model)
    conversion.convert(resolved.path, folder, dtype)
    typer.echo(f"wrote {folder}; serve it with: duet-cloud serve --target vllm --model {folder}")


@app.command()
def health(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file that the service was started with.", envvar="DUET_CLOUD_CONFIG"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 2.0,
) -> None:
    """Say whether the service on this machine answers: exit code 0, or 5 with a line that says why not."""
    settings, _ = load(
        CloudConfig, flags={}, file=config, file_name="duet-cloud.yaml", env_prefix="DUET_CLOUD_"
    )
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from cloud_service.health import check_health

    check_health(settings, timeout)
    typer.echo("serving")


app.command()(plan)


_ENGINE_PREFIX = "--engine."


def engine_options(arguments: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Read `--engine.NAME VALUE`, `--engine.NAME=VALUE` and `--engine.NAME`, which means true.

    Values are read as YAML, so that numbers, lists and maps mean what they look like.

    Args:
        arguments: what the command's own options left over.
        known: those options, to name the nearest one.
    Raises:
        UnknownSetting: anything else.
    """
    options: dict[str, Any] = {}
    rest = deque(arguments)
    while rest:
        flag, given, text = rest.popleft().partition("=")
        if not flag.startswith("-"):
            raise UnknownSetting(f"got the unexpected argument {flag!r}")
        if not flag.startswith(_ENGINE_PREFIX):
            [near] = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
            raise UnknownSetting(f"no such option: {flag}; did you mean {near}?")
        if not given:
            text = rest.popleft() if rest and not rest[0].startswith("--") else "true"
        options[flag.removeprefix(_ENGINE_PREFIX).replace("-", "_")] = yaml.safe_load(text)
    return options


def _announce(address: str) -> None:
    """One line on standard output for scripts that wait for the address."""
    typer.echo(f"listening on {address}")


add_examples(app, EXAMPLES)
add_version(app, "duet-cloud")


def main() -> None:
    app()
