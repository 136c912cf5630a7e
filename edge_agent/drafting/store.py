"""The local store that `retrieval` copies from: the user's own documents and, if asked for, past answers.

One SQLite file for each vocabulary, in the user's data folder, readable by the user alone. It holds token
ids and no code, every change is one transaction, and nothing of it is ever sent but what is drafted.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from shared.errors import InvalidSetting

FORMAT = 1
MAX_TOKENS = 1_000_000
"""Of all documents; an index of so many is built in about a second, once a process."""
MAX_ANSWERS = 500
"""Past answers that are kept; the oldest go first."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, is_answer INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, tokens BLOB NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    num_tokens: int
    is_answer: bool
    """A past answer, not a file."""


def default_store_dir() -> Path:
    """DUET_STORE_DIR, or the user's data folder."""
    folder = os.environ.get("DUET_STORE_DIR")
    return Path(folder) if folder else platformdirs.user_data_path("duet") / "store"


class DocumentStore:
    """Token ids of documents, by the vocabulary that they were made with."""

    def __init__(self, folder: Path, vocabulary_sha256: str) -> None:
        self.path = folder / f"{vocabulary_sha256[:16]}.sqlite"

    def documents(self) -> list[Document]:
        """Files first, then answers; oldest first.

        Raises:
            InvalidSetting: the store is damaged or cannot be read.
        """
        query = "SELECT name, num_tokens, is_answer FROM documents ORDER BY is_answer, rowid"
        if not self.path.exists():
            return []
        with self._open() as database:
            return [Document(name, num, bool(answer)) for name, num, answer in database.execute(query)]

    def token_ids(self) -> list[NDArray[np.int64]]:
        """Every document's tokens. Raises InvalidSetting where the store is damaged or cannot be read."""
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute("SELECT sha256, tokens FROM documents ORDER BY rowid").fetchall()
        if any(_sha256(tokens) != sha256 for sha256, tokens in rows):
            raise self._damaged("a document's tokens have changed")
        return [np.frombuffer(tokens, "<u4").astype(np.int64) for _, tokens in rows]

    def add(self, name: str, token_ids: Sequence[int], *, is_answer: bool = False) -> bool:
        """Add a document, in place of an older one of the same name; False where the same tokens are there.

        Raises:
            InvalidSetting: the store would hold too much, is damaged or cannot be written.
        """
        tokens = np.asarray(token_ids, "<u4").tobytes()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._open() as database:
            known = database.execute("SELECT 1 FROM documents WHERE sha256 = ?", (_sha256(tokens),))
            if known.fetchone():
                return False
            if not is_answer:
                database.execute("DELETE FROM documents WHERE name = ? AND NOT is_answer", (name,))
            database.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?)",
                (_sha256(tokens), name, is_answer, len(token_ids), tokens),
            )
            database.execute(
                "DELETE FROM documents WHERE is_answer AND rowid NOT IN"
                " (SELECT rowid FROM documents WHERE is_answer ORDER BY rowid DESC LIMIT ?)",
                (MAX_ANSWERS,),
            )
            (total,) = database.execute("SELECT sum(num_tokens) FROM documents").fetchone()
            if total > MAX_TOKENS:
                raise InvalidSetting(
                    f"the store would hold {total:,} tokens, at most {MAX_TOKENS:,} are kept;"
                    " add less, or start anew with `duet store clear`"
                )
            return True

    def clear(self) -> bool:
        """Delete everything, damaged or not; False where there was nothing."""
        there = self.path.exists()
        self.path.unlink(missing_ok=True)
        return there

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction, which an error undoes."""
        try:
            if not self.path.exists():
                self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path)) as database:
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version not in (0, FORMAT):
                    raise self._damaged(f"it has format {version}, not {FORMAT}")
                with database:
                    database.execute(_SCHEMA)
                    database.execute(f"PRAGMA user_version = {FORMAT}")
                    yield database
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise InvalidSetting(f"cannot use the store {self.path}: {error.strerror}") from None

    def _damaged(self, why: str) -> InvalidSetting:
        return InvalidSetting(
            f"the store {self.path} cannot be used: {why}; delete it with `duet store clear` and add"
            " the documents again"
        )


def other_stores(folder: Path, mine: DocumentStore) -> int:
    """How many stores of other vocabularies lie there."""
    return sum(path != mine.path for path in folder.glob("*.sqlite"))


def _sha256(tokens: bytes) -> str:
    return hashlib.sha256(tokens).hexdigest()
