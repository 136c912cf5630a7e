"""`duet`: the command of somebody at a laptop."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edge_agent import options
from edge_agent.evaluation.cli import app as eval_app
from edge_agent.examples import EXAMPLES
from edge_agent.models_cli import app as models_app
from edge_agent.opening import model_sha256_of, open_agent, open_all, open_parts, open_router
from edge_agent.options import help_of
from edge_agent.show import OriginWriter, PlainWriter, answer_fields, explanation, print_bench, print_decision
from edge_agent.store_cli import app as store_app
from shared.config import EdgeConfig
from shared.errors import InvalidSetting
from shared.events import Answer, Notice, Text
from shared.settings import load
from shared.terminal import CommandGroup, add_examples, add_version

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A small model here and a large one in the cloud answer as one.",
)
app.add_typer(models_app, name="models")
app.add_typer(eval_app, name="eval")
app.add_typer(store_app, name="store")
config_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Look at the settings in force.")
app.add_typer(config_app, name="config")


@app.command()
def ask(
    question: options.Question = None,
    config: options.ConfigFile = None,
    mode: options.Mode = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: Annotated[int | None, typer.Option(help=help_of("top_k"))] = None,
    top_p: Annotated[float | None, typer.Option(help=help_of("top_p"))] = None,
    min_p: Annotated[float | None, typer.Option(help=help_of("min_p"))] = None,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help=f"{help_of('stop')} Repeatable.")] = None,
    max_draft_tokens: Annotated[int | None, typer.Option(help=help_of("max_draft_tokens"))] = None,
    proactive: Annotated[
        bool | None, typer.Option("--proactive/--no-proactive", help=help_of("proactive"))
    ] = None,
    max_in_flight_tokens: Annotated[int | None, typer.Option(help=help_of("max_in_flight_tokens"))] = None,
    acceptance_threshold: Annotated[float | None, typer.Option(help=help_of("acceptance_threshold"))] = None,
    policy: Annotated[str | None, typer.Option(help=help_of("policy"))] = None,
    fallback_threshold: Annotated[float | None, typer.Option(help=help_of("fallback_threshold"))] = None,
    rollback_threshold: Annotated[float | None, typer.Option(help=help_of("rollback_threshold"))] = None,
    guidance_tokens: Annotated[int | None, typer.Option(help=help_of("guidance_tokens"))] = None,
    drafters: options.Drafters = None,
    private: options.Private = None,
    show_origin: Annotated[bool, typer.Option("--show-origin", help="Colour text by who made it.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say on standard error why the answer was made so.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with figures.")] = False,
) -> None:
    """Answer a question.

    Flags win over DUET_* variables over duet.yaml over defaults.
    """
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    flags |= {"stop": flags["stop"] or None, "drafters": flags["drafters"] or None}
    settings, _ = _load(flags, config)
    if question is None:
        question = _read_stdin()
    from shared.logs import configure_logging
    from shared.tracing import send_to

    configure_logging(settings.log_format, settings.log_level)
    send_to(settings.traces_to, "duet")
    asyncio.run(_ask(question, settings, show_origin=show_origin, explain=explain, as_json=as_json))


@app.command()
def chat(
    config: options.ConfigFile = None,
    mode: options.Mode = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    drafters: options.Drafters = None,
    private: Annotated[
        bool | None, typer.Option("--private", help=f"{help_of('private')} Nor is the chat kept on disk.")
    ] = None,
) -> None:
    """Chat at the terminal: drafts are dim until the target has confirmed them.

    /help lists the chat's commands. Ctrl-C stops an answer, Ctrl-D leaves.

    In a pipe each line is a question, and answers go to standard output.
    """
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    settings, _ = _load(flags | {"drafters": flags["drafters"] or None}, config)
    if code := asyncio.run(_chat(settings)):
        raise typer.Exit(code)


async def _chat(settings: EdgeConfig) -> int:
    from edge_agent.chat.lines import plain_lines, typed_lines
    from edge_agent.chat.saved import SavedChats, default_chat_dir
    from edge_agent.chat.session import Chat
    from edge_agent.chat.view import PlainView, choose_view

    view = choose_view()
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    saved = None if settings.private else SavedChats(default_chat_dir())
    # What `auto` loads can do all modes, so that /mode changes them and keeps the KV cache.
    loaded_for = settings
    if settings.mode != "cloud" and "model" in settings.drafters:
        loaded_for = settings.model_copy(update={"mode": "auto"})
    async with open_all(loaded_for) as parts:
        chat = Chat(settings, parts, view, saved, interactive=interactive)
        if interactive:
            view.say([chat.greeting()])
        if isinstance(view, PlainView):
            return await chat.run(plain_lines(prompt=interactive))
        history = None if saved is None else saved.typed_lines()
        return await chat.run(typed_lines(history=history, status=chat.status, completions=chat.completions))


@app.command()
def route(
    question: options.Question = None,
    config: options.ConfigFile = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    system: options.System = None,
    cloud_threshold: Annotated[float | None, typer.Option(help=help_of("cloud_threshold"))] = None,
    private: options.Private = None,
    all_probes: Annotated[bool, typer.Option("--all-probes", help="Ask every probe, to compare.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say who would answer a question, and why; answers nothing."""
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    settings, _ = _load(flags | {"mode": "auto"}, config)
    if question is None:
        question = _read_stdin()
    asyncio.run(_route(question, settings, every=all_probes, as_json=as_json))


