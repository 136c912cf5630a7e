"""`duet eval`: measure routing, lengths and speculation, and report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shared.config import EdgeConfig
from shared.errors import InvalidSetting
from shared.messages import Policy
from shared.settings import load
from shared.terminal import CommandGroup, resolve_visibly

if TYPE_CHECKING:
    from edge_agent.evaluation.plan import Plan
    from edge_agent.evaluation.routing import CloudSpec

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Measure routing, lengths and speculation; report."
)

DEFAULT_MAX_ANSWER_TOKENS = 512
DEFAULT_PATIENCE_S = 600.0
EVALUATION_CONTEXT_TOKENS = 2048

Data = Annotated[
    str,
    typer.Option(help="builtin, mmlu, gsm8k, truthfulqa (from the Hugging Face Hub), or a JSONL file."),
]
Out = Annotated[Path, typer.Option(help="Folder of the run; a run that is there goes on.")]
Edge = Annotated[str | None, typer.Option(help="Edge model: a registered name or a GGUF file.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask the first so many questions only.")]
Probes = Annotated[
    str | None,
    typer.Option(help="Names of probes, with commas; `all` asks every one. Unset: those of auto."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer; longer ones count as censored.")]
Parallel = Annotated[int, typer.Option(min=1, max=64, help="Answers that one edge model makes at once.")]
Workers = Annotated[int, typer.Option(min=1, help="Edge models side by side, each in its own process.")]
Ray = Annotated[bool, typer.Option("--ray", help="Spread the workers over a Ray cluster (RAY_ADDRESS).")]
Patience = Annotated[float, typer.Option(min=0.0, help="Seconds that a cloud which went away is waited for.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each edge model.")]
GpuLayers = Annotated[int | None, typer.Option(help="Layers of each edge model on a GPU; -1 is all.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any setting of `duet`.")]


@app.command()
def routing(
    out: Out,
    data: Data = "builtin",
    edge: Edge = None,
    cloud: Annotated[str | None, typer.Option(help="HOST:PORT of the service to compare with.")] = None,
    probes: Probes = None,
    limit: Limit = None,
    answer: Annotated[
        bool, typer.Option("--answer/--no-answer", help="Without: only the probes run, for given labels.")
    ] = True,
    max_tokens: MaxTokens = DEFAULT_MAX_ANSWER_TOKENS,
    parallel: Parallel = 8,
    workers: Workers = 1,
    ray: Ray = False,
    streams: Annotated[int, typer.Option(min=1, help="Answers that the cloud makes at once.")] = 4,
    patience: Patience = DEFAULT_PATIENCE_S,
    threads: Threads = None,
    gpu_layers: GpuLayers = None,
    config: ConfigFile = None,
) -> None:
    """Ask every question: what the probes say, and what the edge and the cloud answer."""
    from edge_agent.evaluation.routing import RoutingPlan

    settings = _settings(config, edge, max_tokens, threads, gpu_layers, cloud)
    spec = None
    if cloud is not None:
        spec = asyncio.run(_cloud_spec(settings, streams, patience))
    plan = RoutingPlan(
        config=settings,
        probes=_probe_names(probes, settings),
        num_parallel=parallel,
        answer=answer,
        cloud=spec if answer else None,
    )
    _run(plan, settings, data, limit, out, workers, ray=ray)


@app.command()
def length(
    out: Out,
    data: Data = "builtin",
    edge: Edge = None,
    probes: Probes = None,
    limit: Limit = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="Repeatable; 0 and 0.7 otherwise.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a question at a temperature above 0.")] = 2,
    max_tokens: MaxTokens = DEFAULT_MAX_ANSWER_TOKENS,
    parallel: Parallel = 8,
    workers: Workers = 1,
    ray: Ray = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = None,
    config: ConfigFile = None,
) -> None:
    """Measure the edge model's answers, and what it predicts of their length."""
    from edge_agent.evaluation.length import LengthPlan

    settings = _settings(config, edge, max_tokens, threads, gpu_layers, None)
    plan = LengthPlan(
        config=settings,
        probes=_probe_names(probes, settings),
        num_parallel=parallel,
        temperatures=tuple(dict.fromkeys(temperature or (0.0, 0.7))),
        num_samples=samples,
    )
    _run(plan, settings, data, limit, out, workers, ray=ray)


