"""`duet store`: the user's own documents that drafts may be copied from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_agent.drafting.store import DocumentStore, default_store_dir, other_stores
from edge_agent.routing.privacy import PrivacyRule
from shared.config import EdgeConfig
from shared.errors import InvalidRequest
from shared.messages import Message
from shared.settings import load
from shared.terminal import CommandGroup, resolve_visibly

if TYPE_CHECKING:
    from shared.llama import LlamaModel

app = typer.Typer(
    cls=CommandGroup, help="Keep documents of yours that drafts are copied from.", no_args_is_help=True
)

MAX_FILE_BYTES = 8 * 2**20
"""More would not fit into the store anyway."""

ModelName = Annotated[
    str | None, typer.Option("--model", help="Model whose tokens are stored: a name or a GGUF file.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any setting.", envvar="DUET_CONFIG")
]


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Text files, UTF-8.")],
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Take files that hold secrets or personal data too.")
    ] = False,
    model: ModelName = None,
    config: ConfigFile = None,
) -> None:
    """Add files, or newer versions of them; what is drafted from them is sent to the cloud."""
    settings = _settings(model, config)
    texts = {path: _read(path) for path in files}  # all of them, before any is added
    if not allow_private:
        rule = PrivacyRule(settings.private_patterns, detect=settings.detect_private)
        for path, text in texts.items():
            _refuse_private(rule, path, text)
    loaded, store = _open(settings)
    for path, text in texts.items():
        token_ids = loaded.tokenize(text, special=False)
        added = store.add(str(path.resolve()), token_ids)
        typer.echo(f"{path}: {len(token_ids)} tokens" if added else f"{path}: there already")
    loaded.close()


@app.command("list")
def list_documents(model: ModelName = None, config: ConfigFile = None) -> None:
    """Show what the store holds for a model."""
    loaded, store = _open(_settings(model, config))
    documents = store.documents()
    for document in documents:
        kind = "answer" if document.is_answer else "file"
        typer.echo(f"{kind:6} {document.num_tokens:8} tokens  {document.name}")
    if not documents:
        others = other_stores(store.path.parent, store)
        typer.echo(
            f"Nothing is stored for {loaded.name}"
            + (f"; {others} stores belong to models of other vocabularies." if others else ".")
        )
    typer.echo(f"The store lies in {store.path} (DUET_STORE_DIR).")
    loaded.close()


@app.command()
def clear(model: ModelName = None, config: ConfigFile = None) -> None:
    """Delete what is stored for a model."""
    loaded, store = _open(_settings(model, config))
    typer.echo("The store is cleared." if store.clear() else "There was nothing.")
    loaded.close()


def _settings(model: str | None, config: Path | None) -> EdgeConfig:
    settings, _ = load(
        EdgeConfig, flags={"model": model}, file=config, file_name="duet.yaml", env_prefix="DUET_"
    )
    return settings


def _open(settings: EdgeConfig) -> tuple[LlamaModel, DocumentStore]:
    from shared.llama import LlamaModel  # takes a moment: help and bad files answer without it

    resolved = resolve_visibly(settings.model)
    loaded = LlamaModel(resolved.path, resolved.name)
    return loaded, DocumentStore(default_store_dir(), loaded.vocabulary.sha256)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB; add a part of it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not UTF-8 text; only text can be drafted from") from None
    if "\0" in text:
        raise InvalidRequest(f"{path} is not text: it holds null bytes")
    if not text.strip():
        raise InvalidRequest(f"{path} is empty; there is nothing to add")
    return text


def _refuse_private(rule: PrivacyRule, path: Path, text: str) -> None:
    reason = rule.reason([Message("user", text)], asked=False)
    if reason is not None:
        raise InvalidRequest(
            f"{path} is private ({reason}), and drafts from it are sent to the cloud; take it with"
            " --allow-private"
        )
