"""Six cells of the sweep for real: gRPC, sessions, controller and link proxy, beside the virtual clock.

What the models would say is recorded, and drafting and passes take their time by waiting, so that other work
on the machine disturbs little. Everything else is the code that runs: the edge's streams and controller, the
wire, the proxy, the service.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from benchmarks.harness import save
from benchmarks.link import fixed, h100_pass
from benchmarks.link_proxy import LinkProxy, Phase, Schedule
from benchmarks.recorded import VOCABULARY_SIZE, Answer, load, propose, target_id
from benchmarks.virtual_link import Outcome, World, pace_of, run_auto, run_fixed
from cloud_service.targets.base import GenerateOptions, Scores
from edge_agent import modes
from edge_agent.drafting.combined import CombinedDrafter
from edge_agent.drafting.drafters import Drafters, StreamDrafter
from edge_agent.fastest import fastest
from edge_agent.pacing import Pacing
from edge_agent.remote import Cloud, Meter
from edge_agent.speculation import speculate
from edge_agent.speeds import Speeds
from edge_agent.steps import Step
from shared.config import CloudConfig, EdgeConfig
from shared.controller import Plan, SpeedController, Way
from shared.drafts import Proposal
from shared.events import Token
from shared.logs import configure_logging
from shared.messages import Open, Opened, Timings
from shared.sampling import Sampling
from shared.stopping import StopRule
from tests.scripted_target import ScriptedSequence, ScriptedTarget
from tests.service import serving

CELLS = ((1, 14), (1, 50), (5, 14), (5, 50), (30, 50), (30, 200))
"""Target step in draft steps, round trip in ms."""
WAITING = {1: 4, 5: 8, 30: 12}
GOING_ON = {1: (2, 12), 5: (3, 18), 30: (6, 48)}
"""Draft lengths, and windows, near the best of the sweep."""
PROMPT = (7,)
WARM_UP_TOKENS = 48


class Waits:
    """Waits that follow each other without a gap begin where the one before was due, not where it ended:
    being woken late does not add up.
    """

    def __init__(self) -> None:
        self._due = 0.0

    async def wait(self, seconds: float) -> None:
        now = time.monotonic()
        begins = self._due if 0.0 <= now - self._due < seconds / 4 else now
        self._due = begins + seconds
        await asyncio.sleep(max(0.0, self._due - time.monotonic()))


class SlowTarget(ScriptedTarget):
    """Takes its time for each pass."""

    def __init__(self, t_step: float, verify: Callable[[int], float]) -> None:
        super().__init__(lambda text: target_id(len(text) - len(PROMPT)), vocabulary_size=VOCABULARY_SIZE)
        self.t_step, self.verify = t_step, verify
        _ = (
            self.vocabulary.sha256,
            self.vocabulary.legal_ids,
        )  # takes a second, which no stream should wait for

    @asynccontextmanager
    async def sequence(self, token_ids: Sequence[int], **asked: Any) -> AsyncIterator[SlowSequence]:
        async with super().sequence(token_ids, **asked):
            yield SlowSequence(self)


class SlowSequence(ScriptedSequence):
    def __init__(self, target: SlowTarget) -> None:
        super().__init__(target, target._next_token, 1.0)
        self._slow, self._waits = target, Waits()

    async def score(self, token_ids: Sequence[int], *, num_rows: int, **asked: Any) -> Scores:
        seconds = self._slow.verify(num_rows - 1)
        await self._waits.wait(seconds)
        scores = await super().score(token_ids, num_rows=num_rows, **asked)
        return Scores(scores.rows, Timings(0, round(1e6 * seconds)), scores.logprobs)

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        async for made in super().generate(token_ids, options):
            await self._waits.wait(self._slow.t_step)
            yield made


class RecordedDrafter:
    """Proposes what was recorded, after the time that it takes."""

    def __init__(self, answer: Answer, t_draft: float) -> None:
        self._answer, self._t_draft, self._waits = answer, t_draft, Waits()

    async def propose(
        self, text_ids: Sequence[int], num_tokens: int, *, stop: StopRule, **_: object
    ) -> list[Proposal]:
        proposals = propose(self._answer, text_ids[len(PROMPT) :], num_tokens, stop)
        await self._waits.wait(self._t_draft * max(len(proposals), 1))
        return proposals


class RecordedDrafters(Drafters):
    """The drafter of one answer."""

    must_keep_pace = False

    def __init__(self, answer: Answer, t_draft: float) -> None:
        super().__init__(None)
        self._drafter = RecordedDrafter(answer, t_draft)

    async def for_stream(self, remote: Cloud, request: Open, opened: Opened) -> StreamDrafter:
        return StreamDrafter(
            CombinedDrafter((), self._drafter), lambda _: b"w", frozenset(), translated=False
        )

    def share_vocabulary(self, opened: Opened) -> bool:
        return True


async def timed(steps: AsyncGenerator[Step, None], answer: Answer) -> Outcome:
    began = ended = time.monotonic()
    tokens = []
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, Token):
                tokens.append(step.id)
                ended = time.monotonic()
    assert tokens == [target_id(i) for i in range(len(answer))], "not the target's own text"
    return Outcome(num_tokens=len(answer), seconds=ended - began, num_answers=1)


def request(answer: Answer) -> Open:
    return Open(prompt=PROMPT, sampling=Sampling(), seed=0, max_tokens=len(answer))


async def live(address: str, world: World, answers: Sequence[Answer], plan: Plan | None) -> Outcome:
    """All answers one after the other by a plan, or as the controller says once it has warmed up."""
    total = Outcome()
    speeds, config = Speeds(), EdgeConfig()
    async with Cloud(address, connect_timeout_s=20.0, silence_timeout_s=60.0) as cloud:
        await cloud.check()

        def steps(answer: Answer) -> AsyncGenerator[Step, None]:
            drafters, opening = RecordedDrafters(answer, world.t_draft), request(answer)
            if plan is None:
                return fastest(drafters, cloud, opening, config, speeds, Meter(), may_stream=True)
            if plan.way is Way.CLOUD:
                return modes.cloud(cloud, opening, Meter())
            return speculate(drafters, cloud, opening, Pacing(pace_of(plan)), Meter())

        await timed(steps(warm_up(answers)), warm_up(answers))
        for answer in answers:
            total.add(await timed(steps(answer), answer))
    return total


def warm_up(answers: Sequence[Answer]) -> Answer:
    return list(answers[0])[:WARM_UP_TOKENS]


def virtual(world: World, answers: Sequence[Answer], plan: Plan | None) -> Outcome:
    total = Outcome()
    controller = SpeedController()
    if plan is None:
        run_auto(world, warm_up(answers), controller)
    for answer in answers:
        total.add(run_auto(world, answer, controller) if plan is None else run_fixed(world, answer, plan))
    return total


async def measure(step: int, rtt_ms: int, t_draft: float, answers: Sequence[Answer]) -> list[list[str]]:
    """A row for each way of a cell; the ways run side by side, each with a service and a link of its own."""
    t_step = step * t_draft
    world = World(t_draft, t_step, 1e-3 * rtt_ms, lambda k: h100_pass(t_step, k))
    plans = {
        "cloud": fixed(Way.CLOUD, 0, 0),
        "stop and wait": fixed(Way.STOP_AND_WAIT, WAITING[step], WAITING[step]),
        "proactive": fixed(Way.PROACTIVE, *GOING_ON[step]),
        "auto": None,
    }
    link = Schedule(phases=(Phase(rtt_ms=rtt_ms),))

    async def one(plan: Plan | None, target: SlowTarget) -> Outcome:
        async with (
            serving(target, CloudConfig(max_draft_tokens=64)) as (address, _),
            LinkProxy(link, listen="127.0.0.1:0", to=address) as proxy,
        ):
            return await live(proxy.address, world, answers, plan)

    targets = [SlowTarget(t_step, world.verify) for _ in plans]
    found = await asyncio.gather(*map(one, plans.values(), targets))
    rows = []
    for (name, plan), outcome in zip(plans.items(), found, strict=True):
        simulated = virtual(world, answers, plan).tokens_per_s
        ratio = outcome.tokens_per_s / simulated
        rows.append(
            [str(step), str(rtt_ms), name, f"{simulated:.2f}", f"{outcome.tokens_per_s:.2f}", f"{ratio:.3f}"]
        )
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft-ms", type=float, default=30.0, help="a draft step at the edge")
    parser.add_argument("--answers", type=int, default=3)
    arguments = parser.parse_args()
    configure_logging("text", "warning")
    recorded = load()
    answers = recorded.answers[: arguments.answers]
    rows = []
    for step, rtt_ms in CELLS:
        rows += asyncio.run(measure(step, rtt_ms, 1e-3 * arguments.draft_ms, answers))
    off = max(abs(float(row[-1]) - 1.0) for row in rows)
    save(
        "link_live",
        command="python -m benchmarks.link_live"
        f" --draft-ms {arguments.draft_ms:g} --answers {arguments.answers}",
        title="Six cells of the sweep live through the link proxy, beside the virtual clock",
        notes=f"Real gRPC service, edge, controller and link proxy; {recorded.draft} and {recorded.target} as"
        f" recorded on the first {len(answers)} prompts ({sum(map(len, answers))} tokens), a draft step of"
        f" {arguments.draft_ms:g} ms, passes by the H100's curve, both by waiting. The virtual clock has the"
        f" same times. Each way after an answer of {WARM_UP_TOKENS} warm-up tokens. Drafts and windows:"
        f" {WAITING} and {GOING_ON} by target step. Aim: within 10%; the farthest is {off:.1%} off.",
        columns=["target step", "RTT, ms", "way", "virtual, tokens/s", "live, tokens/s", "live / virtual"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
