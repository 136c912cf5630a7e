"""Who calls: bearer tokens, client certificates, and the tenants behind them.

A token is `duet_<id>_<secret>`. The id finds its record; the secret is 256 random bits, of which only the
sha256 is kept. That is enough: nobody can guess or enumerate 256 bits, so a slow hash would protect nothing,
and would let anybody spend the service's time by sending wrong tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from cloud_service.quotas import Account
from cloud_service.tenants import StoredToken, Tenants, read_tenants
from shared.errors import AccessDenied, InvalidSetting
from shared.limits import Limits

log = structlog.get_logger("duet.cloud")

ANYBODY = "anybody"
"""The tenant of all callers, where none must say who it is."""

_TOKEN = re.compile(r"duet_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = bytes(32)
_DENIED = "the token is unknown or expired; ask the operator of the service for a new one"
_NO_TOKEN = "the service asks for a token: set DUET_TOKEN, or token in duet.yaml, to one of its operator's"


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str | None
    """None is anybody: nobody says who it is."""
    limits: Limits
    """Of one stream."""
    accounts: tuple[Account, ...]
    """What the caller's streams and tokens are counted on."""

    @property
    def name(self) -> str:
        return self.tenant or ANYBODY


def new_token(
    tenant: str, *, limits: Limits, now_s: float, expires_s: float | None
) -> tuple[str, StoredToken]:
    """Make a token: the text for the tenant, which exists nowhere else, and what the service keeps."""
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    stored = StoredToken(token_id, tenant, _digest(secret), limits, now_s, expires_s)
    return f"duet_{token_id}_{secret}", stored


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Gatekeeper:
    """Tells a call's tenant, or refuses it."""

    def __init__(
        self,
        limits: Limits,
        tokens: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            limits: of every tenant that has none of its own.
            tokens: file of those that are asked for; None asks for none.
            clock: seconds since the epoch.
        Raises:
            InvalidSetting: the file cannot be used.
        """
        self._limits = limits
        self._file = tokens
        self._clock = clock
        self._stamp: tuple[int, int, int] | None = None
        self._tenants = Tenants()
        self._tokens: dict[str, StoredToken] = {}
        if tokens is not None:
            self._read(tokens)

    def identify(
        self, metadata: Iterable[tuple[str, str | bytes]], peer: Mapping[str, Iterable[bytes]]
    ) -> Caller:
        """Who calls.

        Args:
            metadata: of the call; `authorization: Bearer TOKEN` where tokens are asked for.
            peer: what TLS proved of the other side (gRPC's `auth_context`).
        Raises:
            AccessDenied: no token, or none that counts. The message is the same for every bad token.
        """
        if self._file is None:
            names = list(peer.get("x509_common_name", ()))
            return self._caller(names[0].decode("utf-8", "replace") if names else None)
        self._refresh(self._file)
        token = self.token(metadata)
        return self._caller(token.tenant, token)

    def token(self, metadata: Iterable[tuple[str, str | bytes]]) -> StoredToken:
        """The record of a call's token. Takes the same time for every token of the right form."""
        headers = [value for name, value in metadata if name == "authorization"]
        if not headers:
            raise AccessDenied(_NO_TOKEN)
        scheme, _, text = str(headers[0]).partition(" ")
        match = _TOKEN.fullmatch(text.strip()) if scheme.lower() == "bearer" else None
        if match is None:
            raise AccessDenied(_DENIED)
        token = self._tokens.get(match[1])
        known = hmac.compare_digest(_digest(match[2]), token.secret_sha256 if token else _NO_DIGEST)
        if token is None or not known or token.expired(self._clock()):
            raise AccessDenied(_DENIED)
        return token

    def _caller(self, tenant: str | None, token: StoredToken | None = None) -> Caller:
        limits = self._limits
        if (own := self._tenants.limits_of(tenant)) is not None:
            limits = limits.replaced_by(own)
        accounts: tuple[Account, ...] = (Account(tenant or ANYBODY, limits),)
        if token is not None:
            limits = limits.narrowed_by(token.limits)
            accounts += (Account(f"token {token.id}", token.limits),)
        return Caller(tenant, limits, accounts)

    def _refresh(self, path: Path) -> None:
        """Take up what the operator's commands changed: a revoked token is refused from the next call on."""
        try:
            if self._look(path) != self._stamp:
                self._read(path)
        except (InvalidSetting, OSError) as error:  # somebody is writing it: what was read last counts
            log.warning("the file of tokens cannot be read", error=str(error))

    def _read(self, path: Path) -> None:
        tenants = read_tenants(path)
        self._stamp = self._look(path)
        self._tenants = tenants
        self._tokens = {token.id: token for token in tenants.tokens}

    def _look(self, path: Path) -> tuple[int, int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
