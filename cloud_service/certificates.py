"""An authority for a small team, and the certificates that it signs: ECDSA P-256, X.509 v3 (RFC 5280)."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import InvalidSetting

CA_DAYS = 3650
LEAF_DAYS = 397
"""The longest that browsers take of a server's certificate."""
_CLOCKS_MAY_DIFFER = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a certificate and its key lie."""

    cert: Path
    key: Path

    @classmethod
    def named(cls, folder: Path, name: str) -> Pair:
        return cls(folder / f"{name}.pem", folder / f"{name}.key")


def make_authority(folder: Path, *, days: int = CA_DAYS) -> Pair:
    """Make ca.pem and ca.key.

    Raises:
        InvalidSetting: there is one already: every certificate that it signed would be void.
    """
    pair = Pair.named(folder, "ca")
    if pair.key.exists() or pair.cert.exists():
        raise InvalidSetting(f"{folder} holds an authority already; name another folder, or delete ca.*")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_subject("duet team authority"), key.public_key(), days)
    certificate = (
        builder.issuer_name(_subject("duet team authority"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(pair, certificate, key)
    return pair


def make_server(folder: Path, names: Sequence[str], *, days: int = LEAF_DAYS) -> Pair:
    """Sign a certificate for a service that is reached by these host names and IP addresses.

    It replaces the folder's earlier one of the first name; a running service takes it up.

    Raises:
        InvalidSetting: there is no authority in the folder.
    """
    alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
    return _issue(folder, names[0], ExtendedKeyUsageOID.SERVER_AUTH, days, alternatives)


def make_client(folder: Path, name: str, *, days: int = LEAF_DAYS) -> Pair:
    """Sign a certificate for an edge; its name is its tenant, where no tokens are asked for.

    Raises:
        InvalidSetting: there is no authority in the folder.
    """
    return _issue(folder, name, ExtendedKeyUsageOID.CLIENT_AUTH, days)


def _issue(
    folder: Path,
    name: str,
    usage: x509.ObjectIdentifier,
    days: int,
    alternatives: x509.SubjectAlternativeName | None = None,
) -> Pair:
    ca, ca_key = _load_authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(_subject(name), key.public_key(), days)
        .issuer_name(ca.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
    )
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    pair = Pair.named(folder, name.replace("*", "wildcard").replace(":", "-"))
    _write(pair, builder.sign(ca_key, hashes.SHA256()), key)
    return pair


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    pair = Pair.named(folder, "ca")
    try:
        ca = x509.load_pem_x509_certificate(pair.cert.read_bytes())
        key = serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise InvalidSetting(
            f"there is no {error.filename}: make an authority with `duet-cloud certs ca {folder}`"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"the authority in {folder} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidSetting(f"{pair.key} is no key of `duet-cloud certs ca`")
    return ca, key


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_MAY_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(pair: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pair.cert.parent.mkdir(parents=True, exist_ok=True)
    # The key first: a service that looks in between keeps what it has, and looks again.
    _replace(pair.key, secret, 0o600)
    _replace(pair.cert, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write whole or not at all; nobody else can read a key at any moment."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    new.replace(path)
