"""The file of tokens: their hashes, their tenants, and limits. SQLite; a service only reads it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InvalidSetting
from shared.limits import Limits

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, secret_sha256 BLOB NOT NULL, limits TEXT NOT NULL,
  created_s REAL NOT NULL, expires_s REAL);
CREATE TABLE IF NOT EXISTS tenants (name TEXT PRIMARY KEY, limits TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class StoredToken:
    id: str
    tenant: str
    secret_sha256: bytes
    limits: Limits
    created_s: float
    expires_s: float | None
    """Since the epoch; None never."""

    def expired(self, now_s: float) -> bool:
        return self.expires_s is not None and now_s >= self.expires_s


@dataclass(frozen=True, slots=True)
class Tenants:
    """All that the file says."""

    tokens: tuple[StoredToken, ...] = ()
    """Oldest first."""
    limits: Mapping[str, Limits] | None = None
    """By tenant, of those that have their own."""

    def limits_of(self, tenant: str | None) -> Limits | None:
        return (self.limits or {}).get(tenant or "")


class TenantStore:
    """The open file. Every call is a transaction of its own."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def read(self) -> Tenants:
        tokens = self._db.execute(
            "SELECT id, tenant, secret_sha256, limits, created_s, expires_s FROM tokens"
            " ORDER BY created_s, id"
        )
        limits = self._db.execute("SELECT name, limits FROM tenants ORDER BY name")
        return Tenants(
            tuple(
                StoredToken(id_, tenant, bytes(digest), Limits.model_validate_json(text), created, expires)
                for id_, tenant, digest, text, created, expires in tokens
            ),
            {name: Limits.model_validate_json(text) for name, text in limits},
        )

    def token(self, token_id: str) -> StoredToken:
        """Raises InvalidSetting where there is none."""
        found = [token for token in self.read().tokens if token.id == token_id]
        if not found:
            raise InvalidSetting(f"there is no token {token_id!r}; duet-cloud tokens list shows all")
        return found[0]

    def add_token(self, token: StoredToken) -> None:
        limits = token.limits.model_dump_json(exclude_unset=True)
        self._db.execute(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?)",
            (token.id, token.tenant, token.secret_sha256, limits, token.created_s, token.expires_s),
        )

    def expire_token(self, token_id: str, expires_s: float) -> None:
        """Let a token end at a time, or at its own where that is sooner."""
        self._db.execute(
            "UPDATE tokens SET expires_s = min(?, coalesce(expires_s, ?)) WHERE id = ?",
            (expires_s, expires_s, token_id),
        )

    def remove_token(self, token_id: str) -> None:
        self._db.execute("DELETE FROM tokens WHERE id = ?", (token_id,))

    def set_limits(self, tenant: str, limits: Limits) -> None:
        self._db.execute(
            "INSERT INTO tenants VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET limits = excluded.limits",
            (tenant, limits.model_dump_json(exclude_unset=True)),
        )


@contextmanager
def opened(path: Path) -> Iterator[TenantStore]:
    """Open or make the file, which only its owner may read then, for the length of a command.

    Raises:
        InvalidSetting: it cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.executescript(_SCHEMA)
            yield TenantStore(database)
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from None


def read_tenants(path: Path) -> Tenants:
    """Read the file, which may lie where nothing can be written.

    Raises:
        InvalidSetting: it is missing or holds something else.
    """
    try:
        uri = f"{path.resolve(strict=True).as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=0.1)) as database:
            return TenantStore(database).read()
    except (OSError, sqlite3.Error, ValueError) as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> InvalidSetting:
    return InvalidSetting(f"cannot use the file of tokens {path}: {error}; `duet-cloud tokens add` makes one")
