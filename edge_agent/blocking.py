"""The agent for code without asyncio: the same calls, their events as plain iterators."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from edge_agent.agent import Agent
from shared.events import Answer, Event
from shared.messages import Message


class SyncAgent:
    """An `Agent` whose event loop runs in a thread of its own. Threads may share one."""

    def __init__(self, portal: BlockingPortal, agent: Agent) -> None:
        """See `open`."""
        self._portal = portal
        self._agent = agent

    @classmethod
    @contextmanager
    def open(cls, **settings: Any) -> Iterator[SyncAgent]:
        """See `Agent.open`."""
        with (
            start_blocking_portal("asyncio") as portal,
            portal.wrap_async_context_manager(Agent.open(**settings)) as agent,
        ):
            yield cls(portal, agent)

    def ask(self, question: str, **options: Any) -> Iterator[Event]:
        """See `Agent.ask`. Leaving the iteration early ends the request when the iterator is closed."""
        return self._iterate(self._agent.ask(question, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Event]:
        """See `Agent.chat`."""
        return self._iterate(self._agent.chat(messages, **options))

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Event]:
        """See `Agent.complete`."""
        return self._iterate(self._agent.complete(prompt, **options))

    def answer(self, question: str, **options: Any) -> Answer:
        """See `Agent.answer`."""
        return self._portal.call(lambda: self._agent.answer(question, **options))

    def _iterate(self, events: AsyncGenerator[Event, None]) -> Iterator[Event]:
        try:
            while (event := self._portal.call(_next, events)) is not None:
                yield event
        finally:
            self._portal.call(events.aclose)


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)
