"""A target that follows a script and computes nothing. For protocol tests and for measuring our own overhead.

Not a model: it stands in where the subject is the service around one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np

from cloud_service.targets.base import GenerateOptions, Scores
from shared.messages import NO_TIMINGS, Message
from shared.sampling import Rows, Sampling, logprobs_in_rows
from shared.vocab import TokenKind, Vocabulary

VOCABULARY_SIZE = 256


class Passes:
    """The time that an engine takes: one pass after the other, each over the rounds that wait."""

    def __init__(self, base_s: float, round_s: float, max_rounds: int) -> None:
        """
        Args:
            base_s: of a pass, whatever it holds.
            round_s: for each of its rounds besides.
            max_rounds: of a pass.
        """
        self._base_s = base_s
        self._round_s = round_s
        self._max_rounds = max_rounds
        self._waiting: list[asyncio.Future[None]] = []
        self._working: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Return when the first pass that has room for one more round is over."""
        over = asyncio.get_running_loop().create_future()
        self._waiting.append(over)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        await over

    async def _work(self) -> None:
        due = time.monotonic()
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_rounds], self._waiting[self._max_rounds :]
            # Being woken late does not add up.
            due += self._base_s + len(batch) * self._round_s
            await asyncio.sleep(due - time.monotonic())
            for over in batch:
                if not over.done():  # else its stream has gone
                    over.set_result(None)


class ScriptedTarget:
    """Implements `cloud_service.targets.base.Target`; a chat's prompt is the bytes of its contents."""

    engine = "scripted"
    verification = "rounds"
    max_streams = 256
    shapes: frozenset[str] = frozenset()
    judge_head = None
    name = "script"
    end_token_ids = frozenset({0})

    def __init__(
        self,
        next_token: Callable[[Sequence[int]], int],
        context_tokens: int = 1 << 20,
        probability: float = 1.0,
        vocabulary_size: int = VOCABULARY_SIZE,
        passes: Passes | None = None,
    ) -> None:
        """
        Args:
            next_token: text so far (prompt included) -> the target's next token.
            probability: what a row says of that token; all others have none.
            vocabulary_size: ids from 256 on stand for the byte of their last 8 bits.
            passes: what rounds wait for; without, they take no time.
        """
        self.context_tokens = context_tokens
        self.vocabulary = Vocabulary(
            self.name, [self.piece(i) for i in range(vocabulary_size)], [TokenKind.TEXT] * vocabulary_size
        )
        self.open_sequences = 0
        self.scored: list[tuple[int, ...]] = []
        """The tokens of each `score` call that were read."""
        self._next_token = next_token
        self._probability = probability
        self._passes = passes

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        return list("".join(message.content for message in messages).encode())

    def piece(self, token_id: int) -> bytes:
        return bytes([token_id % 256])

    def draws(self, sampling: Sampling, *, drafts: bool) -> bool:
        return False

    @asynccontextmanager
    async def sequence(
        self,
        token_ids: Sequence[int],
        *,
        tenant: str | None = None,
        expected_tokens: int = 0,
        own_draw: Sampling | None = None,
    ) -> AsyncIterator[ScriptedSequence]:
        self.open_sequences += 1
        try:
            yield ScriptedSequence(self, self._next_token, self._probability, self._passes)
        finally:
            self.open_sequences -= 1

    async def warm_up(self) -> None:
        pass

    async def failed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


class ScriptedSequence:
    def __init__(
        self,
        target: ScriptedTarget,
        next_token: Callable[[Sequence[int]], int],
        probability: float,
        passes: Passes | None = None,
    ) -> None:
        self.num_computed_tokens = 0
        self.drafts_pay = True
        self._target = target
        self._next_token = next_token
        self._logprob = np.log(probability)
        self._passes = passes

    async def score(
        self,
        token_ids: Sequence[int],
        *,
        num_rows: int,
        width: int,
        proposed: Sequence[int] | None = None,
        num_judged: int = 0,
    ) -> Scores:
        first = len(token_ids) - num_rows + 1
        self._target.scored.append(tuple(token_ids[first:]))
        tokens = [self._next_token(token_ids[:end]) for end in range(first, len(token_ids) + 1)]
        ids = (np.array(tokens)[:, None] + np.arange(width)) % len(self._target.vocabulary.pieces)
        logprobs = np.broadcast_to(np.where(np.arange(width) == 0, self._logprob, -np.inf), ids.shape)
        rows = Rows(ids, logprobs)
        if self._passes:
            await self._passes.join()
        return Scores(rows, NO_TIMINGS, logprobs_in_rows(rows, proposed or ()))

    async def generate(
        self, token_ids: Sequence[int], options: GenerateOptions
    ) -> AsyncGenerator[list[int], None]:
        text = list(token_ids)
        for _ in range(options.max_tokens):
            text.append(self._next_token(text))
            yield [text[-1]]
            if text[-1] in options.end_token_ids:
                return
