"""What both commands do at a terminal: errors as one line with their exit code, and download bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from typer.core import TyperGroup

from shared.errors import EXIT_INTERRUPTED, DuetError, outcome
from shared.models import Progress


class CommandGroup(TyperGroup):
    """Maps `DuetError` to a line on standard error and the exit code of `shared.errors.TABLE`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DuetError as error:
            typer.echo(f"{ctx.find_root().info_name}: {error}", err=True)
            raise typer.Exit(outcome(error).exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


@contextmanager
def pull_progress() -> Iterator[Progress]:
    """A bar on standard error for the downloads inside, where that is a terminal; it is gone afterwards."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def show(name: str, step: str, done_bytes: int, total_bytes: int) -> None:
            bars.update(task, description=f"{name}: {step}", completed=done_bytes, total=total_bytes)

        yield show
