"""One request, from prompt to tokens: pick the mode, run it, show what may be shown, measure."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from edge_agent import modes
from edge_agent.auto import auto, shaped
from edge_agent.drafting.drafters import Drafters
from edge_agent.drafting.store import default_store_dir
from edge_agent.edge_model import EdgeModel
from edge_agent.guidance import guide
from edge_agent.metrics import EdgeMetrics
from edge_agent.observing import Observed, observed
from edge_agent.remote import Cloud, Meter
from edge_agent.resume import TargetStreams
from edge_agent.routing.privacy import PrivacyRule
from edge_agent.routing.router import Router
from edge_agent.speeds import Speeds
from edge_agent.steps import Decided, Drafted, Prompted, Replaced, Resumed, Step
from shared.config import EdgeConfig, for_request
from shared.controller import Chosen, Way
from shared.errors import InvalidRequest, InvalidSetting, PromptTooLong, VocabularyMismatch
from shared.events import Answer, Event, Notice, Provisional, Round, Routed, Text, Token, Waiting
from shared.messages import FinishReason, Message, Open, Policy
from shared.routing import Decision, Route
from shared.sampling import Sampling
from shared.session import Origin
from shared.settings import load
from shared.shaping import NO_SHAPING, Shaping
from shared.text import TextStream


@dataclass
class _Tally:
    """What happened so far in one request."""

    started: float
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    cloud_model: str | None = None
    policy: Policy | None = None
    own_noise: bool = False
    """Some of its tokens the cloud may have drawn by noise of its own."""
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    mode: str = ""
    decision: Decision | None = None
    reason: str | None = None
    meter: Meter = field(default_factory=Meter)
    ways: list[Chosen] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def take(self, step: Step) -> None:
        if isinstance(step, Replaced):
            self.mode, self.reason = step.mode, step.reason
        elif isinstance(step, Decided):
            self.decision = step.decision
            self.mode = step.decision.route.value
        elif isinstance(step, Prompted):
            self.prompt_tokens = step.num_prompt_tokens
            self.cloud_model = step.cloud_model
            self.policy = step.policy
            self.own_noise |= step.own_noise
        elif isinstance(step, Chosen):
            self.ways.append(step)
            if self.decision is not None:
                drafts = any(each.plan.way is not Way.CLOUD for each in self.ways)
                self.decision = replace(self.decision, route=Route.SPECULATE if drafts else Route.CLOUD)
                self.mode = self.decision.route.value
        elif isinstance(step, Round):
            self.num_rounds += 1
            self.num_drafted += step.num_drafted
            self.num_accepted += step.num_accepted
        elif isinstance(step, Token):
            self.last_token = time.monotonic()
            self.first_token = self.first_token or self.last_token
            self.tokens.append(step)


Prompt = tuple[Message, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, and what it may use."""

    config: EdgeConfig
    started: float
    private: str | None
    """Why the prompt must not leave the device, if it must not."""
    question: tuple[Message, ...]
    """The prompt, or a plain text put as one."""
    provisional: bool
    shaping: Shaping
    edge: EdgeModel | None
    drafters: Drafters
    observed: Observed


_NOTHING_UNVERIFIED = Provisional("", 0)


