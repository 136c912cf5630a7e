"""A chat from its first line to its last: reads lines, carries out commands, has questions answered."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager
from types import FrameType
from typing import Any, get_args

from edge_agent.chat.commands import COMMANDS, Command, help_lines, parse
from edge_agent.chat.conversation import Conversation
from edge_agent.chat.figures import AnswerFigures, ChatFigures, stats_lines, status_line
from edge_agent.chat.saved import LAST, SavedChats
from edge_agent.chat.view import View
from edge_agent.opening import Parts
from edge_agent.routing.privacy import PrivacyRule
from edge_agent.routing.router import link_to
from edge_agent.show import decision_lines
from shared.config import EdgeConfig
from shared.errors import DuetError, InvalidRequest, InvalidSetting, outcome
from shared.events import Answer, Text
from shared.routing import Link

MODES: tuple[str, ...] = get_args(EdgeConfig.model_fields["mode"].annotation)
_PING_EVERY_S = 15.0


class Chat:
    """One conversation and how it is answered."""

    def __init__(
        self, settings: EdgeConfig, parts: Parts, view: View, saved: SavedChats | None, *, interactive: bool
    ) -> None:
        """
        Args:
            parts: all modes share them, and so the KV cache.
            saved: None where nothing of the chat shall be kept.
            interactive: Ctrl-C stops an answer, not the chat.
        """
        self.conversation = Conversation(settings.system)
        self.figures = ChatFigures()
        self._settings = settings
        self._parts = parts
        self._view = view
        self._saved = saved
        self._interactive = interactive
        self._answer = AnswerFigures()
        self._link: Link | None = None
        self._left = False

    async def run(self, lines: AsyncIterator[str]) -> int:
        """Take lines until they end or `/quit`; returns the exit code, 0 unless something failed."""
        code = 0
        watching = asyncio.create_task(self._watch_link()) if self._interactive else None
        try:
            async for line in lines:
                try:
                    await self._take(line)
                except DuetError as error:
                    self._view.say([str(error)])
                    code = outcome(error).exit_code
                if self._left:
                    break
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        return 0 if self._interactive else code

    def greeting(self) -> str:
        edge, cloud = self._parts.edge, self._parts.cloud
        models = [f"{edge.model.name} here"] if edge is not None else []
        models += [f"a cloud at {cloud.address}"] if cloud is not None else []
        return f"{', '.join(models)}. /help lists the commands, Ctrl-D leaves"

    def status(self) -> str:
        return status_line(self._settings.mode, self._answer, self._link)

    def completions(self, written: str) -> Iterable[str]:
        """Whole lines that what was written so far may become; commands only."""
        lines = [f"/{name}" for name in COMMANDS] + [f"/mode {mode}" for mode in MODES]
        if self._saved is not None and written.startswith(("/load ", "/save ")):
            lines += [f"{written[:6]}{name}" for name in self._saved.names()]
        return [line for line in lines if written.startswith("/") and line.startswith(written)]

    async def _take(self, line: str) -> None:
        if not line.strip():
            return
        command = parse(line)
        if command is None:
            await self._ask(line.strip())
        else:
            await self._carry_out(command)

    # Answers

    async def _ask(self, question: str) -> None:
        self._answer = AnswerFigures()
        shown: list[str] = []
        answers: list[Answer] = []

        async def answer() -> None:
            messages = self.conversation.asking(question)
            chat = self._parts.agent.chat(messages, provisional=True, mode=self._settings.mode)
            async with self._view.answering(self.status) as view, aclosing(chat) as events:
                async for event in events:
                    self._answer.take(event, time.monotonic())
                    if isinstance(event, Text):
                        shown.append(event.text)
                    elif isinstance(event, Answer):
                        answers.append(event)
                    view.take(event)

        try:
            await self._unless_stopped(answer())
        finally:
            # What was shown stands, however the answer ended; a question without an answer is forgotten.
            if shown or answers:
                self.conversation = self.conversation.answered(question, "".join(shown))
                self._keep()
        for whole in answers:
            self.figures.add(whole)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that Ctrl-C may stop."""
        task = asyncio.create_task(work)
        try:
            with _on_interrupt(task.cancel if self._interactive else None):
                await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            self._view.say(["stopped"])
        else:
            task.result()

    def _keep(self) -> None:
        if self._saved is not None:
            self._saved.save(LAST, self.conversation)

    # The link

    async def _watch_link(self) -> None:
        while True:
            asks = self._settings.mode != "local" and not self._settings.private
            cloud = self._parts.cloud
            self._link = await link_to(cloud) if asks and cloud is not None else None
            await asyncio.sleep(_PING_EVERY_S)

    # Commands

    async def _carry_out(self, command: Command) -> None:
        argument = command.argument
        match command.name:
            case "help":
                self._view.say(help_lines())
            case "mode":
                self._mode(argument)
            case "route":
                await self._route(argument)
            case "system":
                self._system(argument)
            case "stats":
                self._view.say(stats_lines(self.figures))
            case "save":
                self._save(argument)
            case "load":
                self._load(argument)
            case "clear":
                self.conversation = Conversation(self.conversation.system)
                self._view.say(["a new chat"])
            case "quit":
                self._left = True

    def _mode(self, mode: str) -> None:
        if mode and mode not in MODES:
            raise InvalidRequest(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
        if mode:
            self._check_can(mode)
            self._settings = self._settings.model_copy(update={"mode": mode})
            self._answer = AnswerFigures()
        self._view.say([f"mode {self._settings.mode}"])

    def _check_can(self, mode: str) -> None:
        """Raises InvalidSetting where the mode needs what this chat did not load."""
        edge = self._parts.edge
        drafts = "model" in self._settings.drafters
        if edge is None and (mode in ("auto", "local", "guide") or (mode == "speculate" and drafts)):
            raise InvalidSetting(
                f"mode {mode} needs the edge model, which this chat did not load; start `duet chat` with"
                " --mode auto and the model among the drafters"
            )
        if mode == "speculate" and edge is not None and not edge.can_draft:
            raise InvalidSetting(
                f"{edge.model.name} keeps a recurrent state that cannot be rolled back, so it cannot draft;"
                " use /mode auto, local, guide or cloud"
            )

    async def _route(self, question: str) -> None:
        if not question:
            decision = self._answer.decision
            if decision is None:
                raise InvalidRequest(
                    "no answer was routed yet: the router decides in mode auto; give /route a question"
                )
            self._view.say(decision_lines(decision))
            return
        self._check_can("auto")
        router = self._parts.router
        assert router is not None, "auto can be used"
        settings, messages = self._settings, self.conversation.asking(question)
        private = PrivacyRule(settings.private_patterns, detect=settings.detect_private).reason(
            messages, asked=settings.private
        )

        async def route() -> None:
            routing = await router.route(messages, private)
            self._view.say(decision_lines(routing.decision))

        await self._unless_stopped(route())

    def _system(self, text: str) -> None:
        if text:
            system = None if text == "off" else text
            self.conversation = Conversation(system, self.conversation.messages)
        now = self.conversation.system
        self._view.say(["no system prompt" if now is None else f"system prompt: {now}"])

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidRequest("give /save a name for the chat")
        path = self._kept().save(name, self.conversation)
        self._view.say([f"saved {self.conversation.num_turns} questions in {path}"])

    def _load(self, name: str) -> None:
        saved = self._kept()
        if not name:
            self._view.say([f"saved: {', '.join(saved.names()) or 'none'}"])
            return
        self.conversation = saved.load(name)
        self._view.say([f"going on with {name} after {self.conversation.num_turns} questions"])

    def _kept(self) -> SavedChats:
        if self._saved is None:
            raise InvalidRequest("a chat that began with --private is not kept; start one without it")
        return self._saved


@contextmanager
def _on_interrupt(stop: Callable[[], object] | None) -> Iterator[None]:
    """Call `stop` on Ctrl-C, in place of what happens otherwise; None leaves that as it is."""
    if stop is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def interrupted(signal_number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)  # which wakes the loop, too

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
