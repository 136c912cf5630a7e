"""Edges that draft what the target will say, again and again: the load that a service is measured under."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from edge_agent.remote import Cloud, Meter
from shared.messages import Finished, Open
from shared.session import EdgeSession, EdgeState

_WARM_UP_S = 1.0


@dataclass
class Seen:
    """What all edges together got in a window of time."""

    seconds: float
    num_tokens: int = 0
    rounds_s: list[float] = field(default_factory=list)
    """From each draft's sending to its verdict."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def rounds_per_s(self) -> float:
        return len(self.rounds_s) / self.seconds


async def draft_rounds(
    cloud: Cloud,
    requests: Sequence[Open],
    texts: Sequence[Sequence[int]],
    *,
    num_draft_tokens: int,
    think_s: float,
    seconds: float,
) -> Seen:
    """One edge a request sends drafts, one after the other, from its beginning again when the text ends.

    Args:
        texts: what the target answers to each request.
        think_s: mean time from a verdict to the next draft; each is evenly from half to one and a half of it.
        seconds: of the window, which begins a second after the edges.
    """
    seen = Seen(seconds)
    begin = time.monotonic() + _WARM_UP_S
    end = begin + seconds

    rng = random.Random(0)

    async def edge(request: Open, text: Sequence[int]) -> None:
        while time.monotonic() < end:
            async with cloud.speculate(request, Meter()) as stream:
                session = EdgeSession()
                session.send_open()
                session.receive_opened(stream.opened)
                while time.monotonic() < end:
                    at = len(session.committed)
                    draft = list(text[at : at + num_draft_tokens])
                    if at + num_draft_tokens + 1 >= len(text):
                        break
                    if think_s:
                        await asyncio.sleep(think_s * rng.uniform(0.5, 1.5))
                    sent = time.monotonic()
                    await stream.send(session.send_draft(draft, more=False))
                    verdict = await stream.receive()
                    if isinstance(verdict, Finished):
                        break
                    session.receive_verdict(verdict)
                    # By its end: what is under way at the window's beginning stands for what is at its end.
                    if begin <= (now := time.monotonic()) <= end:
                        seen.rounds_s.append(now - sent)
                        seen.num_tokens += len(session.committed) - at

    await asyncio.gather(*(edge(*each) for each in zip(requests, texts, strict=True)))
    return seen


async def scripted_rounds(
    cloud: Cloud, request: Open, num_draft_tokens: int
) -> AsyncGenerator[tuple[float, int], None]:
    """Rounds with a scripted target, stop and wait, of which every fifth token is drafted wrong.

    Yields:
        Of each round: seconds from draft sent to verdict committed, and tokens committed.
    """
    async with cloud.speculate(request, Meter()) as stream:
        session = EdgeSession()
        session.send_open()
        session.receive_opened(stream.opened)
        while True:
            num_before = len(session.committed)
            at = len(stream.opened.prompt_token_ids) + num_before
            draft = [1 + (at + i) % 250 + (((at + i) % 5) == 0) for i in range(num_draft_tokens)]
            began = time.perf_counter()
            await stream.send(session.send_draft(draft, more=False))
            verdict = await stream.receive()
            assert not isinstance(verdict, Finished)
            session.receive_verdict(verdict)
            seconds = time.perf_counter() - began
            assert session.state is EdgeState.DRAFTING
            yield seconds, len(session.committed) - num_before
