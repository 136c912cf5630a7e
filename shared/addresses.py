"""Who can reach an address, and what may travel to it in plain text. Pure: text in, decision out."""

from __future__ import annotations

from ipaddress import ip_address

from shared.errors import InvalidSetting


def host_of(address: str) -> str:
    """The host of HOST:PORT, without the brackets of an IPv6 address.

    >>> host_of("[::1]:50151")
    '::1'
    """
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is of this machine alone. Of names only `localhost` counts (RFC 6761).

    >>> [is_loopback(a) for a in ("127.0.0.1:1", "[::1]:1", "localhost:1", "0.0.0.0:1")]
    [True, True, True, False]
    """
    host = host_of(address)
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(listen: str, *, encrypted: bool, authenticated: bool, insecure: bool, remedy: str) -> None:
    """Refuse to serve other machines in plain text, or anybody who asks, unless that was asked for.

    Args:
        listen: HOST:PORT.
        encrypted: whether the connection is.
        authenticated: whether callers must say who they are.
        insecure: whether the operator asked for an open service.
        remedy: what to set instead.
    Raises:
        InvalidSetting: names what is missing.
    """
    missing = [
        what
        for what, there in (
            ("encrypts nothing", encrypted),
            ("asks nobody who they are", authenticated),
        )
        if not there
    ]
    if missing and not insecure and not is_loopback(listen):
        raise InvalidSetting(
            f"{listen} is open to other machines, but the service {' and '.join(missing)}: {remedy}"
        )
