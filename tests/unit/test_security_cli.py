"""`duet-cloud certs`, `tokens` and `tenants`, as an operator types them."""

from __future__ import annotations

import os
import re
import ssl
from datetime import datetime, timezone
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from typer.testing import CliRunner

from cloud_service.cli import app
from cloud_service.security import Gatekeeper
from shared.errors import TABLE, AccessDenied, InvalidSetting
from shared.limits import Limits


def run(*arguments: str | Path) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refusal(*arguments: str | Path) -> str:
    """The one line that the command ends with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (TABLE[InvalidSetting].exit_code, "")
    [line] = result.stderr.splitlines()
    return line


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "tokens.db"
    monkeypatch.setenv("DUET_CLOUD_TOKENS", str(file))
    monkeypatch.chdir(tmp_path)
    return file


def tenant_of(file: Path, token: str) -> str | None:
    return Gatekeeper(Limits(), file).identify([("authorization", f"Bearer {token}")], {}).tenant


def test_a_token_from_its_making_to_its_end(tokens: Path) -> None:
    token = run("tokens", "add", "alice", "--limit", "streams=2", "--expires", "12h").strip()
    token_id = token.split("_")[1]
    assert tenant_of(tokens, token) == "alice"
    listed = run("tokens", "list")
    assert token_id in listed
    assert "streams=2" in listed
    assert token.rpartition("_")[2] not in listed
    renewed = run("tokens", "rotate", token_id, "--overlap", "1h").strip()
    assert tenant_of(tokens, token) == tenant_of(tokens, renewed) == "alice"
    assert run("tokens", "list").count("streams=2") == 2
    run("tokens", "revoke", token_id)
    with pytest.raises(AccessDenied):
        tenant_of(tokens, token)
    assert tenant_of(tokens, renewed) == "alice"


def test_a_rotation_without_overlap_ends_the_old_token_at_once(tokens: Path) -> None:
    token = run("tokens", "add", "alice").strip()
    run("tokens", "rotate", token.split("_")[1], "--overlap", "0s")
    with pytest.raises(AccessDenied):
        tenant_of(tokens, token)
    assert "(expired)" in run("tokens", "list")


def test_limits_of_a_tenant_are_set_shown_and_taken_away(tokens: Path) -> None:
    token = run("tokens", "add", "alice").strip()
    run("tenants", "limit", "alice", "--limit", "streams=3", "--limit", "idle_s=9.5")
    assert re.search(r"alice +1 +idle_s=9\.5, streams=3", run("tenants", "list"))
    caller = Gatekeeper(Limits(), tokens).identify([("authorization", f"Bearer {token}")], {})
    assert (caller.limits.streams, caller.limits.idle_s) == (3, 9.5)
    run("tenants", "limit", "alice")
    assert "those of the service" in run("tenants", "list")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("tokens", "add", "al ice"), "'al ice'"),
        (("tokens", "add", "alice", "--expires", "soon"), "'soon'"),
        (("tokens", "add", "alice", "--limit", "streams"), "NAME=NUMBER"),
        (("tokens", "add", "alice", "--limit", "streems=1"), "'streems'"),
        (("tokens", "revoke", "0123456789ab"), "no token '0123456789ab'"),
        (("tokens", "rotate", "0123456789ab"), "no token '0123456789ab'"),
    ],
)
def test_what_an_operator_gets_wrong_is_named(tokens: Path, arguments: tuple[str, ...], word: str) -> None:
    run("tokens", "add", "alice")
    assert word in refusal(*arguments)


def test_without_a_file_the_command_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUET_CLOUD_TOKENS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "--tokens FILE" in refusal("tokens", "list")


# Certificates


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_what_the_authority_signs_is_valid_for_its_purpose_and_no_other(tmp_path: Path) -> None:
    run("certs", "ca", tmp_path)
    run("certs", "server", tmp_path, "gpu.example", "192.0.2.7")
    run("certs", "client", tmp_path, "alice")
    policy = PolicyBuilder().store(Store([loaded(tmp_path / "ca.pem")])).time(datetime.now(timezone.utc))
    server, client = loaded(tmp_path / "gpu.example.pem"), loaded(tmp_path / "alice.pem")
    for name in (x509.DNSName("gpu.example"), x509.IPAddress(ip_address("192.0.2.7"))):
        policy.build_server_verifier(name).verify(server, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("other.example")).verify(server, [])
    purposes = {
        path: loaded(tmp_path / path).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        for path in ("gpu.example.pem", "alice.pem")
    }
    assert list(purposes["gpu.example.pem"]) == [x509.ExtendedKeyUsageOID.SERVER_AUTH]
    assert list(purposes["alice.pem"]) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert client.subject.rfc4514_string() == "CN=alice"


def test_keys_belong_to_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        run("certs", "ca", tmp_path)
        run("certs", "server", tmp_path, "gpu.example")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.key")} == {0o600}


def test_an_authority_is_not_overwritten(tmp_path: Path) -> None:
    run("certs", "ca", tmp_path)
    before = (tmp_path / "ca.key").read_bytes()
    assert "already" in refusal("certs", "ca", tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == before


def test_a_certificate_can_be_renewed_in_place(tmp_path: Path) -> None:
    run("certs", "ca", tmp_path)
    serials = set()
    for _ in range(2):
        run("certs", "server", tmp_path, "gpu.example", "--days", "7")
        serials.add(loaded(tmp_path / "gpu.example.pem").serial_number)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "gpu.example.pem", tmp_path / "gpu.example.key")
    assert len(serials) == 2


def test_without_an_authority_nothing_is_signed(tmp_path: Path) -> None:
    assert "duet-cloud certs ca" in refusal("certs", "server", tmp_path, "gpu.example")
