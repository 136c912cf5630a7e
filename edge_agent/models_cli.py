"""`duet models`: list, pull, find and remove the models of the registry."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.errors import DuetError, UnknownModel
from shared.models import ModelCache, ModelEntry, Registry, default_cache_dir
from shared.terminal import CommandGroup, pull_progress

app = typer.Typer(cls=CommandGroup, help="List, pull, find and remove models.", no_args_is_help=True)

_WIDE = 120
"""Columns of a terminal that shows descriptions too."""


def model_names(incomplete: str) -> list[str]:
    """What a shell may complete; nothing where the user's own registry cannot be read."""
    try:
        return [name for name in Registry.load().names() if name.startswith(incomplete)]
    except DuetError:
        return []


Name = Annotated[
    str, typer.Argument(help="A name that `duet models list` shows.", autocompletion=model_names)
]


@app.command("list")
def list_models() -> None:
    """Show the models known by name; a draft and a target of one pair belong together."""
    cache = ModelCache(default_cache_dir())
    # A pipe has no width: do not cut the lines to the 80 columns that are assumed for it.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_table(Registry.load(), cache, console.width))
    console.print(f"Models lie in {cache.folder} (DUET_CACHE_DIR).", soft_wrap=True)


@app.command()
def pull(name: Name) -> None:
    """Download a model, or verify the one that is there, and print its path."""
    entry = Registry.load().entry(name)
    with pull_progress() as progress:
        path = ModelCache(default_cache_dir()).pull(entry, progress)
    typer.echo(path)


@app.command()
def path(name: Name) -> None:
    """Print the path of a model that was pulled."""
    entry = Registry.load().entry(name)
    cache = ModelCache(default_cache_dir())
    if not cache.has(entry):
        raise UnknownModel(f"{name} is not in {cache.folder}: run `duet models pull {name}`")
    typer.echo(cache.path(entry))


@app.command()
def rm(name: Name) -> None:
    """Delete a model's file, and what is left of its downloads."""
    cache = ModelCache(default_cache_dir())
    removed = cache.remove(Registry.load().entry(name))
    typer.echo(f"{name} is removed." if removed else f"{name} was not there.")


def _table(registry: Registry, cache: ModelCache, width: int) -> Table:
    table = Table(box=None)
    for column in ("name", "pair", "role", "vocabulary", "size", "status", "license"):
        table.add_column(column, no_wrap=True)
    if width >= _WIDE:
        table.add_column("description", overflow="ellipsis", no_wrap=True)
    for entry in sorted(registry, key=_tested_pairs_first):
        status = "pulled" if cache.has(entry) else "tested" if entry.tested else "untested"
        size = f"{entry.size_bytes / 1e9:.2f} GB"
        row = [entry.name, entry.pair or "-", entry.role, entry.vocabulary, size, status, entry.license]
        table.add_row(*row, *([entry.description] if width >= _WIDE else []))
    return table


def _tested_pairs_first(entry: ModelEntry) -> tuple[bool, bool, str, str]:
    return (not entry.tested, entry.pair is None, entry.pair or "", entry.role)
