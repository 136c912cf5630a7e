"""`duet serve` with a certificate, as a client of HTTPS meets it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cloud_service.certificates import make_server
from tests.security.conftest import Team
from tests.service import RunningServer, run_duet, running_serve
from tests.tiny_pair import TinyPair

KEY = "a key of some length"
RENEWED_WITHIN_S = 20.0


@pytest.fixture(scope="module")
def server(team: Team, tiny_pair: TinyPair) -> Iterator[RunningServer]:
    tls = {"tls_cert": team.server.cert, "tls_key": team.server.key}
    env = {"DUET_API_KEY": KEY, "DUET_CONTEXT_TOKENS": "512"}
    with running_serve(tiny_pair.draft_gguf, env=env, max_tokens=8, **tls) as server:
        yield server


def test_a_client_that_knows_the_authority_gets_its_answer_streamed_and_whole(
    server: RunningServer, team: Team
) -> None:
    assert server.address.startswith("https://127.0.0.1:")
    trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(team.ca.cert)))
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, http_client=trusting) as client:
        asked = {"model": "duet-local", "messages": [{"role": "user", "content": "hi"}]}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole != ""
        assert trusting.get(server.address).text.startswith("<!doctype html>")


def test_a_client_that_does_not_know_it_is_not_connected(server: RunningServer) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.address}/health")


def test_plain_http_gets_no_answer(server: RunningServer) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.address.replace('https', 'http')}/health")


def serial_number(url: str, team: Team) -> str:
    """Of the certificate that a new connection is shown."""
    trusted = ssl.create_default_context(cafile=str(team.ca.cert))
    with httpx.Client(verify=trusted) as client, client.stream("GET", f"{url}/health") as response:
        shown = response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
        return str(shown["serialNumber"])


def test_a_renewed_certificate_serves_new_connections_and_half_of_one_changes_nothing(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    team = Team(tmp_path)
    tls = {"tls_cert": team.server.cert, "tls_key": team.server.key}
    with running_serve(tiny_pair.draft_gguf, env={"DUET_API_KEY": KEY}, **tls) as server:
        before = serial_number(server.address, team)
        whole = team.server.cert.read_bytes()
        team.server.cert.write_bytes(whole[: len(whole) // 2])
        time.sleep(2.5)  # it is looked at every second
        assert serial_number(server.address, team) == before
        make_server(team.folder, ["localhost", "127.0.0.1"])
        deadline = time.monotonic() + RENEWED_WITHIN_S
        while serial_number(server.address, team) == before:
            assert time.monotonic() < deadline, "it was not taken up"
            time.sleep(0.1)


@pytest.mark.parametrize("broken", ["tls_cert", "tls_key"])
def test_a_certificate_that_cannot_be_used_is_refused_in_one_line(
    team: Team, tiny_pair: TinyPair, tmp_path: Path, broken: str
) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    files = {"tls_cert": str(team.server.cert), "tls_key": str(team.server.key), broken: "none.pem"}
    ended = run_duet(
        *("serve", "--port=0", f"--model={tiny_pair.draft_gguf}"),
        *(f"--{name.replace('_', '-')}={path}" for name, path in files.items()),
        folder=tmp_path,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.decode().splitlines()
    assert "are not a certificate and its key" in line
    assert "duet-cloud certs" in line