async def _route(question: str, settings: EdgeConfig, *, every: bool, as_json: bool) -> None:
    from edge_agent.agent import question_as_chat
    from edge_agent.routing.privacy import PrivacyRule

    messages = question_as_chat(question, settings.system)
    rule = PrivacyRule(settings.private_patterns, detect=settings.detect_private)
    async with open_router(settings, every=every) as router:
        routing = await router.route(messages, rule.reason(messages, asked=settings.private))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(routing.decision), ensure_ascii=False))
    else:
        print_decision(routing.decision)


@app.command()
def calibrate(
    results: Annotated[
        list[Path],
        typer.Option(help="A folder of `duet eval routing` or `length`, or JSON lines; repeatable."),
    ],
    cloud_share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of questions that go to the cloud.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of questions to be answered rightly.")
    ] = None,
    shape: Annotated[
        bool,
        typer.Option(
            "--shape/--no-shape",
            help="Blend in the question's length and shape; without, for questions unlike the results'.",
        ),
    ] = True,
    config: options.ConfigFile = None,
    model: options.Model = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; the user's own for the model otherwise.")
    ] = None,
) -> None:
    """Fit the router to evaluation results, and set its threshold."""
    if (cloud_share is None) == (quality is None):
        raise InvalidSetting("give one of --cloud-share and --quality")
    settings, _ = _load({"model": model, "mode": "auto"}, config)
    asyncio.run(_calibrate(results, settings, output, shape=shape, cloud_share=cloud_share, quality=quality))


async def _calibrate(
    results: Sequence[Path],
    settings: EdgeConfig,
    output: Path | None,
    *,
    shape: bool,
    cloud_share: float | None,
    quality: float | None,
) -> None:
    from edge_agent.routing.calibration import fit, judged_of, read_results, user_file
    from edge_agent.routing.router import read_without_content
    from edge_agent.routing.words import answers_ratio

    rows, num_tokens, num_words = [], 0, 0
    for path in results:
        read, written = read_results(path / "rows.jsonl" if path.is_dir() else path)
        rows += read
        num_tokens += written.num_tokens
        num_words += written.num_words
    async with open_parts(settings) as (edge, _):
        assert edge is not None, "only mode cloud has no edge model"
        name = edge.model.name
        empty = await read_without_content(edge, settings)
        ratio = answers_ratio(num_tokens, num_words, edge.model.tokenize)
    num_judged = len(judged_of(rows))
    aim = f"cloud share {cloud_share:g}" if quality is None else f"quality {quality:g}"
    runs = ", ".join(path.name for path in results)
    calibration = fit(
        rows,
        model=name,
        sha256=model_sha256_of(settings),
        fitted_on=f"{num_judged} questions of {runs}, threshold for {aim}",
        features=empty.features,
        shape=shape,
        priors=empty.priors,
        tokens_per_word=ratio,
        cloud_share=cloud_share,
        quality=quality,
    )
    file = output or user_file(name)
    calibration.save(file)
    typer.echo(f"{file}: fitted on {num_judged} questions, threshold {calibration.threshold:.3f}")