@app.command()
def speculation(
    out: Out,
    cloud: Annotated[str | None, typer.Option(help="HOST:PORT of the service that verifies.")] = None,
    data: Data = "builtin",
    edge: Edge = None,
    policy: Annotated[
        list[Policy] | None, typer.Option(help="Repeatable; lossless and bild otherwise.")
    ] = None,
    draft_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Draft lengths; repeatable; 4 and 8 otherwise.")
    ] = None,
    fallback: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="Fallback thresholds alpha_FB; repeatable; 0 otherwise."),
    ] = None,
    rollback: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Rollback thresholds alpha_RB, nats; repeatable; 2 otherwise."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    patience: Patience = DEFAULT_PATIENCE_S,
    threads: Threads = None,
    gpu_layers: GpuLayers = None,
    config: ConfigFile = None,
) -> None:
    """Answer every question in several ways; acceptance, target passes, time and quality of each."""
    from edge_agent.evaluation.speculation import SpeculationPlan, grid

    settings = _settings(config, edge, max_tokens, threads, gpu_layers, cloud)
    settings = settings.model_copy(update={"temperature": temperature, "seed": 0})
    plan = SpeculationPlan(
        config=settings,
        cloud=asyncio.run(_cloud_spec(settings, 1, patience)),
        settings=grid(
            policy or [Policy.LOSSLESS, Policy.BILD],
            draft_tokens or [4, 8],
            fallback or [0.0],
            rollback or [2.0],
        ),
    )
    _run(plan, settings, data, limit, out, 1, ray=False)


@app.command()
def guide(
    out: Out,
    cloud: Annotated[str | None, typer.Option(help="HOST:PORT of the service that guides.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="A routing run whose answers are taken instead of asking the models alone."),
    ] = None,
    data: Data = "builtin",
    edge: Edge = None,
    guidance_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable; 32, 64 and 128 otherwise.")
    ] = None,
    limit: Limit = None,
    max_tokens: MaxTokens = DEFAULT_MAX_ANSWER_TOKENS,
    parallel: Parallel = 8,
    streams: Annotated[int, typer.Option(min=1, help="Answers that the cloud makes at once.")] = 4,
    patience: Patience = DEFAULT_PATIENCE_S,
    threads: Threads = None,
    gpu_layers: GpuLayers = None,
    config: ConfigFile = None,
) -> None:
    """Answer every question by the edge, by the cloud, and by both for each length of guidance."""
    from edge_agent.evaluation.guide import GuidePlan, StoredAnswers
    from edge_agent.evaluation.items import items_sha256, load_items
    from edge_agent.opening import model_sha256_of

    settings = _settings(config, edge, max_tokens, threads, gpu_layers, cloud)
    lengths = tuple(sorted(set(guidance_tokens or [32, 64, 128])))
    if lengths[-1] >= max_tokens:
        raise InvalidSetting(f"{lengths[-1]} tokens of guidance leave nothing of --max-tokens {max_tokens}")
    source: CloudSpec | StoredAnswers
    if answers is None:
        source = asyncio.run(_cloud_spec(settings, streams, patience))
    else:
        source = StoredAnswers.of(
            answers,
            edge_sha256=model_sha256_of(settings),
            items_sha256=items_sha256(load_items(data)),
            max_tokens=max_tokens,
        )
    plan = GuidePlan(config=settings, source=source, guidance_tokens=lengths, num_parallel=parallel)
    _run(plan, settings, data, limit, out, 1, ray=False)


@app.command()
def pair(
    edge: Annotated[Path, typer.Argument(help="A routing run of the edge model.")],
    cloud: Annotated[Path, typer.Argument(help="A routing run in which the target was the edge model.")],
    out: Out,
) -> None:
    """Join two routing runs over the same questions into one of the pair."""
    from edge_agent.evaluation.pairing import pair_runs

    num_rows = pair_runs(edge, cloud, out)
    typer.echo(f"{out}: {num_rows} rows; look at them with: duet eval report {out}")


@app.command()
def answers(
    runs: Annotated[list[Path], typer.Argument(help="Folders of routing runs with answers.")],
    out: Annotated[Path, typer.Option(help="New JSONL file, one answer a line; labels in it may be edited.")],
    data: Data = "builtin",
) -> None:
    """Grade the answers of runs, find first errors of wrong ones: what `duet-cloud judge` learns from."""
    from edge_agent.evaluation.answers import answers_of_runs, write_answers
    from edge_agent.evaluation.items import load_items

    found = answers_of_runs(runs, load_items(data))
    write_answers(found, out)
    num_right = sum(answer.right for answer in found)
    num_located = sum(answer.error_at is not None for answer in found)
    typer.echo(
        f"{out}: {num_right} right answers, {len(found) - num_right} wrong ones,"
        f" of which {num_located} with a first error"
    )


