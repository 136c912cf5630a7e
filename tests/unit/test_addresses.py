"""What may be served to whom, and what may travel in plain text."""

from __future__ import annotations

from typing import Any

import pytest

from shared.addresses import check_exposure, is_loopback
from shared.config import CloudConfig, EdgeConfig, resolve
from shared.errors import InvalidSetting

TOKEN = "t" * 16
ELSEWHERE = "server.example:50151"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        pytest.param("127.0.0.1:1", True, id="the usual one"),
        pytest.param("127.8.9.1:1", True, id="the whole block"),
        pytest.param("[::1]:1", True, id="of IPv6"),
        pytest.param("LocalHost:1", True, id="by name"),
        pytest.param("0.0.0.0:1", False, id="every interface"),
        pytest.param("[::]:1", False, id="every interface of IPv6"),
        pytest.param("192.168.0.2:1", False, id="a home network"),
        pytest.param("127.0.0.1.example:1", False, id="a name that begins like it"),
        pytest.param("localhost.example:1", False, id="a name that begins like the name"),
    ],
)
def test_only_this_machine_is_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("listen", "facts", "missing"),
    [
        pytest.param("127.0.0.1:1", {}, None, id="this machine alone needs nothing"),
        pytest.param("0.0.0.0:1", {"encrypted": True, "authenticated": True}, None, id="both"),
        pytest.param("0.0.0.0:1", {"insecure": True}, None, id="asked for"),
        pytest.param("0.0.0.0:1", {"encrypted": True}, "asks nobody who they are", id="TLS alone"),
        pytest.param("0.0.0.0:1", {"authenticated": True}, "encrypts nothing", id="keys alone"),
        pytest.param("[::]:1", {}, "encrypts nothing and asks nobody", id="neither"),
    ],
)
def test_other_machines_are_served_with_tls_and_keys(
    listen: str, facts: dict[str, bool], missing: str | None
) -> None:
    closed = {"encrypted": False, "authenticated": False, "insecure": False}
    if missing is None:
        check_exposure(listen, **{**closed, **facts}, remedy="")
        return
    with pytest.raises(InvalidSetting, match=missing) as caught:
        check_exposure(listen, **{**closed, **facts}, remedy="set tls_cert")
    assert str(caught.value).startswith(listen)
    assert str(caught.value).endswith(": set tls_cert")


@pytest.mark.parametrize(
    ("settings", "encrypts"),
    [
        pytest.param({}, False, id="this machine: plain text"),
        pytest.param({"cloud": ELSEWHERE}, True, id="another machine: TLS"),
        pytest.param({"cloud": ELSEWHERE, "insecure": True}, False, id="plain text, asked for"),
        pytest.param({"tls_ca": "ca.pem"}, True, id="this machine, with an authority"),
        pytest.param({"cloud": ELSEWHERE, "insecure": True, "tls_ca": "ca.pem"}, True, id="stricter wins"),
    ],
)
def test_when_the_edge_encrypts(settings: dict[str, Any], encrypts: bool) -> None:
    assert EdgeConfig(**settings).encrypts is encrypts


def test_a_token_is_not_sent_to_another_machine_in_plain_text() -> None:
    with pytest.raises(InvalidSetting, match="plain text") as caught:
        resolve(EdgeConfig, {"flags": {"token": TOKEN, "cloud": ELSEWHERE, "insecure": True}})
    assert TOKEN not in str(caught.value)
    assert EdgeConfig(token=TOKEN, insecure=True).token is not None, "this machine may have it"


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_cert", "tls_client_key"])
def test_a_certificate_comes_with_its_key(name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"{name} is set, and needs"):
        resolve(EdgeConfig, {"flags": {name: "file.pem"}})


@pytest.mark.parametrize("name", ["token", "api_key"])
def test_a_secret_that_cannot_be_used_is_not_shown(name: str) -> None:
    with pytest.raises(InvalidSetting, match=name) as caught:
        resolve(EdgeConfig, {"environment": {name: "hunter2"}})
    assert "hunter2" not in str(caught.value)


def test_no_variable_of_the_environment_means_something_to_both_commands() -> None:
    edge = {f"DUET_{name}" for name in EdgeConfig.model_fields}
    assert not edge & {f"DUET_cloud_{name}" for name in CloudConfig.model_fields}
