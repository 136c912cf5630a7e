"""Which streams draft: what the rule decides, and what an engine yields by it."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from cloud_service.draft_value import DraftValue, StreamRounds
from cloud_service.targets.resident_rounds import most_in_a_step


def busy(num_streams: int, drafted: int, made: float, *, before: Sequence[int] = (1, 16, 64)) -> DraftValue:
    """An engine whose passes take 11 ms and 30 us a token, give or take 5%, at its work for 3 s."""
    noise = np.random.default_rng(0)
    value = DraftValue()
    for streams, passes in (*((streams, 50) for streams in before), (num_streams, 200)):
        num_tokens = streams * (drafted + 1)
        for _ in range(passes):
            seconds = pass_s(num_tokens) * noise.normal(1.0, 0.05)
            value.observe(num_tokens, round(streams * made), seconds)
    return value


def pass_s(num_tokens: float) -> float:
    return 0.011 + 30e-6 * num_tokens


def rounds(drafted: int, made: float, waited_s: float, num: int = 100) -> StreamRounds:
    """Of a stream that makes so much on average."""
    stream = StreamRounds()
    for number in range(num):
        whole = int((number + 1) * made) - int(number * made)
        stream.add(drafted, whole, waited_s, number * waited_s)
    return stream


@pytest.mark.parametrize(
    ("num_streams", "drafted", "made", "pays"),
    [
        pytest.param(1, 8, 1.2, True, id="a stream alone gains by nearly every draft"),
        pytest.param(16, 8, 2.0, True, id="a few streams gain where half of the tokens are accepted"),
        pytest.param(128, 8, 2.0, False, id="many do not: the passes are too long for what comes of them"),
        pytest.param(128, 8, 5.1, True, id="many gain where most tokens are accepted"),
        pytest.param(128, 16, 3.3, False, id="but not by drafts of which most is rejected"),
        pytest.param(128, 0, 1.0, True, id="an empty draft costs nothing"),
    ],
)
def test_drafts_pay_while_they_gain_more_than_the_longer_passes_cost(
    num_streams: int, drafted: int, made: float, pays: bool
) -> None:
    value = busy(num_streams, drafted, made)
    waited_s = pass_s(num_streams * (drafted + 1))
    assert value.pays(rounds(drafted, made, waited_s)) == pays
    by_drafts = num_streams * made / waited_s
    alone = num_streams / pass_s(num_streams)
    assert (by_drafts >= 0.98 * alone) == pays, "as the whole engine's yield says"


def test_a_stream_that_waits_for_three_passes_must_make_more_than_three_tokens() -> None:
    value = busy(16, 8, 3.0)
    waited_s = pass_s(16 * 9)
    assert value.pays(rounds(8, 3.0, waited_s))
    assert not value.pays(rounds(8, 3.0, 3 * waited_s))
    assert value.pays(rounds(8, 6.0, 3 * waited_s))


def test_no_stream_moves_before_passes_of_different_lengths_were_seen() -> None:
    loser = rounds(8, 1.0, 0.1)
    assert DraftValue().pays(loser)
    assert busy(128, 8, 2.0, before=()).pays(loser)


def test_no_stream_moves_before_it_was_seen_for_a_second_and_some_rounds() -> None:
    value = busy(128, 8, 2.0)
    assert not value.pays(rounds(8, 1.0, 0.05))
    assert value.pays(rounds(8, 1.0, 0.05, num=10))
    assert value.pays(rounds(8, 1.0, 2.0, num=5))


def test_a_stream_is_judged_by_the_load_of_the_last_second() -> None:
    value = busy(128, 8, 2.0)
    stream = rounds(8, 2.0, pass_s(9))
    assert not value.pays(stream)
    for _ in range(150):
        value.observe(9, 2, pass_s(9))
    assert value.pays(stream)


# An engine that schedules ahead, whose sessions all follow the rule. As measured with a 7B on one H200: a
# pass takes 4.6 ms and 20 us a token, two are in flight, and a verdict's next draft is there after 1 ms and
# 0.12 ms for each session that was answered with it.


@dataclass(eq=False)
class Stream:
    drafting: bool = True
    handed_s: float = 0.0
    rounds: StreamRounds = field(default_factory=StreamRounds)


def tokens_per_second(
    value: DraftValue, num_streams: int, num_drafted: int, acceptance: float, *, by_rule: bool, seconds: float
) -> float:
    """Of streams that all draft at first; those of the first second, in which nothing is known, left out."""
    chance = random.Random(num_streams)
    streams = [Stream() for _ in range(num_streams)]
    ready = deque(streams)
    coming: list[tuple[float, int]] = []
    flying: deque[tuple[float, list[Stream], int]] = deque()
    now = gpu_free = began = 0.0
    made_since = 0
    while now < seconds:
        while coming and coming[0][0] <= now:
            ready.append(streams[heapq.heappop(coming)[1]])
        plain = sum(not stream.drafting for stream in streams)
        if len(flying) < 2:
            most = min(len(ready), most_in_a_step(num_streams - plain, 3))
            if most or plain:
                verified = [ready.popleft() for _ in range(most)]
                now += 1e-3
                num_tokens = most * (num_drafted + 1) + plain
                gpu_free = max(gpu_free, now + 0.5e-3)
                gpu_free += (4.6e-3 + 20e-6 * num_tokens) * chance.gauss(1.0, 0.03)
                flying.append((gpu_free, verified, plain))
                continue
        if not flying:
            now = began = coming[0][0]
            continue
        end, verified, plain = flying.popleft()
        now = max(now, end) + 0.3e-3
        made = []
        for _ in verified:
            accepted = 0
            while accepted < num_drafted and chance.random() < acceptance:
                accepted += 1
            made.append(accepted + 1)
        value.observe(len(verified) * (num_drafted + 1) + plain, sum(made) + plain, now - began)
        began = now
        made_since += sum(made) + plain if now > 1.5 else 0
        back = now + 1e-3
        for stream, num_made in zip(verified, made, strict=True):
            stream.rounds.add(num_drafted, num_made, now - stream.handed_s, now)
            stream.drafting = not by_rule or value.pays(stream.rounds)
            if stream.drafting:
                back += 0.12e-3
                stream.handed_s = back
                heapq.heappush(coming, (back, streams.index(stream)))
    return made_since / (seconds - 1.5)


@pytest.mark.parametrize("num_streams", [1, 16, 64, 128])
@pytest.mark.parametrize(("num_drafted", "acceptance"), [(8, 0.85), (8, 0.7), (8, 0.5), (4, 0.7), (16, 0.85)])
def test_streams_that_follow_the_rule_yield_what_the_better_of_both_does(
    num_streams: int, num_drafted: int, acceptance: float
) -> None:
    value = DraftValue()
    for before in (1, 16, 64):
        tokens_per_second(value, before, 8, 0.85, by_rule=False, seconds=0.5)
    by_rule = tokens_per_second(value, num_streams, num_drafted, acceptance, by_rule=True, seconds=5.0)
    drafting = tokens_per_second(
        DraftValue(), num_streams, num_drafted, acceptance, by_rule=False, seconds=5.0
    )
    plain = num_streams / (4.6e-3 + 20e-6 * num_streams)
    assert by_rule > 0.98 * max(drafting, plain)
