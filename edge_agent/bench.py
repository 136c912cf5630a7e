"""`duet bench`: what this machine, this link and this cloud can do, and what follows from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter, SpeculateStream
from shared.errors import CloudUnavailable
from shared.messages import Finished, Message, Open
from shared.sampling import Sampling
from shared.session import EdgeSession, EdgeState
from shared.speed import break_even_rtt, expected_acceptance_length, stop_and_wait_tokens_per_s

PROMPT = (
    "List the planets of the solar system from the sun outwards, and for each one write a sentence about"
    " its size, its colour and its moons."
)
DRAFT_LENGTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class DraftSpeed:
    prefill_tokens_per_s: float
    draft_tokens_per_s: float

    @property
    def t_draft(self) -> float:
        return 1.0 / self.draft_tokens_per_s


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    rtt_s: float
    """Of a whole round beside the target's own time: network, gRPC and both ends' code."""
    t_step_s: float
    """The target's time for one token."""
    t_verify_s: dict[int, float]
    """Draft length -> the target's time for one pass over it and the token after it."""


@dataclass(frozen=True, slots=True)
class Forecast:
    num_draft_tokens: int
    acceptance_length: float
    tokens_per_s: float
    stream_tokens_per_s: float
    break_even_rtt_s: float

    @property
    def speed_up(self) -> float:
        return self.tokens_per_s / self.stream_tokens_per_s


@dataclass(frozen=True, slots=True)
class BenchReport:
    draft: DraftSpeed
    link: LinkSpeed | None
    """None where only this machine was measured."""
    acceptance_rate: float
    """Assumed by the forecast."""
    forecast: list[Forecast]


async def run_bench(edge: EdgeModel, cloud: Cloud | None, acceptance_rate: float) -> BenchReport:
    """Measure the edge model and, where there is a cloud, the link and its target."""
    draft = await measure_drafting(edge)
    link = await measure_link(cloud) if cloud else None
    return BenchReport(draft, link, acceptance_rate, forecast(draft, link, acceptance_rate) if link else [])


async def measure_drafting(edge: EdgeModel, num_tokens: int = 32, repeats: int = 3) -> DraftSpeed:
    """Median speed of reading a prompt and of drafting after it."""
    prompt = edge.model.render_chat([Message("user", PROMPT)])
    drafter = LlamaDrafter(edge)
    prefill, draft = [], []
    for _ in range(repeats):
        await edge.run(lambda: edge.context.align(0, []))
        first, first_s = await _timed_draft(drafter, prompt, 1)
        drafted, seconds = await _timed_draft(drafter, [*prompt, *first], num_tokens)
        prefill.append(len(prompt) / first_s)
        draft.append(len(drafted) / seconds)
    return DraftSpeed(statistics.median(prefill), statistics.median(draft))


async def _timed_draft(
    drafter: LlamaDrafter, text: Sequence[int], num_tokens: int
) -> tuple[list[int], float]:
    began = time.perf_counter()
    drafted = await drafter.propose(
        text, num_tokens, sampling=Sampling(), seed=0, start=0, end_token_ids=frozenset()
    )
    return [proposal.token_id for proposal in drafted], time.perf_counter() - began


async def measure_link(
    cloud: Cloud, draft_lengths: Sequence[int] = DRAFT_LENGTHS, repeats: int = 5
) -> LinkSpeed:
    """Median round trip, target step, and verification time for each draft length.

    The drafts repeat one token and are mostly rejected: what a pass costs does not depend on what is in it.
    Where the target ends its answer, the measurement goes on in a new stream.

    Raises:
        CloudError: the cloud does not answer, or ends every answer at once.
    """
    request = Open(prompt=(Message("user", PROMPT),), sampling=Sampling(), seed=0, max_tokens=512)
    seen = _Seen({length: [] for length in draft_lengths})
    while seen.wanted(repeats) is not None:
        before = seen.num_rounds
        async with cloud.speculate(request, Meter()) as stream:
            await _measure_stream(stream, seen, repeats)
        if seen.num_rounds == before:
            raise CloudUnavailable("the target ends its answer at once, so nothing can be measured of it")
    return LinkSpeed(
        statistics.median(seen.rtts),
        statistics.median(seen.steps),
        {length: statistics.median(times) for length, times in seen.verify.items() if times},
    )


@dataclass
class _Seen:
    """What was measured of the link so far, s."""

    verify: dict[int, list[float]]
    """Draft length -> times of passes."""
    rtts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def num_rounds(self) -> int:
        return len(self.rtts)

    def wanted(self, repeats: int) -> int | None:
        """The next length to measure; None where all were seen so often."""
        return next((length for length, times in self.verify.items() if len(times) < repeats), None)

    def limit(self, max_draft_tokens: int) -> None:
        """The cloud takes no longer drafts."""
        self.verify = {length: times for length, times in self.verify.items() if length <= max_draft_tokens}


async def _measure_stream(stream: SpeculateStream, seen: _Seen, repeats: int) -> None:
    """Measure until nothing is wanted any more, or the target ends its answer."""
    session = EdgeSession()
    session.send_open()
    session.receive_opened(stream.opened)
    seen.limit(stream.opened.max_draft_tokens)

    async def round_of(draft: Sequence[int]) -> tuple[float, float]:
        """Round trip without the target's time, and that; s."""
        began = time.perf_counter()
        await stream.send(session.send_draft(draft, more=False))
        verdict = await stream.receive()
        seconds = time.perf_counter() - began
        if isinstance(verdict, Finished):
            raise CloudUnavailable("the cloud ended the stream while it was measured; ask again")
        session.receive_verdict(verdict)
        return (
            seconds - (verdict.timings.queue_us + verdict.timings.verify_us) / 1e6,
            verdict.timings.verify_us / 1e6,
        )

    await round_of([])  # reads the prompt
    while (length := seen.wanted(repeats)) is not None:
        for draft_length, times in ((0, seen.steps), (length, seen.verify[length])):
            if session.state is not EdgeState.DRAFTING:
                return
            rtt, seconds = await round_of([session.committed[-1]] * draft_length)
            seen.rtts.append(rtt)
            times.append(seconds)


def forecast(draft: DraftSpeed, link: LinkSpeed, acceptance_rate: float) -> list[Forecast]:
    """What stop-and-wait speculation would give at each draft length, beside the cloud's own stream."""
    return [
        Forecast(
            num_draft_tokens=length,
            acceptance_length=expected_acceptance_length(acceptance_rate, length),
            tokens_per_s=stop_and_wait_tokens_per_s(
                acceptance_rate, length, draft.t_draft, t_verify, link.rtt_s
            ),
            stream_tokens_per_s=1.0 / link.t_step_s,
            break_even_rtt_s=break_even_rtt(acceptance_rate, length, draft.t_draft, t_verify, link.t_step_s),
        )
        for length, t_verify in link.t_verify_s.items()
    ]
