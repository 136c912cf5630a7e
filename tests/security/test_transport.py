"""TLS as both ends use it: who is believed, what is refused, and certificates renewed while streams run."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud_service.certificates import Pair, make_authority, make_server
from edge_agent.remote import Cloud, Meter
from shared.config import CloudConfig, EdgeConfig
from shared.errors import CloudError, CloudUnavailable, CloudUntrusted, InvalidSetting
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.scripted_target import ScriptedTarget
from tests.security.conftest import Team
from tests.service import generate, run_duet, serving

REQUEST = Open(prompt=(Message("user", "hello"),), sampling=Sampling(), seed=0, max_tokens=8)
ANSWER = [1 + n % 250 for n in range(5, 13)]


def target() -> ScriptedTarget:
    return ScriptedTarget(lambda text: 1 + len(text) % 250)


@asynccontextmanager
async def service(pair: Pair | None = None, **settings: Any) -> AsyncIterator[str]:
    """The address of a service, with TLS where a certificate is given."""
    if pair is not None:
        settings |= {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
    async with serving(target(), CloudConfig.model_validate(settings)) as (address, _):
        yield address


@asynccontextmanager
async def edge(address: str, **settings: Any) -> AsyncIterator[Cloud]:
    async with Cloud.of(EdgeConfig.model_validate({"cloud": address, **settings})) as cloud:
        yield cloud


async def answer(address: str, **settings: Any) -> list[int]:
    async with edge(address, **settings) as cloud:
        return (await generate(cloud, REQUEST)).token_ids


async def refused(address: str, **settings: Any) -> CloudError:
    with pytest.raises(CloudError) as caught:
        await answer(address, **settings)
    assert "\n" not in str(caught.value)
    assert address in str(caught.value)
    return caught.value


async def test_an_edge_that_knows_the_authority_gets_its_answer(team: Team) -> None:
    async with service(team.server) as address:
        assert await answer(address, tls_ca=str(team.ca.cert)) == ANSWER


async def test_a_certificate_of_another_authority_is_not_believed(team: Team, strangers: Team) -> None:
    async with service(strangers.server) as address:
        error = await refused(address, tls_ca=str(team.ca.cert))
    assert isinstance(error, CloudUntrusted)
    assert "--tls-ca" in str(error)


async def test_a_certificate_of_another_name_is_not_believed(team: Team, tmp_path: Path) -> None:
    folder = tmp_path / "team"
    shutil.copytree(team.folder, folder)
    async with service(make_server(folder, ["elsewhere.example"])) as address:
        error = await refused(address, tls_ca=str(team.ca.cert))
        assert isinstance(error, CloudUntrusted)
        assert "tls_server_name" in str(error)
        named = {"tls_ca": str(team.ca.cert), "tls_server_name": "elsewhere.example"}
        assert await answer(address, **named) == ANSWER


async def test_a_service_without_tls_is_not_believed(team: Team) -> None:
    async with service() as address:
        error = await refused(address, tls_ca=str(team.ca.cert))
    assert isinstance(error, CloudUntrusted)
    assert "does not speak TLS" in str(error)


async def test_plain_text_to_a_service_with_tls_says_what_to_do(team: Team) -> None:
    async with service(team.server) as address:
        error = await refused(address)
    assert isinstance(error, CloudUnavailable)
    assert "--tls-ca" in str(error)


# Certificates of edges


async def test_an_edge_with_a_certificate_of_the_team_is_let_in(team: Team) -> None:
    alice = team.client("alice")
    async with service(team.server, tls_client_ca=str(team.ca.cert)) as address:
        shown = {"tls_client_cert": str(alice.cert), "tls_client_key": str(alice.key)}
        assert await answer(address, tls_ca=str(team.ca.cert), **shown) == ANSWER


async def test_an_edge_without_a_certificate_or_with_a_strangers_is_refused(
    team: Team, strangers: Team
) -> None:
    mallory = strangers.client("alice")
    async with service(team.server, tls_client_ca=str(team.ca.cert)) as address:
        for shown in ({}, {"tls_client_cert": str(mallory.cert), "tls_client_key": str(mallory.key)}):
            error = await refused(address, tls_ca=str(team.ca.cert), **shown)
            assert "tls_client_cert" in str(error)


async def test_a_servers_certificate_opens_no_door_to_edges(team: Team) -> None:
    server = team.server
    async with service(server, tls_client_ca=str(team.ca.cert)) as address:
        shown = {"tls_client_cert": str(server.cert), "tls_client_key": str(server.key)}
        await refused(address, tls_ca=str(team.ca.cert), **shown)


# Renewal


async def test_a_renewed_certificate_serves_new_connections_and_old_streams_go_on(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_authority(old)
    make_authority(new)
    served = make_server(old, ["127.0.0.1"])
    renewed = make_server(new, ["127.0.0.1"])
    async with (
        service(served) as address,
        edge(address, tls_ca=str(old / "ca.pem")) as cloud,
        cloud.speculate(REQUEST, Meter()) as stream,
    ):
        shutil.copy(renewed.key, served.key)
        # Half of a renewal: the key is new, the certificate is not. What was read before stays in use.
        assert await answer(address, tls_ca=str(old / "ca.pem")) == ANSWER
        shutil.copy(renewed.cert, served.cert)
        assert await answer(address, tls_ca=str(new / "ca.pem")) == ANSWER
        assert isinstance(await refused(address, tls_ca=str(old / "ca.pem")), CloudUntrusted)
        assert stream.opened.prompt_token_ids
        assert (await generate(cloud, REQUEST)).token_ids == ANSWER, "on the connection that stands"


async def test_certificates_that_become_garbage_leave_the_old_ones_in_force(tmp_path: Path) -> None:
    make_authority(tmp_path)
    pair = make_server(tmp_path, ["127.0.0.1"])
    async with service(pair) as address:
        for content in (b"", b"-----BEGIN CERTIFICATE-----\nnonsense"):
            pair.cert.write_bytes(content)
            assert await answer(address, tls_ca=str(tmp_path / "ca.pem")) == ANSWER
        pair.cert.unlink()
        assert await answer(address, tls_ca=str(tmp_path / "ca.pem")) == ANSWER


# Settings


def test_a_service_open_to_other_machines_in_plain_text_does_not_start(tmp_path: Path) -> None:
    done = run_duet("serve", "--listen", "0.0.0.0:0", folder=tmp_path, program="duet-cloud")
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2
    for word in ("0.0.0.0:0", "tls_cert", "duet-cloud certs", "--insecure"):
        assert word in line


def test_an_edge_sends_no_token_to_another_machine_in_plain_text(tmp_path: Path) -> None:
    done = run_duet(
        *("ask", "hello", "--mode", "cloud", "--cloud", "server.example:1", "--insecure"),
        folder=tmp_path,
        env={"DUET_TOKEN": "t" * 20},
    )
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert "plain text" in line
    assert "t" * 20 not in line


@pytest.mark.parametrize("broken", ["missing", "garbage", "another key"])
def test_a_certificate_that_cannot_serve_is_an_error_at_the_start(
    team: Team, strangers: Team, tmp_path: Path, broken: str
) -> None:
    cert, key = team.server.cert, team.server.key
    if broken == "missing":
        cert = tmp_path / "nowhere.pem"
    elif broken == "garbage":
        cert = tmp_path / "garbage.pem"
        cert.write_text("garbage")
    else:
        key = strangers.server.key
    flags = (f"--tls-cert={cert}", f"--tls-key={key}", "--listen=127.0.0.1:0")
    done = run_duet("serve", *flags, folder=tmp_path, program="duet-cloud")
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert cert.name in line


@pytest.mark.parametrize("name", ["tls_ca", "tls_client_cert"])
async def test_a_file_of_the_edge_that_is_no_certificate_is_named(
    team: Team, tmp_path: Path, name: str
) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    pair = {"tls_client_cert": str(team.ca.cert), "tls_client_key": str(team.ca.key)}
    for path in (garbage, tmp_path / "nowhere.pem"):
        with pytest.raises(InvalidSetting, match=name):
            Cloud.of(EdgeConfig.model_validate({**pair, name: str(path)}))
