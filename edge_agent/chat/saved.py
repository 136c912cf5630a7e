"""Chats on disk: one JSON file each, in the user's data folder, readable by the user alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, ValidationError

from edge_agent.chat.conversation import Conversation
from shared.errors import InvalidRequest
from shared.messages import Message

LAST = "last"
"""The name under which every chat is kept while it goes on."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    system: str | None
    messages: list[_Said]


def default_chat_dir() -> Path:
    """DUET_CHAT_DIR, or the user's data folder."""
    folder = os.environ.get("DUET_CHAT_DIR")
    return Path(folder).expanduser() if folder else platformdirs.user_data_path("duet") / "chats"


class SavedChats:
    """The chats of one folder by name, and the lines that were typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def save(self, name: str, chat: Conversation) -> Path:
        """Raises InvalidRequest for a name that is no file name, or a folder that cannot be written to."""
        path = self._path(name)
        said = [_Said.model_validate({"role": m.role, "content": m.content}) for m in chat.messages]
        text = _File(system=chat.system, messages=said).model_dump_json(indent=1)
        unfinished = path.with_suffix(".partial")
        try:
            _own_file(unfinished)
            # A lone surrogate cannot be written as UTF-8, but may have been typed.
            unfinished.write_text(text, encoding="utf-8", errors="replace")
            os.replace(unfinished, path)
        except OSError as error:
            raise InvalidRequest(f"cannot save the chat as {path}: {error.strerror or error}") from None
        return path

    def load(self, name: str) -> Conversation:
        """Raises InvalidRequest where there is none of this name, or it cannot be read."""
        path = self._path(name)
        try:
            file = _File.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            saved = ", ".join(self.names()) or "none"
            raise InvalidRequest(f"no chat is saved as {name!r}; saved: {saved}") from None
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InvalidRequest(f"{path} is no saved chat: {where}: {first['msg'].lower()}") from None
        return Conversation(file.system, tuple(Message(said.role, said.content) for said in file.messages))

    def typed_lines(self) -> Path:
        """The file of what was typed, made if it is missing.

        Raises:
            InvalidRequest: the folder cannot be written to.
        """
        path = self.folder / "typed_lines"
        try:
            _own_file(path)
        except OSError as error:
            raise InvalidRequest(f"cannot keep what is typed in {path}: {error.strerror or error}") from None
        return path

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name!r} cannot name a chat; use letters, digits, dots, dashes and underscores"
            )
        return self.folder / f"{name}.json"


def _own_file(path: Path) -> None:
    """Make a file that only the user can read, if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
