"""Tokens and tenants: what is kept, who is let in, and how long the answer takes."""

from __future__ import annotations

import hmac
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from cloud_service import security
from cloud_service.security import Gatekeeper, new_token
from cloud_service.tenants import opened
from shared.errors import AccessDenied, InvalidSetting
from shared.limits import Limits

NOW_S = 1_000_000.0
HOUR_S = 3600.0


class House:
    """A file of tokens, and the gatekeeper who reads it at a time of the test's choice."""

    def __init__(self, folder: Path, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.file = folder / "tokens.db"
        self.now_s = NOW_S
        with opened(self.file):
            pass
        self.gatekeeper = Gatekeeper(limits, self.file, clock=lambda: self.now_s)

    def add(self, tenant: str, *, limits: Limits = Limits(), expires_s: float | None = None) -> str:  # noqa: B008
        text, token = new_token(tenant, limits=limits, now_s=self.now_s, expires_s=expires_s)
        with opened(self.file) as store:
            store.add_token(token)
        return text

    def caller(self, token: str) -> security.Caller:
        return self.gatekeeper.identify([("authorization", f"Bearer {token}")], {})


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def changed(token: str, position: int) -> str:
    """A token of the same form that differs in one character."""
    other = "a" if token[position] != "a" else "b"
    return token[:position] + other + token[position + 1 or len(token) :]


def test_a_token_opens_the_door_to_its_tenant(house: House) -> None:
    assert house.caller(house.add("alice")).tenant == "alice"
    assert house.caller(house.add("bob")).tenant == "bob"


def test_the_file_holds_no_token_and_only_its_owner_reads_it(house: House) -> None:
    token = house.add("alice")
    secret = token.rpartition("_")[2]
    assert secret.encode() not in house.file.read_bytes()
    assert house.file.stat().st_mode & 0o077 == 0


def test_a_token_has_256_random_bits(house: House) -> None:
    import base64

    secrets_ = {house.add("alice")[len("duet_") + 13 :] for _ in range(50)}
    assert len(secrets_) == 50
    assert {len(base64.urlsafe_b64decode(secret + "=")) for secret in secrets_} == {32}


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param([], id="no token"),
        pytest.param([("authorization", "Bearer ")], id="an empty one"),
        pytest.param([("authorization", "Bearer duet_0123456789ab_" + "x" * 43)], id="one that nobody made"),
        pytest.param([("authorization", "Basic YWxpY2U6c2VjcmV0")], id="another scheme"),
        pytest.param([("authorization", "Bearer " + "x" * 100_000)], id="a hundred thousand letters"),
        pytest.param([("authorization", "Bearer duet_\x00_")], id="bytes of nobody's"),
    ],
)
def test_nobody_else_is_let_in(house: House, metadata: list[tuple[str, str]]) -> None:
    house.add("alice")
    with pytest.raises(AccessDenied):
        house.gatekeeper.identify(metadata, {})


def test_what_is_said_of_a_bad_token_does_not_tell_what_is_wrong_with_it(house: House) -> None:
    token = house.add("alice", expires_s=NOW_S + HOUR_S)
    said = set()
    for bad in (changed(token, -1), changed(token, 6), "nonsense"):
        with pytest.raises(AccessDenied) as caught:
            house.caller(bad)
        said.add(str(caught.value))
    house.now_s += HOUR_S
    with pytest.raises(AccessDenied) as caught:
        house.caller(token)
    assert said == {str(caught.value)}
    assert "alice" not in said.pop()


def test_a_token_ends_at_its_time(house: House) -> None:
    token = house.add("alice", expires_s=NOW_S + HOUR_S)
    house.now_s = NOW_S + HOUR_S - 0.001
    assert house.caller(token).tenant == "alice"
    house.now_s = NOW_S + HOUR_S
    with pytest.raises(AccessDenied):
        house.caller(token)


