"""What both commands do at a terminal: errors as one line with their exit code, and download bars."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from typer.core import TyperGroup

from shared.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, DuetError, outcome
from shared.models import Progress, Registry, ResolvedModel, resolve


class CommandGroup(TyperGroup):
    """Maps `DuetError` to a line on standard error and the exit code of `shared.errors.TABLE`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DuetError as error:
            typer.echo(f"{ctx.find_root().info_name}: {error}", err=True)
            raise typer.Exit(outcome(error).exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # who reads the output has seen enough: click ends the command without a word
        except Exception as error:
            # Not ours: typer's own control flow passes, anything else is a bug to report in one line.
            if "DUET_DEBUG" in os.environ or type(error).__module__.startswith(("typer", "click")):
                raise
            typer.echo(
                f"{ctx.find_root().info_name}: internal error: {type(error).__name__}: {error};"
                " set DUET_DEBUG=1 for the traceback, and please report it",
                err=True,
            )
            raise typer.Exit(EXIT_INTERNAL) from None


@contextmanager
def pull_progress() -> Iterator[Progress]:
    """A bar on standard error for the downloads inside, where that is a terminal; it is gone afterwards."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: list[TaskID] = []  # none until something is downloaded: nothing shows for a model that is here

        def show(name: str, step: str, done_bytes: int, total_bytes: int) -> None:
            if not tasks:
                tasks.append(bars.add_task("", total=None))
            bars.update(tasks[0], description=f"{name}: {step}", completed=done_bytes, total=total_bytes)

        yield show


def add_version(app: typer.Typer, program: str) -> None:
    """Let `PROGRAM --version` print the version."""

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"{program} {version('duet-llm')}")
            raise typer.Exit

    option: Any = typer.Option(
        False, "--version", callback=show, is_eager=True, help="Show the version and exit."
    )

    @app.callback()
    def root(shown: bool = option) -> None:
        pass


def resolve_visibly(model: str) -> ResolvedModel:
    """The file of a registered name or a path, with a bar while it is pulled; raises as `resolve` does."""
    with pull_progress() as progress:
        return resolve(model, Registry.load(), progress=progress)


def add_examples(app: typer.Typer, examples: Mapping[str, Sequence[str]]) -> None:
    """Let the help of commands end in examples.

    Args:
        examples: lines by the command's path below the program's name, for example "models pull". Commands
            that the program does not have are passed over.
    """
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        if lines := examples.get(name):
            # Typer joins lines, and keeps paragraphs apart.
            command.epilog = "\n\n".join(["Examples:", *(f"$ {line}" for line in lines)])
    for group in app.registered_groups:
        assert group.typer_instance is not None
        prefix = f"{group.name} "
        below = {
            path.removeprefix(prefix): each for path, each in examples.items() if path.startswith(prefix)
        }
        add_examples(group.typer_instance, below)
