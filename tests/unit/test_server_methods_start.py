"""Which engines `benchmarks.server_methods` measures: plain decoding always, others that are up in time."""

from __future__ import annotations

import time
from multiprocessing import Pipe

import pytest

from benchmarks.server_methods import MEASURING_S, Served, engines


class Scripted(Served):
    """No process: an engine that is up, that has ended, or that goes on starting."""

    def __init__(self, method: str, state: str = "up") -> None:
        self.method = method
        self.is_closed = False
        self.connection, self._there = Pipe()
        if state == "up":
            self._there.send(None)
        if state == "ended":
            self._there.close()

    def close(self) -> None:
        self.is_closed = True


def now() -> float:
    """An end by which only those are up that are so already."""
    return time.perf_counter() + MEASURING_S


def test_others_start_once_plain_decoding_is_up() -> None:
    made: list[Scripted] = []

    def start(method: str) -> Scripted:
        if made:
            assert not made[0].connection.poll()  # what it says when it is up was read
        made.append(Scripted(method))
        return made[-1]

    with engines(["n-grams", "medusa"], start, now()) as up:
        assert [each.method for each in up] == ["none", "n-grams", "medusa"]
        assert not any(each.is_closed for each in made)
    assert all(each.is_closed for each in made)


def test_an_engine_that_is_not_up_is_left_out_and_the_reason_said(capsys: pytest.CaptureFixture[str]) -> None:
    states = {"none": "up", "n-grams": "ended", "draft-model": "starting", "medusa": "up"}
    made = {method: Scripted(method, state) for method, state in states.items()}
    with engines(list(states)[1:], made.__getitem__, now()) as up:
        assert [each.method for each in up] == ["none", "medusa"]
    assert all(each.is_closed for each in made.values())
    said = capsys.readouterr().out
    assert "n-grams is left out: it ended while it started" in said
    assert "draft-model is left out: still starting after 0 s, and the last 60 s of --budget" in said


@pytest.mark.parametrize("state", ["ended", "starting"])
def test_without_plain_decoding_nothing_is_started(state: str) -> None:
    made: list[Scripted] = []

    def start(method: str) -> Scripted:
        made.append(Scripted(method, state))
        return made[-1]

    with (
        pytest.raises(SystemExit, match="plain decoding did not start"),
        engines(["medusa"], start, now()),
    ):
        pass
    assert [each.method for each in made] == ["none"]
    assert made[0].is_closed