@app.command()
def sweep(
    run: Annotated[Path, typer.Argument(help="Folder of a routing run.")],
    labels: Annotated[
        str, typer.Option(help="own: the run's edge and cloud; routellm: labels that come with the data.")
    ] = "own",
    draws: Annotated[int, typer.Option(min=10, help="Bootstrap draws of each interval.")] = 1000,
) -> None:
    """Compare sets of signals on a run that is there: cross-fitted blends, as a table. Runs no model."""
    from edge_agent.evaluation.crossfit import sweep as compare
    from edge_agent.evaluation.feature_sets import feature_sets, with_course
    from edge_agent.evaluation.priors import with_prior_of_questions
    from edge_agent.evaluation.runs import read_run
    from edge_agent.evaluation.summary import sweep_markdown
    from edge_agent.routing.probes import GUESSES

    if labels not in ("own", "routellm"):
        raise InvalidSetting(f"--labels is own or routellm, not {labels!r}")
    _, rows = read_run(run)
    rows = with_prior_of_questions(rows, GUESSES)
    if labels == "own":
        rows = with_course(rows)
    pair_labels: Literal["own", "routellm"] = "own" if labels == "own" else "routellm"
    typer.echo(sweep_markdown(compare(rows, feature_sets(rows), pair=pair_labels, draws=draws)))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; those of one kind stand side by side.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, summary.md and the plots.")] = Path(
        "report"
    ),
) -> None:
    """Write one page with tables and plots of runs, and a summary in Markdown."""
    from edge_agent.evaluation.report import write_report

    written = write_report(runs, out)
    typer.echo(f"{written.page}, {written.summary} and {len(written.plots)} plots")


def _run(
    plan: Plan, settings: EdgeConfig, data: str, limit: int | None, out: Path, workers: int, *, ray: bool
) -> None:
    from edge_agent.evaluation.collect import collect
    from edge_agent.evaluation.items import items_sha256, load_items
    from edge_agent.evaluation.runs import Run, about_this_machine
    from edge_agent.routing.router import templates_folder
    from edge_agent.routing.template import templates_in_force

    logging.basicConfig(format="duet: %(message)s")
    # The whole set makes the run's identity, so that a larger --limit goes on with it.
    items = load_items(data)
    resolved = resolve_visibly(settings.model)
    identity: Mapping[str, Any] = {
        "experiment": plan.experiment,
        "data": Path(data).name,
        "items_sha256": items_sha256(items),
        "edge": {"model": resolved.name, "sha256": resolved.sha256},
        **plan.identity(),
    }
    prompts = {template.name: template.prompt for template in templates_in_force(templates_folder(settings))}
    with Run.open(out, identity, {**about_this_machine(), "prompts": prompts}) as run:
        units = plan.units(items[:limit])
        asyncio.run(collect(run, plan, units, num_workers=workers, ray=ray))
        typer.echo(f"{out}: {len(run.done)} rows; look at them with: duet eval report {out}")


def _settings(
    config: Path | None,
    edge: str | None,
    max_tokens: int,
    threads: int | None,
    gpu_layers: int | None,
    cloud: str | None,
) -> EdgeConfig:
    flags = {
        "mode": "auto",
        "model": edge,
        "cloud": cloud,
        "max_tokens": max_tokens,
        "threads": threads,
        "gpu_layers": gpu_layers,
        "context_tokens": EVALUATION_CONTEXT_TOKENS,
    }
    settings, _ = load(EdgeConfig, flags=flags, file=config, file_name="duet.yaml", env_prefix="DUET_")
    return settings


async def _cloud_spec(settings: EdgeConfig, streams: int, patience_s: float) -> CloudSpec:
    from edge_agent.evaluation.routing import CloudSpec, connect

    spec = CloudSpec(address=settings.cloud, model="", num_streams=streams, patience_s=patience_s)
    async with connect(spec, settings) as cloud:
        info = await cloud.describe()
    return CloudSpec(address=settings.cloud, model=info.model, num_streams=streams, patience_s=patience_s)


def _probe_names(names: str | None, settings: EdgeConfig) -> tuple[str, ...]:
    from edge_agent.routing.probes import all_probes, default_probes
    from edge_agent.routing.router import probes_named, templates_folder

    folder = templates_folder(settings)
    if names is None:
        return tuple(probe.name for probe in default_probes(folder))
    if names == "all":
        return tuple(probe.name for probe in all_probes(folder))
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    if not wanted:
        raise InvalidSetting("--probes names none; leave it out, or say --probes all")
    probes_named(wanted, folder)
    return wanted
