"""`duet-cloud make-draft`: cut a draft from a target, train its adapter, and choose the exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from shared.errors import InvalidSetting, ModelUnsupported
from shared.terminal import CommandGroup, resolve_visibly

if TYPE_CHECKING:
    from cloud_service.make_draft.early_exit import Target


class _CutsByDefault(CommandGroup):
    """`make-draft TARGET OUT` is `make-draft cut TARGET OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["cut", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_CutsByDefault,
    no_args_is_help=True,
    help="Cut a draft model for the edge from a target: its first layers, and a trained adapter.",
)

Target_ = Annotated[str, typer.Argument(metavar="TARGET", help="A registered name or a GGUF file.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of the target that the draft keeps.")]
Text = Annotated[
    Path, typer.Option(help="A text, or JSON lines with a text, prompt or question; what it learns from.")
]
Answers = Annotated[
    int,
    typer.Option(
        min=0,
        help="Take each entry of the text for a question, and learn from so many tokens of the"
        " target's answer to it. 0 learns from the text as it is.",
    ),
]
Length = Annotated[int, typer.Option(min=32, help="Tokens that are read together.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one otherwise.")]


@app.command("cut")
def cut_draft(
    target: Target_,
    out: Annotated[Path, typer.Argument(help="The draft's GGUF file.")],
    layers: Layers,
    adapter: Annotated[
        Path | None, typer.Option(help="What `make-draft train` wrote; the bare layers otherwise.")
    ] = None,
) -> None:
    """Write the draft as a GGUF file that the edge loads like any other model."""
    from cloud_service.make_draft.adapter import Adapter
    from cloud_service.make_draft.cut import cut

    loaded = None if adapter is None else Adapter.load(adapter)
    model = resolve_visibly(target)
    made = cut(model.path, model.sha256, layers, loaded, out)
    typer.echo(
        f"wrote {out}: {made.num_layers} of {made.num_blocks} layers"
        f"{'' if loaded is None else ' and the adapter'}, {made.cost:.0%} of the target's weights for a token"
    )


@app.command()
def train(
    target: Target_,
    out: Annotated[Path, typer.Argument(help="The adapter's file; a run that was cut short goes on.")],
    layers: Layers,
    text: Text,
    answers: Answers = 0,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the adapter.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences for each.")] = 4,
    length: Length = 256,
    learning_rate: Annotated[float, typer.Option(min=1e-6, max=1.0)] = 3e-4,
    device: Device = None,
) -> None:
    """Train the adapter: the target teaches it, by its own choice of each next token.

    Needs PyTorch, and about 10 minutes on a GPU for a target of 1.5B. What was done is kept in OUT.state.
    """
    from cloud_service.make_draft.texts import pack, read_texts

    texts = read_texts(text)
    model = _loaded(target, device)
    from cloud_service.make_draft.answers import answered
    from cloud_service.make_draft.training import Progress, Schedule
    from cloud_service.make_draft.training import train as train_adapter

    with _bars() as bars:
        if answers:
            answering = bars.add_task("answering", total=len(texts))
            kept = out.with_name(f"{out.name}.answers.jsonl")
            texts = answered(
                model, texts, answers, kept, lambda number: bars.update(answering, completed=number)
            )
        corpus = pack(texts, model.encode, model.end_token_id, length)
        training = bars.add_task("training", total=steps)

        def report(progress: Progress) -> None:
            bars.update(training, completed=progress.step, description=f"loss {progress.loss:.3f}")
            if progress.agreement is not None:
                bars.console.print(
                    f"step {progress.step}: loss {progress.loss:.3f}, agreement {progress.agreement:.1%}"
                )

        schedule = Schedule(layers, steps, batch, learning_rate)
        trained = train_adapter(model, corpus, schedule, out.with_name(f"{out.name}.state"), report)
    trained.save(out)
    typer.echo(
        f"wrote {out}; cut the draft with: duet-cloud make-draft {target} OUT.gguf --layers {layers}"
        f" --adapter {out}"
    )


@app.command()
def search(
    target: Target_,
    text: Text,
    layers: Annotated[
        list[int] | None, typer.Option(min=1, help="Exits without an adapter. Repeatable.")
    ] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="Trained adapters. Repeatable.")] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="A draft ends below this probability. Repeatable; 0, 0.2, 0.4 and 0.6 otherwise.",
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Longest draft.")] = 6,
    length: Length = 256,
    device: Device = None,
) -> None:
    """Compare exits and thresholds on the text's last tenth: acceptance by position, compression, speed."""
    from cloud_service.make_draft.acceptance import acceptance
    from cloud_service.make_draft.adapter import Adapter
    from cloud_service.make_draft.texts import pack, read_texts

    loaded = [Adapter.load(path) for path in adapter or ()]
    exits: list[tuple[int, Adapter | None]] = [(number, None) for number in layers or ()]
    exits += [(each.num_layers, each) for each in loaded]
    if not exits:
        raise InvalidSetting("name something to compare: --layers or --adapter")
    texts = read_texts(text)
    model = _loaded(target, device)
    from cloud_service.make_draft.early_exit import EarlyExit
    from cloud_service.make_draft.training import measure

    corpus = pack(texts, model.encode, model.end_token_id, length)
    table = Table(
        "layers",
        "adapter",
        "threshold",
        "accepted by position",
        "tokens a pass",
        "cost",
        "speed-up",
        box=None,
    )
    for number, trained in exits:
        if trained is not None:
            trained.check_target(model.sha256, number)
        draft = EarlyExit(model, number, adapter=trained is not None)
        if trained is not None:
            draft.load(trained)
        agreement = measure(model, draft, number, corpus.validation)
        cost = draft.cost
        for limit in threshold or (0.0, 0.2, 0.4, 0.6):
            found = acceptance(agreement, draft_tokens, limit)
            shares = " ".join(f"{share:.2f}" for share in found.by_position)
            table.add_row(
                str(number),
                "yes" if trained else "no",
                f"{limit:g}",
                shares,
                f"{found.compression_rate:.2f}",
                f"{cost:.2f}",
                f"{found.speed_up(cost):.2f}",
            )
    console = Console()
    # A pipe has no width: do not fold the rows to the 80 columns that are assumed for it.
    (console if console.is_terminal else Console(width=200)).print(table)


def _loaded(target: str, device: str | None) -> Target:
    """The target in PyTorch."""
    model = resolve_visibly(target)
    try:
        import torch

        from cloud_service.make_draft.early_exit import load_target
    except ImportError as error:
        raise ModelUnsupported(f"this needs {error.name}; run: pip install 'duet-llm[convert]'") from None
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise InvalidSetting(f"--device must be cpu or cuda, got {chosen!r}")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise InvalidSetting("PyTorch finds no GPU here; use --device cpu")
    torch.set_float32_matmul_precision("high")  # the adapter's, on a GPU; the target's are bfloat16 there
    return load_target(model.path, model.sha256, chosen)


@contextmanager
def _bars() -> Iterator[Bars]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars
