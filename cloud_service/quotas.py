"""Counts what tenants have at a time and use by the minute, and says when somebody has had enough.

Counts are in memory, so that a round costs no disk; about once a second they are added to a file, from
which a restart and other replicas on the same file take them up.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from shared.errors import InvalidSetting, QuotaExceeded
from shared.limits import Limits, retry_after_s

log = structlog.get_logger("duet.cloud")

_SAVE_S = 1.0
_STREAM_RETRY_S = 1.0
"""When a stream beyond the tenant's number may be asked for again."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
  account TEXT NOT NULL, minute INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (account, minute));
"""
_BUSY_S = 0.1
"""The event loop waits no longer for another replica that writes: next second is soon enough."""
_KEPT_MINUTES = 60


@dataclass(frozen=True, slots=True)
class Account:
    """Something that is counted: a tenant, or one of its tokens."""

    name: str
    limits: Limits


class UsageFile:
    """Tokens by account and minute, in SQLite; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidSetting where the file cannot be used."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A crash of the machine may lose the last second, nothing else.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InvalidSetting(f"cannot use the file of usage {path}: {error}") from None

    def add(self, spent: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        """Add tokens by (account, minute), and say what all processes have spent in the latest two minutes.

        Raises:
            sqlite3.Error: another process writes, or the disk is full.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT INTO usage VALUES (?, ?, ?)"
                " ON CONFLICT (account, minute) DO UPDATE SET tokens = tokens + excluded.tokens",
                [(account, minute, tokens) for (account, minute), tokens in spent.items()],
            )
            latest = self._db.execute("SELECT max(minute) FROM usage").fetchone()[0] or 0
            self._db.execute("DELETE FROM usage WHERE minute < ?", (latest - _KEPT_MINUTES,))
            rows = self._db.execute(
                "SELECT account, minute, tokens FROM usage WHERE minute >= ?", (latest - 1,)
            ).fetchall()
        return {(account, minute): tokens for account, minute, tokens in rows}

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


class Quotas:
    def __init__(self, file: UsageFile | None = None, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            file: where usage is kept; None keeps it in memory alone.
            clock: seconds since the epoch.
        """
        self._file = file
        self._clock = clock
        self._num_streams: Counter[str] = Counter()
        self._spent: Counter[tuple[str, int]] = Counter()
        """Tokens by account and minute, of all processes as far as known."""
        self._unsaved: Counter[tuple[str, int]] = Counter()

    def num_streams(self, account: str) -> int:
        return self._num_streams[account]

    @contextmanager
    def stream(self, accounts: tuple[Account, ...]) -> Iterator[None]:
        """Count a stream while it runs.

        Raises:
            QuotaExceeded: one of the accounts has its number of streams, or its tokens for now.
        """
        for account in accounts:
            most = account.limits.streams
            if most is not None and self._num_streams[account.name] >= most:
                raise QuotaExceeded(
                    f"{account.name} runs {most} streams, as many as it may at once; try again later",
                    retry_after_s=_STREAM_RETRY_S,
                    limit="streams",
                )
        self.check(accounts)
        for account in accounts:
            self._num_streams[account.name] += 1
        try:
            yield
        finally:
            for account in accounts:
                self._num_streams[account.name] -= 1
                if not self._num_streams[account.name]:
                    del self._num_streams[account.name]

    def check(self, accounts: tuple[Account, ...]) -> None:
        """Raises QuotaExceeded where an account has no tokens left in this minute."""
        for account in accounts:
            limit = account.limits.tokens_per_minute
            if limit is None:
                continue
            minute, into_minute_s = divmod(self._clock(), 60.0)
            previous, current = (self._spent[account.name, int(minute) - back] for back in (1, 0))
            if wait_s := retry_after_s(previous, current, into_minute_s, limit):
                raise QuotaExceeded(
                    f"{account.name} has used its {limit} tokens a minute; try again in {wait_s:.0f} s",
                    retry_after_s=wait_s,
                    limit="tokens_per_minute",
                )

    def spend(self, accounts: tuple[Account, ...], num_tokens: int) -> None:
        """Count tokens. What takes an account over its limit was still served; `check` refuses the next."""
        minute = int(self._clock() // 60)
        for account in accounts:
            if account.limits.tokens_per_minute is not None:
                self._spent[account.name, minute] += num_tokens
                self._unsaved[account.name, minute] += num_tokens

    async def keep(self) -> None:
        """Save for ever, about once a second, and at the end; then close the file."""
        try:
            while True:
                self.save()
                await asyncio.sleep(_SAVE_S)
        finally:
            self.save()
            if self._file is not None:
                self._file.close()

    def save(self) -> None:
        """Add what was spent since the last time to the file, and learn what others have spent."""
        known = self._spent
        if self._file is not None:
            try:
                known = Counter(self._file.add(self._unsaved))
            except sqlite3.Error as error:  # the file is locked or the disk full: next time
                log.warning("usage could not be saved", error=str(error))
            else:
                self._unsaved.clear()
        recent = int(self._clock() // 60) - 1
        self._spent = Counter({key: tokens for key, tokens in known.items() if key[1] >= recent})
