"""What `duet doctor` finds out of a real service's certificate and clock."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from cloud_service.certificates import Pair
from edge_agent.doctor.checks import MAX_CLOCK_AHEAD_S
from edge_agent.doctor.facts import TlsFacts, TlsFault
from edge_agent.doctor.handshake import shake_hands
from shared.config import CloudConfig, EdgeConfig
from tests.scripted_target import ScriptedTarget
from tests.security.conftest import Team
from tests.service import connection, serving

DAY = timedelta(days=1)


def signed(team: Team, folder: Path, *, begins: timedelta, ends: timedelta) -> Pair:
    """The team's server certificate again, with other days."""
    authority = x509.load_pem_x509_certificate(team.ca.cert.read_bytes())
    key = serialization.load_pem_private_key(team.ca.key.read_bytes(), None)
    old = x509.load_pem_x509_certificate(team.server.cert.read_bytes())
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(
        subject_name=old.subject,
        issuer_name=authority.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now + begins,
        not_valid_after=now + ends,
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    cert = folder / "server.pem"
    cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return Pair(cert, team.server.key)


async def handshake(pair: Pair | None, team: Team, **settings: object) -> TlsFacts:
    """With a service that shows this certificate, by an edge that trusts the team."""
    tls = {} if pair is None else {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
    target = ScriptedTarget(lambda text: 1)
    async with serving(target, CloudConfig.model_validate(tls)) as (address, _):
        edge = EdgeConfig.model_validate({"cloud": address, "tls_ca": str(team.ca.cert), **settings})
        return await asyncio.to_thread(shake_hands, address, edge)


async def test_a_good_certificate_tells_how_long_it_is_good(team: Team, tmp_path: Path) -> None:
    facts = await handshake(signed(team, tmp_path, begins=-DAY, ends=5 * DAY), team)
    assert facts.fault is None
    assert facts.expires_in_s == pytest.approx(5 * 86_400, abs=60)


@pytest.mark.parametrize(
    ("begins", "ends", "fault"),
    [(-2 * DAY, -DAY, TlsFault.EXPIRED), (DAY, 2 * DAY, TlsFault.NOT_YET_VALID)],
)
async def test_a_certificate_out_of_its_days_is_found(
    team: Team, tmp_path: Path, begins: timedelta, ends: timedelta, fault: TlsFault
) -> None:
    assert (await handshake(signed(team, tmp_path, begins=begins, ends=ends), team)).fault is fault


async def test_another_name_another_authority_and_plain_text_are_told_apart(
    team: Team, strangers: Team
) -> None:
    other_name = await handshake(team.server, team, tls_server_name="elsewhere.example")
    assert other_name.fault is TlsFault.OTHER_NAME
    assert "elsewhere.example" in str(other_name.error)
    assert (await handshake(strangers.server, team)).fault is TlsFault.UNKNOWN_AUTHORITY
    assert (await handshake(None, team)).fault is TlsFault.PLAIN_TEXT


async def test_nobody_at_the_address_is_no_fault_of_the_certificate(team: Team) -> None:
    edge = EdgeConfig.model_validate({"cloud": "127.0.0.1:9", "tls_ca": str(team.ca.cert)})
    assert await asyncio.to_thread(shake_hands, "127.0.0.1:9", edge) == TlsFacts("127.0.0.1:9")


async def test_the_clouds_clock_is_compared_with_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(ScriptedTarget(lambda text: 1)) as (address, _), connection(address) as cloud:
        ahead = (await cloud.describe()).clock_ahead_s
        assert ahead is not None
        assert abs(ahead) < 1
        fast = SimpleNamespace(**vars(time) | {"time": lambda: time.time() + 2 * MAX_CLOCK_AHEAD_S})
        monkeypatch.setattr("cloud_service.servicer.time", fast)
        assert (await cloud.describe()).clock_ahead_s == pytest.approx(2 * MAX_CLOCK_AHEAD_S, abs=1)