class Agent:
    """Answers requests with an edge model, a cloud, or both."""

    def __init__(
        self,
        config: EdgeConfig,
        *,
        edge: EdgeModel | None,
        cloud: Cloud | None,
        router: Router | None = None,
        speeds: Speeds | None = None,
    ) -> None:
        """
        Args:
            edge: needed for all modes but `cloud`, and `speculate` with no model among the drafters.
            cloud: needed for all modes but `local`.
            router: needed for mode `auto`.
            speeds: what was measured before; unset, nothing was.
        """
        self._speeds = speeds or Speeds()
        self._router = router
        self._privacy = PrivacyRule(config.private_patterns, detect=config.detect_private)
        self._config = config
        self._edge = edge
        self._cloud = cloud
        self.metrics = EdgeMetrics(cloud)
        self._drafters = Drafters(
            edge,
            config.drafters,
            store_folder=default_store_dir(),
            remember_answers=config.remember_answers,
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, *, num_slots: int = 1, **settings: Any) -> AsyncIterator[Agent]:
        """Load the edge model and connect to the cloud, as far as the mode needs them; closed afterwards.

        Args:
            num_slots: requests that use the edge model at once; more wait in line.
            settings: those of `shared.config.EdgeConfig`. They win over DUET_* variables, and these over
                duet.yaml.
        Raises:
            ConfigError, ModelError, CloudUnavailable
        """
        from edge_agent.opening import open_agent  # which imports this module

        config, _ = load(EdgeConfig, flags=settings, file=None, file_name="duet.yaml", env_prefix="DUET_")
        async with open_agent(config, num_slots=num_slots) as agent:
            yield agent

    async def answer(self, question: str, **options: Any) -> Answer:
        """Answer one question, and give the whole at its end; see `chat`."""
        async with aclosing(self.ask(question, **options)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise AssertionError("every request ends with an answer or an error")

    async def ask(self, question: str, **options: Any) -> AsyncGenerator[Event, None]:
        """Answer one question; see `chat`."""
        messages = question_as_chat(question, self._config.system)
        async with aclosing(self.chat(messages, **options)) as events:
            async for event in events:
                yield event

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        provisional: bool = False,
        shaping: Shaping = NO_SHAPING,
        request_id: str | None = None,
        **settings: Any,
    ) -> AsyncGenerator[Event, None]:
        """Answer the last of the messages.

        Yields events as they come, and one `Answer` at the end. A chat that outgrows the
        context loses its oldest turns, never the system prompt, and a notice says so. Several may run at
        once: those that use the edge model share it, or wait in line for it.

        Args:
            provisional: yield `Provisional`s too.
            shaping: penalties, bias, or a form of the text. One model writes alone under it: in modes
                `speculate` and `guide` the target, in `auto` the target or, where that cannot, the edge.
            request_id: names the request in logs and traces here and in the cloud; unset draws one.
            settings: of this request, in place of the agent's own: any of `shared.config.REQUEST_SETTINGS`.
        Raises:
            DuetError: see `shared.errors`; text that was yielded stands.
        """
        chat = tuple(messages)
        async with aclosing(self._run(chat, chat, provisional, shaping, request_id, settings)) as events:
            async for event in events:
                yield event

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        provisional: bool = False,
        shaping: Shaping = NO_SHAPING,
        request_id: str | None = None,
        **settings: Any,
    ) -> AsyncGenerator[Event, None]:
        """Continue a text as it stands, without a chat template; see `chat`.

        Args:
            prompt: text, in which special tokens count as such, or token ids of the edge model.
        Raises:
            VocabularyMismatch: the target's tokens are others.
        """
        if self._edge is None:
            raise InvalidRequest("a plain text needs the edge model, which splits it into tokens")
        model = self._edge.model
        if isinstance(prompt, str):
            ids = tuple(await asyncio.to_thread(model.tokenize, prompt, add_special=True))
        else:
            ids = tuple(prompt)
            if unknown := [token for token in ids if token not in model.vocabulary.legal_ids]:
                raise InvalidRequest(f"prompt: token id {unknown[0]} is not in {model.name}'s vocabulary")
        if not ids:
            raise InvalidRequest("prompt: the text is empty")
        text = b"".join(model.piece(token) for token in ids).decode("utf-8", "replace")
        question = (Message("user", text),)
        async with aclosing(self._run(ids, question, provisional, shaping, request_id, settings)) as events:
            async for event in events:
                yield event

    async def _run(
        self,
        prompt: Prompt,
        question: tuple[Message, ...],
        provisional: bool,
        shaping: Shaping,
        request_id: str | None,
        settings: Mapping[str, Any],
    ) -> AsyncGenerator[Event, None]:
        with observed(self.metrics, request_id) as request:
            answering = self._request(request, prompt, question, provisional, shaping, settings)
            async with aclosing(answering) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        request.answered(event)
                    yield event

    async def _request(
        self,
        request: Observed,
        prompt: Prompt,
        question: tuple[Message, ...],
        provisional: bool,
        shaping: Shaping,
        settings: Mapping[str, Any],
    ) -> AsyncGenerator[Event, None]:
        """Wait for a slot of the edge model, where one is needed, and answer in it."""
        started = time.monotonic()
        config = for_request(self._config, settings)
        self._check_parts(config)
        # Huge messages take a while, which the other requests should not.
        private = await asyncio.to_thread(self._privacy.reason, question, asked=config.private)
        if private is not None and config.mode in ("cloud", "speculate", "guide"):
            raise InvalidRequest(
                f"the prompt is private ({private}), and mode {config.mode} would send it away; use"
                " --mode auto or local. The settings private_patterns and detect_private say what is private"
            )
        call = _Call(
            config, started, private, question, provisional, shaping, self._edge, self._drafters, request
        )
        if self._edge is None or config.mode == "cloud":
            async with aclosing(self._fitting(call, prompt)) as events:
                async for event in events:
                    yield event
            return
        turn = self._edge.enter(await asyncio.to_thread(self._edge.prompt_ids, prompt))
        try:
            while turn.position:
                yield Waiting(turn.position)
                await turn.moved()
            edge = self._edge.in_slot(turn)
            call = replace(call, edge=edge, drafters=self._drafters.on(edge))
            async with aclosing(self._fitting(call, prompt)) as events:
                async for event in events:
                    yield event
        finally:
            self._edge.leave(turn)

    async def _fitting(self, call: _Call, prompt: Prompt) -> AsyncGenerator[Event, None]:
        """Answer a prompt; a chat that is too long without its oldest turns."""
        config = call.config
        request = Open(
            prompt=prompt,
            sampling=Sampling(
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
            ),
            seed=secrets.randbits(64) if config.seed is None else config.seed,
            policy=config.policy,
            rollback_threshold=config.rollback_threshold if config.policy is Policy.BILD else None,
            max_tokens=config.max_tokens,
            shaping=call.shaping,
            any_noise=config.seed is None,
        )
        messages = request.messages
        num_dropped = 0
        while True:
            tally = _Tally(started=call.started, mode=config.mode)
            try:
                async with aclosing(self._answer(call, request, tally)) as events:
                    async for event in events:
                        yield event
                return
            except PromptTooLong:
                shorter = without_oldest_turn(messages)
                if tally.tokens or shorter is None:
                    raise
                num_dropped += len(messages) - len(shorter)
                messages = shorter
                request = replace(request, prompt=tuple(messages))
                yield Notice(f"the chat outgrew the context: its oldest {num_dropped} messages were left out")

    def _check_parts(self, config: EdgeConfig) -> None:
        """Raises InvalidRequest where what the mode needs was not opened."""
        drafts = config.mode == "speculate" and "model" in config.drafters
        if self._edge is None and (drafts or config.mode in ("auto", "local", "guide")):
            raise InvalidRequest(f"mode {config.mode} needs the edge model, which is not loaded")
        if self._cloud is None and config.mode != "local":
            raise InvalidRequest(f"mode {config.mode} needs a cloud, and none is set; use mode local")
        if self._router is None and config.mode == "auto":
            raise InvalidRequest("mode auto needs the router, which is not loaded; choose another mode")

    async def _answer(self, call: _Call, request: Open, tally: _Tally) -> AsyncGenerator[Event, None]:
        config = call.config
        text: TextStream[Origin] = TextStream(config.stop)
        reason: FinishReason | None = None
        unverified, text_follows = _NOTHING_UNVERIFIED, False
        if config.mode in ("local", "cloud") or (
            config.mode in ("speculate", "guide") and request.shaping == NO_SHAPING
        ):
            yield Routed(config.mode)
        async with aclosing(self._steps(call, request, tally.meter)) as steps:
            async for step in steps:
                tally.take(step)
                if isinstance(step, FinishReason):
                    reason = step
                elif isinstance(step, Notice | Round):
                    yield step
                elif isinstance(step, Replaced):
                    yield Routed(step.mode, reason=step.reason)
                elif isinstance(step, Prompted):
                    self._check_vocabulary(request, step)
                elif isinstance(step, Decided):
                    yield Routed(step.decision.route.value, step.decision)
                elif isinstance(step, Resumed):
                    call.observed.resumed(step.after_s)
                elif isinstance(step, Drafted):
                    drafted = Provisional(text.preview(step.pieces), len(step.pieces))
                    if drafted != unverified or (drafted.num_tokens and text_follows):
                        unverified, text_follows = drafted, False
                        yield drafted
                elif isinstance(step, Token):
                    yield step
                    for event in _show(text.feed(step.piece, step.origin), tally):
                        text_follows = True
                        yield event
                    if text.stopped:
                        reason = FinishReason.STOP
                        break
        for event in _show(text.finish(), tally):
            yield event
        if unverified != _NOTHING_UNVERIFIED:
            yield _NOTHING_UNVERIFIED
        assert reason is not None, "a mode ends with a reason or an error"
        answer = self._result(request, tally, reason)
        if call.private is None:  # what is drafted from the store is sent away
            try:
                call.drafters.remember(call.question[-1].content, answer.answer)
            except InvalidSetting as error:
                yield Notice(f"the answer is not remembered: {error}")
        yield answer

    def _check_vocabulary(self, request: Open, prompted: Prompted) -> None:
        """Raises VocabularyMismatch where the edge's token ids mean something else to the target."""
        opened, ids = prompted.opened, request.token_ids
        if opened is None or not ids:
            return
        assert self._edge is not None, "who made the ids"
        if opened.vocabulary_sha256 != self._edge.model.vocabulary.sha256:
            raise VocabularyMismatch(
                f"a plain text cannot be handed to {opened.model}, whose vocabulary is another; send a chat"
            )

    def _steps(self, call: _Call, request: Open, meter: Meter) -> AsyncGenerator[Step, None]:
        config, edge = call.config, call.edge
        if config.mode == "local":
            assert edge is not None
            return modes.local(edge, request)
        assert self._cloud is not None
        streams = TargetStreams(
            edge=edge,
            drafters=call.drafters,
            remote=self._cloud,
            config=config,
            speeds=self._speeds,
            meter=meter,
            observed=call.observed,
            show_drafts=call.provisional,
        )
        if request.shaping != NO_SHAPING:
            return shaped(edge, streams, request, config.mode, call.private)
        if config.mode == "cloud":
            return streams.cloud(request)
        if config.mode == "speculate":
            return streams.speculate(request, may_stream=False)
        assert edge is not None
        if config.mode == "guide":
            return guide(edge, streams, request)
        assert self._router is not None
        return auto(edge, streams, self._router, request, config, call.private, call.question)

    def _result(self, request: Open, tally: _Tally, reason: FinishReason) -> Answer:
        num = len(tally.tokens)
        num_cloud = sum(token.origin is Origin.CLOUD for token in tally.tokens)
        first, last = tally.first_token, tally.last_token
        return Answer(
            answer="".join(tally.shown),
            mode=tally.mode,
            finish_reason=reason,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=num,
            rounds=tally.num_rounds,
            target_passes=tally.num_rounds + num_cloud,
            guidance_tokens=num_cloud if tally.mode == Route.GUIDE.value else 0,
            policy=tally.policy,
            acceptance_length=num / tally.num_rounds if tally.num_rounds else None,
            drafted_tokens=tally.num_drafted,
            accepted_tokens=tally.num_accepted,
            ttft_ms=None if first is None else 1e3 * (first - tally.started),
            tpot_ms=1e3 * (last - first) / (num - 1) if first and last and num > 1 else None,
            bytes_per_token=tally.meter.num_bytes / num if num and tally.mode != "local" else None,
            seed=None if tally.own_noise else request.seed,
            edge_model=self._edge.model.name if self._edge else None,
            cloud_model=tally.cloud_model,
            tokens=tuple(tally.tokens),
            decision=tally.decision,
            speed=self._speeds.report(tally.ways) if tally.ways else None,
            reason=tally.reason,
        )


def question_as_chat(question: str, system: str | None) -> list[Message]:
    """Raises InvalidRequest where there is no question."""
    if not question.strip():
        raise InvalidRequest("the question is empty; give it as an argument or on standard input")
    asked = Message("user", question)
    return [asked] if system is None else [Message("system", system), asked]


def without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Drop the oldest user message and the answer to it, never a system prompt or the last message.

    >>> chat = [Message("system", "s"), Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
    >>> [m.content for m in without_oldest_turn(chat)]
    ['s', '3']
    """
    system = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    if len(turns) < 2:
        return None
    kept = turns[1:]
    while len(kept) > 1 and kept[0].role == "assistant":
        kept = kept[1:]
    return system + kept


def _show(runs: list[tuple[str, Origin]], tally: _Tally) -> list[Text]:
    tally.shown += [text for text, _ in runs]
    return [Text(text, origin) for text, origin in runs]
