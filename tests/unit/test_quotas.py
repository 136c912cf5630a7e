"""Streams and tokens a minute, counted in memory and in a file that replicas share."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cloud_service.quotas import Account, Quotas, UsageFile
from shared.errors import InvalidSetting, QuotaExceeded
from shared.limits import Limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 6_000_000.0  # the beginning of a minute

    def __call__(self) -> float:
        return self.now_s


def account(name: str = "alice", **limits: int) -> tuple[Account, ...]:
    return (Account(name, Limits.model_validate(limits)),)


def test_a_tenant_runs_so_many_streams_and_no_more() -> None:
    quotas = Quotas()
    with quotas.stream(account(streams=2)), quotas.stream(account(streams=2)):
        with (
            pytest.raises(QuotaExceeded, match="runs 2 streams") as caught,
            quotas.stream(account(streams=2)),
        ):
            raise AssertionError("a third stream")
        assert caught.value.retry_after_s
        with quotas.stream(account("bob", streams=1)):
            pass
    assert quotas.num_streams("alice") == quotas.num_streams("bob") == 0


def test_a_token_has_a_number_of_its_own_within_its_tenants() -> None:
    quotas = Quotas()
    tenant = account(streams=3)
    first, second = tenant + account("token 1", streams=1), tenant + account("token 2")
    with quotas.stream(first):
        with pytest.raises(QuotaExceeded, match="token 1"), quotas.stream(first):
            raise AssertionError("a second stream of the first token")
        assert quotas.num_streams("alice") == 1, "what was refused is not counted"
        with quotas.stream(second):
            pass


def test_a_stream_that_fails_is_counted_no_longer() -> None:
    quotas = Quotas()
    with pytest.raises(RuntimeError), quotas.stream(account(streams=1)):
        raise RuntimeError
    assert quotas.num_streams("alice") == 0


def test_who_has_used_the_minutes_tokens_comes_back_when_told() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    mine = account(tokens_per_minute=100)
    clock.now_s += 30
    quotas.spend(mine, 99)
    quotas.check(mine)
    quotas.spend(mine, 51)
    with pytest.raises(QuotaExceeded, match="100 tokens a minute") as caught:
        quotas.check(mine)
    assert caught.value.retry_after_s == pytest.approx(30 + 20)
    clock.now_s += caught.value.retry_after_s - 1
    with pytest.raises(QuotaExceeded):
        quotas.check(mine)
    clock.now_s += 1.01
    quotas.check(mine)


def test_what_others_use_does_not_count() -> None:
    quotas = Quotas(clock=Clock())
    quotas.spend(account("bob", tokens_per_minute=10), 1000)
    quotas.check(account("alice", tokens_per_minute=10))


def test_nothing_is_counted_where_nothing_is_limited() -> None:
    quotas = Quotas(clock=Clock())
    quotas.spend(account(), 10**9)
    quotas.check(account(tokens_per_minute=1))


def test_replicas_on_one_file_count_together(tmp_path: Path) -> None:
    clock, mine = Clock(), account(tokens_per_minute=100)
    one, two = (Quotas(UsageFile(tmp_path / "usage.db"), clock) for _ in range(2))
    one.spend(mine, 60)
    two.spend(mine, 60)
    one.save()
    two.save()
    with pytest.raises(QuotaExceeded):
        two.check(mine)
    one.check(mine)
    one.save()
    with pytest.raises(QuotaExceeded):
        one.check(mine)


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    clock, mine = Clock(), account(tokens_per_minute=100)
    before = Quotas(UsageFile(tmp_path / "usage.db"), clock)
    before.spend(mine, 100)
    before.save()
    after = Quotas(UsageFile(tmp_path / "usage.db"), clock)
    after.save()
    with pytest.raises(QuotaExceeded):
        after.check(mine)


def test_counts_of_old_minutes_are_given_up(tmp_path: Path) -> None:
    clock, mine = Clock(), account(tokens_per_minute=10**9)
    quotas = Quotas(UsageFile(tmp_path / "usage.db"), clock)
    for _ in range(300):
        quotas.spend(mine, 1)
        quotas.save()
        clock.now_s += 60
    assert len(quotas._spent) <= 2
    with sqlite3.connect(tmp_path / "usage.db") as database:
        assert database.execute("SELECT count(*) FROM usage").fetchone()[0] <= 61


def test_usage_that_cannot_be_saved_now_is_saved_later(tmp_path: Path) -> None:
    clock, mine = Clock(), account(tokens_per_minute=100)
    quotas = Quotas(UsageFile(tmp_path / "usage.db"), clock)
    busy = sqlite3.connect(tmp_path / "usage.db", isolation_level=None)
    busy.execute("BEGIN IMMEDIATE")
    quotas.spend(mine, 100)
    quotas.save()
    with pytest.raises(QuotaExceeded):
        quotas.check(mine)
    busy.execute("ROLLBACK")
    quotas.save()
    after = Quotas(UsageFile(tmp_path / "usage.db"), clock)
    after.save()
    with pytest.raises(QuotaExceeded):
        after.check(mine)
    busy.close()


def test_a_file_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "usage.db").write_text("no database" * 100)
    with pytest.raises(InvalidSetting, match=r"usage\.db"):
        UsageFile(tmp_path / "usage.db")
