"""The speed controller over many answers in scripted worlds: real sessions on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recorded import Answer
from benchmarks.virtual_link import Outcome, World, run_auto, run_fixed
from shared.controller import PROBE_SHARE, Plan, SpeedController, Way
from shared.speed import MAX_RUN, Runs, proactive_rate
from tests.scripted_worlds import answers, warm, world

RECOVERS_WITHIN = 24
"""Rounds, or looks at the stream, after a sudden change."""


def total(outcomes: Sequence[Outcome]) -> Outcome:
    found = Outcome()
    for each in outcomes:
        found.add(each)
    return found


def best_fixed(where: World, texts: Sequence[Answer]) -> float:
    """Tokens per second of the best single way, found with hindsight."""
    plans = [Plan(Way.CLOUD, 0, 0, None, "")]
    for g in (1, 2, 4, 8, 12):
        plans.append(Plan(Way.STOP_AND_WAIT, g, g, None, ""))
    for g in (1, 3, 6):
        plans += [Plan(Way.PROACTIVE, g, g * n, None, "") for n in (2, 4, 10)]
    return max(total([run_fixed(where, text, plan) for text in texts]).tokens_per_s for plan in plans)


class Log:
    """What a controller chose, plan by plan, with the observations that it had by then."""

    def __init__(self, controller: SpeedController, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ways: list[tuple[int, Way]] = []
        self._seen = 0
        plan, count = controller.plan, controller._count

        def planned() -> Plan:
            found = plan()
            self.ways.append((self._seen, found.way))
            return found

        def counted(num_tokens: int, seconds: float) -> None:
            self._seen += 1
            count(num_tokens, seconds)

        monkeypatch.setattr(controller, "plan", planned)
        monkeypatch.setattr(controller, "_count", counted)

    @property
    def num_changes(self) -> int:
        return sum(a != b for (_, a), (_, b) in zip(self.ways, self.ways[1:], strict=False))

    def settled_at(self) -> int:
        """Observations until it did not go from drafts to the stream or back any more."""
        streams = self.ways[-1][1] is Way.CLOUD
        return next((seen for seen, way in reversed(self.ways) if (way is Way.CLOUD) != streams), 0)


# Never below the best single way. One run may be unlucky in the text that it learns from: runs are averaged.


def share_of_best(where: World, rate: float, *, runs: int) -> float:
    """Speed after one answer to warm up with, over that of the best single way on the same text: a mean."""
    texts = [answers(rate, seed=seed) for seed in range(runs)]
    best = best_fixed(where, [text for each in texts for text in each])
    speeds = []
    for seed, each in enumerate(texts):
        controller = warm(where, answers(rate, num=1, seed=100 + seed))
        speeds.append(total([run_auto(where, text, controller) for text in each]).tokens_per_s)
    return sum(speeds) / runs / best


@pytest.mark.parametrize(
    ("rtt_ms", "step", "rate"),
    [(0, 5, 0.9), (0, 5, 0.5), (50, 1, 0.8), (50, 5, 0.8), (100, 5, 0.9), (100, 30, 0.5)],
)
def test_after_one_answer_it_is_as_fast_as_the_best_single_way(rtt_ms, step, rate):
    assert share_of_best(world(step=step, rtt_ms=rtt_ms), rate, runs=8) >= 0.98


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    step=st.floats(0.5, 60),
    rtt_ms=st.floats(0, 400),
    extra_ms=st.floats(0, 20),
    token_ms=st.floats(0, 5),
    rate=st.floats(0, 1),
)
def test_whatever_the_world_it_is_as_fast_as_the_best_single_way(step, rtt_ms, extra_ms, token_ms, rate):
    where = world(step=step, rtt_ms=rtt_ms, extra_ms=extra_ms, token_ms=token_ms)
    assert share_of_best(where, rate, runs=4) >= 0.98


# Sudden changes, in the middle of what it thinks it knows.


@pytest.mark.parametrize(
    ("before", "after", "streams_before"),
    [
        pytest.param((world(rtt_ms=14), 0.85), (world(rtt_ms=140), 0.85), False, id="link 10x slower"),
        pytest.param((world(rtt_ms=14), 0.9), (world(rtt_ms=14), 0.1), False, id="drafts go wrong"),
        pytest.param((world(step=1), 0.8), (world(step=60), 0.8), True, id="target 60x slower"),
        pytest.param((world(step=30), 0.8), (world(step=1), 0.8), False, id="target 30x faster"),
    ],
)
def test_it_recovers_from_a_sudden_change_within_an_answer(before, after, streams_before, monkeypatch):
    controller = warm(before[0], answers(before[1], num=10))
    log = Log(controller, monkeypatch)
    run_auto(after[0], answers(after[1], num=1, length=1000)[0], controller)
    assert (log.ways[0][1] is Way.CLOUD) is streams_before
    assert (log.ways[-1][1] is Way.CLOUD) is not streams_before
    assert log.settled_at() <= RECOVERS_WITHIN


def test_a_link_that_gets_fast_is_noticed_while_the_cloud_streams():
    slow, fast = world(rtt_ms=140), world(rtt_ms=5)
    controller = warm(slow, answers(0.85, num=10))
    assert controller.plan().way is Way.CLOUD
    for text in answers(0.85, num=6):
        run_auto(fast, text, controller)
    assert controller.plan().way is Way.PROACTIVE


@pytest.mark.parametrize("step", [1, 5, 30])
def test_it_does_not_flap(step, monkeypatch):
    where = world(step=step)
    controller = warm(where, answers(0.8, num=3))
    log = Log(controller, monkeypatch)
    for text in answers(0.8, num=20):
        run_auto(where, text, controller)
    num_probes = 2 * PROBE_SHARE * 20 * 128 / 8  # there and back
    assert log.num_changes <= 2 + num_probes


def test_trying_other_ways_stays_within_its_share():
    where = world(step=5, rtt_ms=50)
    controller = warm(where, answers(0.8, num=30))
    assert controller._num_probed <= PROBE_SHARE * controller._num_tokens
    assert controller._probed_s <= 0.02 * controller._elapsed_s


# What is predicted, and what comes out.


@pytest.mark.parametrize(
    ("g", "window", "rtt_ms"),
    [
        *((2, 16, 0), (4, 32, 50), (4, 32, 200), (8, 64, 200)),
        pytest.param(3, 12, 14, id="a window that just fills: the edge waits for its last verdict"),
        pytest.param(2, 4, 14, id="a window that is always full"),
    ],
)
def test_the_prediction_of_proactive_speculation_holds_in_the_simulated_pipeline(g, window, rtt_ms):
    where = world(step=5, rtt_ms=rtt_ms)
    texts = answers(0.8, num=8, length=1_000)
    agreed = sum(each.agrees for text in texts for each in text) / sum(map(len, texts))
    runs = Runs.from_hazards([1.0 - agreed] * MAX_RUN)
    plan = Plan(Way.PROACTIVE, g, window, None, "")
    predicted = proactive_rate(runs, g, window, where.t_draft, where.verify, where.rtt)
    # A verdict meets a token half made on average; where times are constant it may always be a whole one.
    phase = 0.5 * where.t_draft / (g * where.t_draft + where.verify(g) + where.rtt)
    found = total([run_fixed(where, text, plan) for text in texts]).tokens_per_s
    assert found == pytest.approx(predicted, rel=0.02 + phase)


def test_every_way_gives_the_targets_own_text():
    where = world()
    for text in answers(0.7, num=5, length=60):
        for plan in (Plan(Way.STOP_AND_WAIT, 4, 4, None, ""), Plan(Way.PROACTIVE, 3, 12, None, "")):
            outcome = run_fixed(where, text, plan)  # asserts the text
            assert outcome.num_tokens == len(text)