@app.command()
def bench(
    config: options.ConfigFile = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    acceptance_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of draft tokens accepted, for the forecast.")
    ] = 0.8,
    local: Annotated[bool, typer.Option("--local", help="Measure this machine only, no cloud.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure drafting here, the link and the cloud's verification, and say what to expect of them.

    The forecast is of stop-and-wait speculation, as `duet ask --mode speculate` does it.
    """
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    settings, _ = _load(flags | {"mode": "local" if local else "speculate", "drafters": ["model"]}, config)
    asyncio.run(_bench(settings, acceptance_rate, as_json=as_json))


async def _bench(settings: EdgeConfig, acceptance_rate: float, *, as_json: bool) -> None:
    from edge_agent.bench import run_bench

    async with open_parts(settings) as (edge, cloud):
        assert edge is not None, "the model is among the drafters"
        report = await run_bench(edge, cloud, acceptance_rate)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        print_bench(report)


@app.command()
def doctor(
    config: options.ConfigFile = None,
    mode: options.Mode = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    as_json: options.AsJson = False,
) -> None:
    """Check this machine, the model and the cloud, measure them, and say what auto will do.

    Exits with 1 where something that the settings ask for does not work.
    """
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    settings, _ = _load(flags, config)
    from edge_agent.doctor.checks import examine, exit_code, outlook
    from edge_agent.doctor.gather import gather
    from edge_agent.doctor.report import print_report, report_json

    facts = asyncio.run(gather(settings))
    findings = examine(facts)
    if as_json:
        measured = {
            "draft": None if facts.draft is None else dataclasses.asdict(facts.draft),
            "link": None if facts.link is None else dataclasses.asdict(facts.link),
        }
        typer.echo(report_json(findings, outlook(facts), measured))
    else:
        print_report(findings, outlook(facts))
    raise typer.Exit(exit_code(findings))


@app.command("serve")
def serve_http(
    config: options.ConfigFile = None,
    host: Annotated[str | None, typer.Option(help=help_of("host"))] = None,
    port: Annotated[int | None, typer.Option(help=help_of("port"))] = None,
    cloud: options.Cloud = None,
    tls_ca: options.TlsCa = None,
    insecure: options.Insecure = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    threads: Annotated[int | None, typer.Option(help=help_of("threads"))] = None,
    tls_cert: Annotated[str | None, typer.Option(help=help_of("tls_cert"))] = None,
    tls_key: Annotated[str | None, typer.Option(help=help_of("tls_key"))] = None,
    serve_insecure: Annotated[
        bool | None, typer.Option("--serve-insecure", help=help_of("serve_insecure"))
    ] = None,
) -> None:
    """Serve OpenAI's API and a web page to apps on this machine, or on others.

    The models are duet (the router decides), duet-local, duet-cloud, duet-speculate and duet-guide.
    """
    flags = {name: value for name, value in locals().items() if name in EdgeConfig.model_fields}
    settings, _ = _load(flags | {"mode": "auto"}, config)
    from edge_agent.http.serving import serve

    asyncio.run(serve(settings, on_ready=lambda url: typer.echo(f"listening on {url}")))


@config_app.command("show")
def show_config(config: options.ConfigFile = None) -> None:
    """Print every setting in force and where it comes from."""
    settings, origin = _load({}, config)
    table = Table("setting", "value", "from", box=None)
    for name in type(settings).model_fields:
        table.add_row(name, json.dumps(getattr(settings, name), default=str), origin[name])
    Console(soft_wrap=True).print(table)


def _load(flags: dict[str, Any], file: Path | None) -> tuple[EdgeConfig, dict[str, str]]:
    return load(EdgeConfig, flags=flags, file=file, file_name="duet.yaml", env_prefix="DUET_")


def _read_stdin() -> str:
    raw = sys.stdin.buffer.read()
    return raw.decode("utf-8", "replace")


async def _ask(
    question: str, settings: EdgeConfig, *, show_origin: bool, explain: bool, as_json: bool
) -> None:
    writer = OriginWriter() if show_origin else PlainWriter()
    async with open_agent(settings) as agent, aclosing(agent.ask(question)) as events:
        async for event in events:
            if isinstance(event, Notice):
                typer.echo(f"duet: {event.message}", err=True)
            elif isinstance(event, Text) and not as_json:
                writer.write(event)
            elif isinstance(event, Answer):
                if as_json:
                    typer.echo(json.dumps(answer_fields(event), ensure_ascii=False))
                else:
                    writer.finish(event)
                if explain:
                    for line in explanation(event):
                        typer.echo(f"duet: {line}", err=True)


add_examples(app, EXAMPLES)
add_version(app, "duet")


def main() -> None:
    app()
