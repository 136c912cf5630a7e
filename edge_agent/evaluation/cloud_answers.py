"""The target's answers to questions; a cloud that goes away is waited for, so that a run loses nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from edge_agent.evaluation.batch import Answered
from edge_agent.remote import Cloud, Meter
from shared.errors import CloudFailed, CloudOverloaded, CloudUnavailable, InvalidRequest, VerifyTimeout
from shared.messages import Finished, FinishReason, Message, Open, Opened
from shared.sampling import Sampling

log = logging.getLogger("duet.eval")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


Result = TypeVar("Result")


async def patiently(ask: Callable[[], Awaitable[Result]], patience_s: float) -> Result:
    """Ask until a cloud that is away is back, with longer and longer pauses.

    Args:
        ask: asks once, from the start.
        patience_s: for how long it is asked again, from the first time that the cloud failed it.
    Raises:
        CloudError: the cloud refused, or stayed away for longer.
    """
    failed_s: float | None = None
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await ask()
        except (CloudUnavailable, CloudOverloaded, VerifyTimeout) as error:
            now_s = time.monotonic()
            failed_s = now_s if failed_s is None else failed_s
            if now_s + pause_s - failed_s > patience_s:
                raise
            log.warning("waiting %.0f s for the cloud: %s", pause_s, error)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def check_model(served: str | None, begun_with: str) -> None:
    """Raises InvalidRequest where the cloud serves another model than when the run began."""
    if served != begun_with:
        raise InvalidRequest(
            f"the cloud now serves {served}, but the run was begun with {begun_with};"
            " serve that again, or choose another --out"
        )


class CloudAnswers:
    """Greedy answers of one `duet-cloud` service, several at once."""

    def __init__(self, cloud: Cloud, *, model: str, num_streams: int, patience_s: float) -> None:
        """
        Args:
            model: what it must serve all the time.
            patience_s: as in `patiently`.
        """
        self._cloud = cloud
        self._model = model
        self._patience_s = patience_s
        self._streams = asyncio.Semaphore(num_streams)

    async def answer(self, question: str, max_tokens: int) -> Answered:
        """
        Raises:
            InvalidRequest: the cloud serves another model now.
            CloudError: it refused, or stayed away for longer than `patience_s`.
        """
        request = Open(
            prompt=(Message("user", question),), sampling=Sampling(), seed=0, max_tokens=max_tokens
        )
        async with self._streams:
            return await patiently(partial(self._ask, request), self._patience_s)

    async def _ask(self, request: Open) -> Answered:
        pieces: list[bytes] = []
        async with aclosing(self._cloud.generate(request, Meter())) as messages:
            async for message in messages:
                if isinstance(message, Opened):
                    check_model(message.model, self._model)
                elif isinstance(message, Finished):
                    censored = message.reason is FinishReason.LENGTH
                    if message.reason is FinishReason.DRAIN:
                        raise CloudUnavailable("the cloud is leaving")
                    text = b"".join(pieces).decode("utf-8", "replace")
                    return Answered(text, len(pieces), censored, pieces=tuple(pieces))
                else:
                    pieces += message.pieces
        raise CloudFailed("the cloud ended an answer without a reason")
