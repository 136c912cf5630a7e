"""Shakes hands with a cloud as gRPC would, to see its certificate."""

from __future__ import annotations

import socket
import ssl
import time

from edge_agent.doctor.facts import TlsFacts, TlsFault
from shared.addresses import host_of
from shared.config import EdgeConfig

# OpenSSL's verify codes (X509_V_ERR_*), of which Python's ssl has no names.
_FAULTS = {
    9: TlsFault.NOT_YET_VALID,
    10: TlsFault.EXPIRED,
    18: TlsFault.UNKNOWN_AUTHORITY,
    19: TlsFault.UNKNOWN_AUTHORITY,
    20: TlsFault.UNKNOWN_AUTHORITY,
    21: TlsFault.UNKNOWN_AUTHORITY,
    62: TlsFault.OTHER_NAME,
    64: TlsFault.OTHER_NAME,
}


def shake_hands(address: str, settings: EdgeConfig) -> TlsFacts:
    """
    Args:
        address: HOST:PORT of one replica.
    """
    host, port = host_of(address), int(address.rpartition(":")[2])
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
        context.set_alpn_protocols(["h2"])
        if settings.tls_client_cert is not None:
            context.load_cert_chain(settings.tls_client_cert, settings.tls_client_key)
        with (
            socket.create_connection((host, port), timeout=settings.connect_timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=settings.tls_server_name or host) as secure,
        ):
            certificate = secure.getpeercert() or {}
    except ConnectionError:  # nobody there: that is the cloud's finding
        return TlsFacts(address)
    except ssl.SSLCertVerificationError as error:
        return TlsFacts(address, _FAULTS.get(error.verify_code, TlsFault.OTHER), error.verify_message)
    except ssl.SSLError as error:
        plain_text = error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
        fault = TlsFault.PLAIN_TEXT if plain_text else TlsFault.OTHER
        return TlsFacts(address, fault, "it does not speak TLS" if plain_text else str(error.reason or error))
    except OSError as error:
        return TlsFacts(address, TlsFault.OTHER, error.strerror or str(error))
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return TlsFacts(address, expires_in_s=ends - time.time())
