"""The target's answer whatever the network does: a stream that breaks is opened again from what is committed.

Any replica can carry a stream on, for it needs nothing but the request and the committed tokens
(docs/protocol.md, "Resume"), and no token can be drawn differently the second time. Meanwhile the edge
waits, or writes on alone; what it wrote becomes the first draft of the stream that follows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from math import log

from opentelemetry.trace import SpanKind

from edge_agent import modes
from edge_agent.drafting.base import Proposal
from edge_agent.drafting.drafters import Drafters
from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from edge_agent.fastest import fastest
from edge_agent.observing import Observed
from edge_agent.remote import Cloud, Meter
from edge_agent.speculation import end_tasks
from edge_agent.speeds import Speeds
from edge_agent.steps import Drafted, Prompted, Resumed, Step
from shared import tracing
from shared.breaker import Backoff
from shared.config import EdgeConfig
from shared.errors import CloudError, CloudUnavailable
from shared.events import Notice, Token
from shared.messages import FinishReason, Open, Opened, Policy
from shared.resumption import OnOutage, is_resumable, to_resume
from shared.session import Origin

_SILENT_S = 1.0
"""An outage that is over sooner is not worth a notice."""

Attempt = Callable[[Cloud, Open, Sequence[Proposal]], AsyncGenerator[Step, None]]
"""Opens a stream for a request and what the edge has drafted for it."""


@dataclass(slots=True)
class _Outage:
    """From the loss of a stream to the next committed token."""

    error: CloudError
    began_s: float = field(default_factory=time.monotonic)
    num_failures: int = 0
    """Streams lost without a token between."""
    written: list[Proposal] = field(default_factory=list)
    """By the edge, after the committed tokens."""
    over: bool = False
    """The edge has ended the answer alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStreams:
    """How one request gets the target's own answer."""

    edge: EdgeModel | None
    """Writes on during an outage; without one, or with another vocabulary, the answer waits."""
    drafters: Drafters
    remote: Cloud
    config: EdgeConfig
    speeds: Speeds
    meter: Meter
    observed: Observed
    show_drafts: bool = False
    """Yield `Drafted` whenever it changes."""

    def speculate(
        self, request: Open, drafted: Sequence[Proposal] = (), *, may_stream: bool
    ) -> AsyncGenerator[Step, None]:
        """As `fastest`.

        Raises:
            CloudError: the stream cannot begin, or not go on in time.
        """
        return self._survive(partial(self._fastest, may_stream=may_stream), request, drafted)

    def cloud(self, request: Open) -> AsyncGenerator[Step, None]:
        """As `modes.cloud`, and raises as `speculate`.

        What the edge writes in an outage is verified, which gives the same text.
        """
        lossless = replace(request, policy=Policy.LOSSLESS, rollback_threshold=None)
        return self._survive(self._cloud, lossless)

    async def cloud_alone(self, request: Open) -> AsyncGenerator[Step, None]:
        """As `modes.cloud`, once: for what nobody could carry on, or is carried on otherwise.

        Raises:
            CloudError: the stream cannot begin, or breaks.
            InvalidRequest: the target does not know the request's shaping.
        """
        async with aclosing(self._traced(self._cloud, request, (), None)) as steps:
            async for step in steps:
                if step is FinishReason.DRAIN:
                    raise CloudUnavailable(
                        f"the cloud at {self.remote.address} left in the middle of the answer"
                    )
                yield step

    def _fastest(
        self, remote: Cloud, request: Open, drafted: Sequence[Proposal], *, may_stream: bool
    ) -> AsyncGenerator[Step, None]:
        return fastest(
            self.drafters,
            remote,
            request,
            self.config,
            self.speeds,
            self.meter,
            drafted,
            may_stream=may_stream,
            show_drafts=self.show_drafts,
        )

    def _cloud(self, remote: Cloud, request: Open, drafted: Sequence[Proposal]) -> AsyncGenerator[Step, None]:
        if drafted:
            return self._fastest(remote, request, drafted, may_stream=True)
        return modes.cloud(remote, request, self.meter)

    async def _survive(
        self, attempt: Attempt, request: Open, drafted: Sequence[Proposal] = ()
    ) -> AsyncGenerator[Step, None]:
        committed = list(request.committed)
        opened: Opened | None = None
        outage: _Outage | None = None
        while True:
            try:
                async with aclosing(self._traced(attempt, request, drafted, opened)) as steps:
                    async for step in steps:
                        if isinstance(step, Prompted):
                            opened = opened or step.opened
                            if outage is not None and not step.own_noise:
                                continue  # it was told before
                        elif isinstance(step, Token):
                            committed.append(step.id)
                            if outage is not None:
                                yield Resumed(time.monotonic() - outage.began_s)
                                outage = None
                        elif step is FinishReason.DRAIN:
                            raise CloudUnavailable(
                                f"the cloud at {self.remote.address} left, and no replica took over"
                            )
                        yield step
                return
            except CloudError as error:
                if opened is None or not is_resumable(error):
                    raise
                self.observed.lost(error, len(committed))
                outage = outage or _Outage(error)
                outage.error = error
                outage.num_failures += 1
            request = to_resume(request, opened, tuple(committed))
            async with aclosing(self._bridge(outage, request, opened)) as meanwhile:
                async for step in meanwhile:
                    yield step
            if outage.over:
                return
            drafted = outage.written

    async def _traced(
        self, attempt: Attempt, request: Open, drafted: Sequence[Proposal], told: Opened | None
    ) -> AsyncGenerator[Step, None]:
        """One attempt, in a span of its own; the replicas must say what the first one said.

        Args:
            told: by the first; None where there was none yet.
        """
        parent = tracing.below(self.observed.span)
        with tracing.span("duet.stream", parent, kind=SpanKind.CLIENT) as span:
            remote = self.remote.for_answer(self.observed.metadata(span))
            async with aclosing(attempt(remote, request, drafted)) as steps:
                if told is not None:
                    remote.pin(told)
                async for step in steps:
                    if told is None and isinstance(step, Prompted):
                        told = step.opened
                        assert told is not None, "a cloud's stream is opened"
                        remote.pin(told)
                    yield step

    async def _bridge(self, outage: _Outage, request: Open, opened: Opened) -> AsyncGenerator[Step, None]:
        """Until a replica answers. Raises what broke the stream where that takes too long."""
        if self.config.on_outage is OnOutage.STOP:
            await _take_over(outage, self.remote)
            return
        writer = await self._writer(outage, request, opened)
        back = asyncio.create_task(_back(outage, self.remote))
        writing: asyncio.Task[None] | None = None
        ends_s = outage.began_s + self.config.outage_patience_s
        notice_s = outage.began_s + _SILENT_S
        try:
            while not back.done():
                if writer is not None and not writer.done and writing is None:
                    writing = asyncio.create_task(writer.write())
                under_way: set[asyncio.Task[None]] = {back} | ({writing} if writing else set())
                wake_s = min(notice_s, float("inf") if writing else ends_s)
                timeout = None if wake_s == float("inf") else max(0.0, wake_s - time.monotonic())
                await asyncio.wait(under_way, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if writing is not None and writing.done():
                    assert writer is not None
                    writing.result()
                    writing = None
                    if self.show_drafts:
                        yield Drafted(writer.pieces)
                now_s = time.monotonic()
                if now_s >= notice_s and not back.done():
                    notice_s = float("inf")
                    yield Notice(self._what_happens(outage, writer))
                if now_s >= ends_s and writing is None and not back.done():
                    if writer is None:
                        raise outage.error
                    if writer.done:
                        outage.over = True
                        for step in writer.conclusion():
                            yield step
                        return
            back.result()
        finally:
            await end_tasks(back, writing)

    def _what_happens(self, outage: _Outage, writer: _Writer | None) -> str:
        if writer is None:
            return f"waiting up to {self.config.outage_patience_s:g} s for the cloud: {outage.error}"
        return f"the edge model goes on until the cloud is back to verify it: {outage.error}"

    async def _writer(self, outage: _Outage, request: Open, opened: Opened) -> _Writer | None:
        """Who goes on alone; None where nobody can, or shall."""
        if self.config.on_outage is not OnOutage.CONTINUE or self.edge is None or not self.edge.can_draft:
            return None
        try:
            drafting = await self.drafters.for_stream(self.remote, request, opened)
        except CloudError:  # the target's vocabulary was never needed, and now cannot be had
            return None
        if drafting.translated:
            return None
        drafter = LlamaDrafter(self.edge, drafting.masked_ids)
        return _Writer(drafter, drafting.piece, request, opened, outage.written)


async def _take_over(outage: _Outage, remote: Cloud) -> None:
    """Another replica at once, or the end."""
    try:
        if outage.num_failures == 1:
            return await remote.check()
    except CloudError:
        pass
    raise outage.error


async def _back(outage: _Outage, remote: Cloud) -> None:
    """Return when the stream may be tried again: the first time at once, if any replica answers."""
    if outage.num_failures > 1:
        lasted_s = time.monotonic() - outage.began_s
        await asyncio.sleep(Backoff().wait_s(outage.num_failures - 1, lasted_s, random.random()))
    await remote.back()


@dataclass(slots=True)
class _Writer:
    """The edge model, going on where the target's tokens end."""

    drafter: LlamaDrafter
    piece: Callable[[int], bytes]
    request: Open
    opened: Opened
    written: list[Proposal]
    """Grows."""
    _dry: bool = False
    """The edge's context is full."""

    @property
    def done(self) -> bool:
        return self._dry or self._ended or self._position >= self.opened.max_tokens

    @property
    def pieces(self) -> tuple[bytes, ...]:
        return tuple(self.piece(proposal.token_id) for proposal in self.written)

    async def write(self) -> None:
        """Add a token."""
        made = await self.drafter.propose(
            [
                *self.opened.prompt_token_ids,
                *self.request.committed,
                *(proposal.token_id for proposal in self.written),
            ],
            1,
            sampling=self.request.sampling,
            seed=self.request.seed,
            start=self._position,
            end_token_ids=self.opened.end_token_ids,
        )
        self.written += made
        self._dry = not made

    def conclusion(self) -> list[Step]:
        """The end of an answer that no cloud came back for."""
        notice = Notice(
            f"the cloud stayed away: the last {len(self.written)} tokens are the edge model's own,"
            " and not verified"
        )
        tokens = [
            Token(
                made.token_id, self.piece(made.token_id), Origin.LOCAL, log(made.prob) if made.prob else None
            )
            for made in self.written
        ]
        return [notice, *tokens, FinishReason.STOP if self._ended else FinishReason.LENGTH]

    @property
    def _position(self) -> int:
        return len(self.request.committed) + len(self.written)

    @property
    def _ended(self) -> bool:
        return bool(self.written) and self.written[-1].token_id in self.opened.end_token_ids
