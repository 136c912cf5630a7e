"""Certificates and keys that settings name, looked at before they are used."""

from __future__ import annotations

import ssl
from pathlib import Path

from shared.errors import InvalidSetting


def check_pair(cert: Path, key: Path) -> None:
    """Raises InvalidSetting where the files are no certificate and the key to it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise InvalidSetting(
            f"{cert} and {key} are not a certificate and its key: {_reason(error)};"
            " `duet-cloud certs server` makes both"
        ) from None


def check_authority(ca: Path) -> None:
    """Raises InvalidSetting where the file holds no certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSetting(f"{ca} holds no certificates: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).replace("_", " ").lower()
