"""`duet-cloud judge`: make a judge head for a target, and measure it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.config import DEFAULT_TARGET
from shared.errors import InvalidSetting
from shared.labelled_answers import LabelledAnswer, from_lines
from shared.terminal import CommandGroup, resolve_visibly

if TYPE_CHECKING:
    from cloud_service.judging.states import ReadAnswer

    Reads = Callable[[LabelledAnswer], ReadAnswer]

judge_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Make the head of policy judge for a target, and measure it."
)

Answers = Annotated[list[Path], typer.Argument(help="Labelled answers, made by `duet eval answers`.")]
States = Annotated[Path, typer.Option(help="Folder of what the target held while it read them.")]
Model = Annotated[
    str,
    typer.Option(
        help="Target model: a registered name, a GGUF file, or a Hugging Face folder that vLLM serves."
    ),
]

_CONTEXT_TOKENS = 2048


@judge_app.command()
def collect(
    answers: Answers,
    states: States,
    model: Model = DEFAULT_TARGET,
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many answers more at most.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer; the rest is left out.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on a GPU; -1 is all.")] = 0,
    engine: Annotated[
        str,
        typer.Option(
            envvar="DUET_CLOUD_ENGINE", help="Options of vLLM's engine, as JSON: those that it serves with."
        ),
    ] = "{}",
) -> None:
    """Let the target read labelled answers, and keep its hidden states. Goes on where it was broken off.

    A GGUF file is read with llama.cpp, a Hugging Face folder with vLLM.
    """
    from cloud_service.judging.states import keep

    labelled = _read(answers)
    if Path(model).expanduser().is_dir():
        reader = _vllm_reader(model, engine, max_tokens)
    else:
        reader = _llama_reader(model, threads, gpu_layers, max_tokens)
    sha256 = _target(model).sha256
    num_read = 0
    with (
        reader as reads,
        typer.progressbar(labelled, label="reading", file=typer.get_text_stream("stderr")) as bar,
    ):
        for answer in bar:
            num_read += keep(reads, answer, states, sha256)
            if num_read == limit:
                break
    typer.echo(f"{states}: {num_read} answers read; train on them with: duet-cloud judge train")


@judge_app.command()
def train(
    answers: Answers,
    states: States,
    out: Annotated[Path, typer.Option(help="File of the head.")],
    model: Model = DEFAULT_TARGET,
    max_false_accepts: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Of wrong tokens in dispute, the share that the judge may accept."
        ),
    ] = 0.1,
) -> None:
    """Fit a head to the questions that are not held out, and set its threshold by false accepts."""
    from cloud_service.judging.head_file import write_head
    from cloud_service.judging.labels import is_held_out, judged_tokens
    from cloud_service.judging.training import train as fit

    logging.basicConfig(format="duet-cloud: %(message)s", level=logging.INFO)
    resolved = _target(model)
    seen = [each for each in _states(answers, states, resolved) if not is_held_out(each[0].id)]
    tokens = judged_tokens(seen)
    if tokens is None:
        raise InvalidSetting("none of the answers that were read has a labelled token: nothing to train on")
    head = fit(tokens, model=resolved.name, model_sha256=resolved.sha256, max_false_accepts=max_false_accepts)
    write_head(head, out)
    typer.echo(
        f"{out}: from {len(tokens.right)} tokens of {len(seen)} answers, {int(tokens.disputed.sum())} of them"
        f" in dispute; threshold {head.threshold:.3f}; measure it with: duet-cloud judge eval"
    )


@judge_app.command(name="eval")
def evaluate(
    answers: Answers,
    states: States,
    head: Annotated[Path, typer.Option(help="File of the head.")],
    model: Model = DEFAULT_TARGET,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Of each draft.")] = 16,
) -> None:
    """Measure a head on the held-out questions: precision, recall, false accepts, acceptance length.

    What it does to right answers takes both models: serve with --judge-head, and run `duet eval speculation
    --policy lossless --policy judge`.
    """
    from cloud_service.judging.evaluation import evaluate as measure
    from cloud_service.judging.head_file import read_head
    from cloud_service.judging.labels import is_held_out

    resolved = _target(model)
    judge = read_head(head)
    unseen = [each for each in _states(answers, states, resolved) if is_held_out(each[0].id)]
    if not unseen:
        raise InvalidSetting("none of the answers that were read belongs to a held-out question")
    judge.check_fits(resolved.name, resolved.sha256, unseen[0][1].hidden.shape[1])
    quality = measure(judge, unseen, target=resolved.name, draft_tokens=draft_tokens)
    for field in fields(quality):
        typer.echo(f"{field.name.replace('_', ' '):34} {getattr(quality, field.name)}")


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    sha256: str


def _target(model: str) -> _Target:
    """Name and hash of a model, pulled where it is a registered one that is missing."""
    from shared.models import Registry, folder_sha256, resolve_weights

    if (folder := Path(model).expanduser()).is_dir():
        return _Target(resolve_weights(model, Registry.load()).name, folder_sha256(folder))
    resolved = resolve_visibly(model)
    return _Target(resolved.name, resolved.sha256)


@contextmanager
def _llama_reader(model: str, threads: int | None, gpu_layers: int, max_tokens: int) -> Iterator[Reads]:
    from cloud_service.judging.states import LlamaReader
    from shared.llama import LlamaContext, LlamaModel

    resolved = resolve_visibly(model)
    llama = LlamaModel(resolved.path, resolved.name, gpu_layers=gpu_layers, mapped=False)
    with LlamaContext(
        llama, num_sequences=1, context_tokens=_CONTEXT_TOKENS, rollback_tokens=0, threads=threads
    ) as context:
        yield LlamaReader(context, max_tokens).read


@contextmanager
def _vllm_reader(model: str, engine: str, max_tokens: int) -> Iterator[Reads]:
    from cloud_service.targets.loading import prepare_vllm
    from shared.models import Registry, resolve_weights

    try:
        options = json.loads(engine)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise InvalidSetting(f"--engine must be a JSON object, got {engine!r}")
    weights = resolve_weights(model, Registry.load())
    prepare_vllm("warning")
    from cloud_service.judging.vllm_states import vllm_reader

    with vllm_reader(
        weights.source, weights.name, {"max_model_len": _CONTEXT_TOKENS} | options, max_tokens
    ) as reader:
        yield reader.read


def _read(paths: list[Path]) -> list[LabelledAnswer]:
    answers = []
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"cannot read {path}: {error}; make it with `duet eval answers`") from None
        answers += from_lines(text, str(path))
    return answers


def _states(answers: list[Path], folder: Path, target: _Target) -> list[tuple[LabelledAnswer, ReadAnswer]]:
    from cloud_service.judging.states import load_states

    read = list(load_states(folder, target.sha256, _read(answers)))
    if not read:
        raise InvalidSetting(
            f"{folder} holds none of these answers as {target.name} reads them:"
            " run `duet-cloud judge collect`"
        )
    return read
