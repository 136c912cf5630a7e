"""`duet-cloud judge`: make a judge head for a target, and measure it."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.config import DEFAULT_TARGET
from shared.errors import InvalidSetting
from shared.labelled_answers import LabelledAnswer, from_lines
from shared.terminal import CommandGroup, resolve_visibly

if TYPE_CHECKING:
    from cloud_service.judging.states import ReadAnswer
    from shared.models import ResolvedModel

judge_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Make the head of policy judge for a target, and measure it."
)

Answers = Annotated[list[Path], typer.Argument(help="Labelled answers, made by `duet eval answers`.")]
States = Annotated[Path, typer.Option(help="Folder of what the target held while it read them.")]
Model = Annotated[str, typer.Option(help="Target model: a registered name or a GGUF file.")]

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
) -> None:
    """Let the target read labelled answers, and keep its hidden states. Goes on where it was broken off."""
    from cloud_service.judging.states import Reader
    from shared.llama import LlamaContext, LlamaModel

    labelled = _read(answers)
    resolved = resolve_visibly(model)
    llama = LlamaModel(resolved.path, resolved.name, gpu_layers=gpu_layers, mapped=False)
    num_read = 0
    with LlamaContext(
        llama, num_sequences=1, context_tokens=_CONTEXT_TOKENS, rollback_tokens=0, threads=threads
    ) as context:
        reader = Reader(context, resolved.sha256, states, max_tokens)
        with typer.progressbar(labelled, label="reading", file=typer.get_text_stream("stderr")) as bar:
            for answer in bar:
                num_read += reader.read(answer)
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
    resolved = resolve_visibly(model)
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

    resolved = resolve_visibly(model)
    judge = read_head(head)
    unseen = [each for each in _states(answers, states, resolved) if is_held_out(each[0].id)]
    if not unseen:
        raise InvalidSetting("none of the answers that were read belongs to a held-out question")
    judge.check_fits(resolved.name, resolved.sha256, unseen[0][1].hidden.shape[1])
    quality = measure(judge, unseen, target=resolved.name, draft_tokens=draft_tokens)
    for field in fields(quality):
        typer.echo(f"{field.name.replace('_', ' '):34} {getattr(quality, field.name)}")


def _read(paths: list[Path]) -> list[LabelledAnswer]:
    answers = []
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"cannot read {path}: {error}; make it with `duet eval answers`") from None
        answers += from_lines(text, str(path))
    return answers


def _states(
    answers: list[Path], folder: Path, target: ResolvedModel
) -> list[tuple[LabelledAnswer, ReadAnswer]]:
    from cloud_service.judging.states import load_states

    read = list(load_states(folder, target.sha256, _read(answers)))
    if not read:
        raise InvalidSetting(
            f"{folder} holds none of these answers as {target.name} reads them:"
            " run `duet-cloud judge collect`"
        )
    return read