def test_a_revoked_token_is_refused_from_the_next_call_on(house: House) -> None:
    token, other = house.add("alice"), house.add("alice")
    assert house.caller(token).tenant == "alice"
    with opened(house.file) as store:
        store.remove_token(token.split("_")[1])
    with pytest.raises(AccessDenied):
        house.caller(token)
    assert house.caller(other).tenant == "alice"


def test_rotation_lets_both_count_for_a_while(house: House) -> None:
    old = house.add("alice", expires_s=NOW_S + 100 * HOUR_S)
    new = house.add("alice")
    with opened(house.file) as store:
        store.expire_token(old.split("_")[1], NOW_S + HOUR_S)
    assert house.caller(old).tenant == house.caller(new).tenant == "alice"
    house.now_s = NOW_S + HOUR_S
    with pytest.raises(AccessDenied):
        house.caller(old)
    assert house.caller(new).tenant == "alice"


def test_a_rotation_lengthens_no_life(house: House) -> None:
    old = house.add("alice", expires_s=NOW_S + HOUR_S)
    with opened(house.file) as store:
        store.expire_token(old.split("_")[1], NOW_S + 9 * HOUR_S)
        assert store.token(old.split("_")[1]).expires_s == NOW_S + HOUR_S


def test_limits_of_service_tenant_and_token(tmp_path: Path) -> None:
    house = House(tmp_path, Limits(streams=4, context_tokens=512))
    token = house.add("alice", limits=Limits(streams=2, max_draft_tokens=3))
    with opened(house.file) as store:
        store.set_limits("alice", Limits(streams=9))
    caller = house.caller(token)
    assert (caller.limits.streams, caller.limits.context_tokens, caller.limits.max_draft_tokens) == (
        2,
        512,
        3,
    )
    assert [(a.name.split()[0], a.limits.streams) for a in caller.accounts] == [("alice", 9), ("token", 2)]


def test_a_file_that_somebody_is_spoiling_leaves_what_was_read_last_in_force(house: House) -> None:
    token = house.add("alice")
    assert house.caller(token).tenant == "alice"
    house.file.write_bytes(b"no database at all" * 100)
    assert house.caller(token).tenant == "alice"


def test_a_file_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="duet-cloud tokens add"):
        Gatekeeper(Limits(), tmp_path / "nowhere.db")


def test_without_tokens_a_client_certificate_names_the_tenant() -> None:
    gatekeeper = Gatekeeper(Limits())
    assert gatekeeper.identify([], {"x509_common_name": [b"alice"]}).tenant == "alice"
    assert gatekeeper.identify([], {}).tenant is None


# Timing


@pytest.mark.parametrize("kind", ["right", "wrong", "unknown", "expired"])
def test_every_token_costs_one_hash_and_one_comparison_of_all_its_bytes(
    house: House, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    right = house.add("alice")
    expired = house.add("bob", expires_s=NOW_S - 1)
    tokens = {"right": right, "wrong": changed(right, -1), "unknown": changed(right, 6), "expired": expired}
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    with suppress(AccessDenied):
        house.caller(tokens[kind])
    assert compared == [(32, 32)]


def test_the_time_of_a_check_does_not_tell_how_wrong_a_token_is(house: House) -> None:
    right = house.add("alice")
    for _ in range(200):
        house.add("bob")
    kinds = {
        "first character wrong": changed(right, len("duet_") + 13),
        "last character wrong": changed(right, -1),
        "unknown id": changed(right, 6),
    }
    times: dict[str, list[int]] = {kind: [] for kind in kinds}
    for _ in range(4000):  # in turns, so that whatever else the machine does falls on all
        for kind, token in kinds.items():
            metadata = [("authorization", f"Bearer {token}")]
            began = time.perf_counter_ns()
            try:
                house.gatekeeper.token(metadata)
            except AccessDenied:
                times[kind].append(time.perf_counter_ns() - began)
    medians = {kind: median(values) for kind, values in times.items()}
    print({kind: f"{value / 1e3:.2f} us" for kind, value in medians.items()})
    assert max(medians.values()) / min(medians.values()) < 1.15
