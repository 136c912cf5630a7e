"""Turns away what other sites' pages make a browser send: they could spend the models, and read answers.

A page anywhere can send requests to this machine's own addresses. Browsers say so in `Sec-Fetch-Site`, older
ones in `Origin`; the order of the checks is that of Go's `net/http.CrossOriginProtection`. A page may also
give its own host's name the address 127.0.0.1 ("DNS rebinding"), and is then of the same origin; but `Host`
still holds its name. Programs that are no browsers send none of these headers, and are served.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.http.errors import ApiError
from shared.addresses import is_loopback

_READS = ("GET", "HEAD", "OPTIONS")
"""A foreign page cannot see what these answer, and they change nothing."""


def check_same_site(method: str, headers: Mapping[str, str]) -> None:
    """
    Args:
        headers: by lower-case name.
    Raises:
        ApiError: another site's page asks.
    """
    if method in _READS:
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None:
        own = headers.get("host")
        foreign = origin is not None and origin not in (f"http://{own}", f"https://{own}")
    else:
        foreign = site not in ("same-origin", "none")
    if foreign:
        raise ApiError(
            f"a web page of {origin or 'another site'} may not ask this server; ask from the server's own"
            " page, or from a program that is no browser",
            status=403,
            code="cross_origin_request",
        )


def check_host(connected_to: str, headers: Mapping[str, str]) -> None:
    """
    Args:
        connected_to: the address of ours at which the connection arrived.
        headers: by lower-case name.
    Raises:
        ApiError: this machine's own address was asked under a name that is not.
    """
    host = headers.get("host", "")
    if is_loopback(f"{connected_to}:0") and not (is_loopback(host) or is_loopback(f"{host}:0")):
        raise ApiError(
            f"this server is asked as {host!r}, but without an API key it answers on this machine to"
            " localhost and 127.0.0.1 alone; ask by such a name, or set api_key",
            status=403,
            code="unknown_host",
        )
