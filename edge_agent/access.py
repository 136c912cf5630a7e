"""How the edge reaches a cloud that not everybody may use: TLS, a certificate of its own, a token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from shared.config import EdgeConfig
from shared.errors import CloudUntrusted, InvalidSetting


@dataclass(frozen=True, slots=True)
class Access:
    credentials: grpc.ChannelCredentials | None = None
    """None is plain text."""
    server_name: str | None = None
    """Name to look for in the service's certificate; None is the host of its address."""
    metadata: tuple[tuple[str, str], ...] = ()
    """What every call brings along."""

    @classmethod
    def of(cls, settings: EdgeConfig) -> Access:
        """Raises InvalidSetting where a file cannot be read."""
        credentials = None
        if settings.encrypts:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=_read("tls_ca", settings.tls_ca),
                private_key=_read("tls_client_key", settings.tls_client_key),
                certificate_chain=_read("tls_client_cert", settings.tls_client_cert),
            )
        # `EdgeConfig` has no token for plain text to another machine.
        token = settings.token
        bearer = () if token is None else (("authorization", f"Bearer {token.get_secret_value()}"),)
        return cls(credentials, settings.tls_server_name, bearer)

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options)
        named = [] if self.server_name is None else [("grpc.ssl_target_name_override", self.server_name)]
        return grpc.aio.secure_channel(address, self.credentials, [*options, *named])

    def distrust(self, address: str, details: str) -> CloudUntrusted | None:
        """What is wrong with the service's proof of who it is, where that is why a connection failed.

        Args:
            details: gRPC's own account of it.
        """
        if "WRONG_VERSION_NUMBER" in details:
            what = "does not speak TLS: give it a certificate, or take plain text with --insecure"
        elif found := re.search(r"CERTIFICATE_VERIFY_FAILED(?:: ([a-z ]+))?", details):
            reason = found[1] or "it cannot be verified"
            what = f"shows a certificate that does not count ({reason}); name its authority with --tls-ca"
        elif "not in peer certificate" in details or "Hostname Verification" in details:
            what = "shows a certificate of another name; if you know it to be right, set tls_server_name"
        else:
            return None
        return CloudUntrusted(f"the cloud at {address} {what}")

    def guess(self, details: str) -> str:
        """What may be behind a service that hangs up before it has answered anything; empty otherwise."""
        if "closed" not in details and "reset" not in details:
            return ""
        if self.credentials is None:
            return " (so does one with TLS where it gets plain text: name its authority with --tls-ca)"
        return " (so does one that misses, or does not know, a certificate of yours: set tls_client_cert)"


def _read(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidSetting(f"{name} = {path!r} cannot be read: {error.strerror}") from None
    # gRPC takes what holds no certificate or key, too, and every handshake fails then without a reason.
    if b"-----BEGIN" not in content:
        raise InvalidSetting(f"{name} = {path!r} is no PEM file")
    return content
