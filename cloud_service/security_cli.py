"""`duet-cloud certs`, `tokens` and `tenants`: who may use the service, and how much of it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.config import CloudConfig
from shared.errors import InvalidSetting
from shared.limits import Limits, limits_from
from shared.settings import load
from shared.terminal import CommandGroup

certs_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Make an authority and certificates for a small team."
)
tokens_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Make and revoke tokens of tenants.")
tenants_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Set and show limits of tenants.")

Folder = Annotated[Path, typer.Argument(help="Folder of the authority.")]
Days = Annotated[int, typer.Option(min=1, help="Days until it expires.")]
StoreFile = Annotated[
    Path | None, typer.Option("--tokens", help=CloudConfig.model_fields["tokens"].description or "")
]
Tenant = Annotated[str, typer.Argument(help="Letters, digits, and . _ @ - .")]
LimitTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", help=f"NAME=NUMBER, of {', '.join(Limits.model_fields)}. Repeatable.", show_default=False
    ),
]

_DURATION = re.compile(r"(\d+)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@certs_app.command("ca")
def make_ca(folder: Folder, days: Days = 3650) -> None:
    """Make an authority: ca.pem, which edges need, and ca.key, which should stay on one machine."""
    from cloud_service import certificates

    pair = certificates.make_authority(folder, days=days)
    typer.echo(f"wrote {pair.cert} (edges: tls_ca; services: tls_client_ca) and {pair.key} (keep it safe)")


@certs_app.command("server")
def make_server(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="Host names and IP addresses of the service.")],
    days: Days = 397,
) -> None:
    """Sign a certificate for a service; a running one takes up its renewal."""
    from cloud_service import certificates

    pair = certificates.make_server(folder, names, days=days)
    typer.echo(f"wrote {pair.cert} (tls_cert) and {pair.key} (tls_key)")


@certs_app.command("client")
def make_client(folder: Folder, name: Tenant, days: Days = 397) -> None:
    """Sign a certificate for an edge, for services with tls_client_ca."""
    from cloud_service import certificates

    pair = certificates.make_client(folder, checked_tenant(name), days=days)
    typer.echo(f"wrote {pair.cert} (tls_client_cert) and {pair.key} (tls_client_key)")


@tokens_app.command("add")
def add_token(
    tenant: Tenant,
    expires: Annotated[str, typer.Option(help="30m, 12h, 90d, or never.")] = "90d",
    limit: LimitTexts = None,
    store: StoreFile = None,
) -> None:
    """Make a token. It is shown once: the file keeps only its hash."""
    from cloud_service.security import new_token
    from cloud_service.tenants import opened

    now_s = time.time()
    text, token = new_token(
        checked_tenant(tenant),
        limits=parsed_limits(limit or ()),
        now_s=now_s,
        expires_s=None if expires == "never" else now_s + seconds(expires),
    )
    with opened(_path(store)) as tenants:
        tenants.add_token(token)
    typer.echo(text)


@tokens_app.command("list")
def list_tokens(store: StoreFile = None) -> None:
    """Show all tokens but their secrets."""
    from cloud_service.tenants import read_tenants

    now_s = time.time()
    table = Table("id", "tenant", "made", "expires", "limits", box=None)
    for token in read_tenants(_path(store)).tokens:
        expires = "never" if token.expires_s is None else _day(token.expires_s)
        state = f"{expires} (expired)" if token.expired(now_s) else expires
        table.add_row(token.id, token.tenant, _day(token.created_s), state, shown_limits(token.limits))
    Console(soft_wrap=True).print(table)


@tokens_app.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(help="Id, as in the list.")], store: StoreFile = None
) -> None:
    """Forget a token: running services refuse it from the next call on; streams that run go on."""
    from cloud_service.tenants import opened

    with opened(_path(store)) as tenants:
        token = tenants.token(token_id)
        tenants.remove_token(token.id)
    typer.echo(f"revoked {token.id} of {token.tenant}")


@tokens_app.command("rotate")
def rotate_token(
    token_id: Annotated[str, typer.Argument(help="Id of the token to replace.")],
    overlap: Annotated[str, typer.Option(help="How long the old one still counts: 30m, 12h, 7d.")] = "24h",
    expires: Annotated[str, typer.Option(help="Of the new one: 30m, 12h, 90d, or never.")] = "90d",
    store: StoreFile = None,
) -> None:
    """Make a token of the same tenant and limits, and let the old one expire."""
    from cloud_service.security import new_token
    from cloud_service.tenants import opened

    now_s = time.time()
    with opened(_path(store)) as tenants:
        old = tenants.token(token_id)
        text, new = new_token(
            old.tenant,
            limits=old.limits,
            now_s=now_s,
            expires_s=None if expires == "never" else now_s + seconds(expires),
        )
        tenants.add_token(new)
        tenants.expire_token(old.id, now_s + seconds(overlap))
    typer.echo(text)


@tenants_app.command("limit")
def limit_tenant(tenant: Tenant, limit: LimitTexts = None, store: StoreFile = None) -> None:
    """Set a tenant's limits, in place of all that it had; with none, it has the service's again."""
    from cloud_service.tenants import opened

    limits = parsed_limits(limit or ())
    with opened(_path(store)) as tenants:
        tenants.set_limits(checked_tenant(tenant), limits)
    typer.echo(f"{tenant}: {shown_limits(limits)}")


@tenants_app.command("list")
def list_tenants(store: StoreFile = None) -> None:
    """Show tenants, how many tokens each has, and limits of their own."""
    from cloud_service.tenants import read_tenants

    tenants = read_tenants(_path(store))
    limits = tenants.limits or {}
    num_tokens = Counter(token.tenant for token in tenants.tokens)
    table = Table("tenant", "tokens", "limits", box=None)
    for name in sorted({*num_tokens, *limits}):
        table.add_row(name, str(num_tokens[name]), shown_limits(limits.get(name, Limits())))
    Console(soft_wrap=True).print(table)


def seconds(duration: str) -> float:
    """Read a duration.

    Raises:
        InvalidSetting: it is none.

    >>> seconds("12h")
    43200
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise InvalidSetting(f"{duration!r} is no duration; write 30m, 12h or 90d")
    return int(match[1]) * _UNIT_S[match[2]]


def parsed_limits(texts: Sequence[str]) -> Limits:
    """Read NAME=NUMBER. Raises InvalidSetting naming what cannot be used."""
    values = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given:
            raise InvalidSetting(f"{text!r} is no limit; write NAME=NUMBER, for example streams=4")
        values[name] = value
    return limits_from(values)


def shown_limits(limits: Limits) -> str:
    """What is set: the rest is the service's."""
    own = ", ".join(f"{name}={getattr(limits, name):g}" for name in sorted(limits.model_fields_set))
    return own or "those of the service"


def checked_tenant(name: str) -> str:
    """Raises InvalidSetting where it is no name of a tenant."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise InvalidSetting(f"{name!r} is no name of a tenant; use up to 64 letters, digits, and . _ @ -")
    return name


def _path(given: Path | None) -> Path:
    """Raises InvalidSetting where no file is named."""
    settings, _ = load(
        CloudConfig,
        flags={"tokens": None if given is None else str(given)},
        file=None,
        file_name="duet-cloud.yaml",
        env_prefix="DUET_CLOUD_",
    )
    if settings.tokens is None:
        raise InvalidSetting("name the file of tokens: --tokens FILE, or tokens in duet-cloud.yaml")
    return Path(settings.tokens)


def _day(seconds_: float) -> str:
    return datetime.fromtimestamp(seconds_).strftime("%Y-%m-%d %H:%M")
