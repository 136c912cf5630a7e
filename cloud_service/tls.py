"""The service's side of TLS: certificates that are read anew when their files change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog

from shared.config import CloudConfig
from shared.errors import InvalidSetting
from shared.pem_files import check_authority, check_pair

if TYPE_CHECKING:
    Stamp = tuple[tuple[int, int], ...]

log = structlog.get_logger("duet.cloud")


def server_credentials(config: CloudConfig) -> grpc.ServerCredentials | None:
    """What the service proves and asks for; None is plain text.

    The files are looked at for every new connection: a renewed certificate serves from then on, and
    connections that stand go on with the old one.

    Raises:
        InvalidSetting: a file is missing, is no certificate, or does not belong to the key.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    ca = None if config.tls_client_ca is None else Path(config.tls_client_ca)
    files = _Files(Path(config.tls_cert), Path(config.tls_key), ca)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.read_if_changed,  # type: ignore[arg-type]  # None is "unchanged"
        require_client_authentication=ca is not None,
    )


class _Files:
    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._stamp: Stamp = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        stamp = self._look()
        check_pair(self._cert, self._key)
        if self._client_ca is not None:
            check_authority(self._client_ca)
        self._stamp = stamp
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._cert.read_bytes())],
            None if self._client_ca is None else self._client_ca.read_bytes(),
        )

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC in a thread of its own, before each handshake; None keeps what is in use."""
        try:
            if self._look() == self._stamp:
                return None
            renewed = self.read()
        except (InvalidSetting, OSError) as error:
            # Half written, most likely: the next handshake looks again.
            log.warning("the renewed certificate cannot be used yet", error=str(error))
            return None
        log.info("certificate renewed", file=str(self._cert))
        return renewed

    def _look(self) -> Stamp:
        """Raises InvalidSetting where a file is missing."""
        try:
            stats = [path.stat() for path in (self._cert, self._key, self._client_ca) if path is not None]
        except OSError as error:
            raise InvalidSetting(f"cannot read {error.filename}: {error.strerror}") from None
        return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)
