"""The speculation experiment: the same questions under several draft lengths, thresholds and policies."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from edge_agent.agent import Agent
from edge_agent.edge_model import EdgeModel
from edge_agent.evaluation.cloud_answers import check_model, patiently
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item
from edge_agent.evaluation.plan import Examine, Unit
from edge_agent.evaluation.routing import CloudSpec, connect
from edge_agent.evaluation.runs import Row
from edge_agent.remote import Cloud
from shared.config import EdgeConfig
from shared.errors import CloudFailed, InvalidRequest
from shared.events import Answer
from shared.messages import Policy
from shared.models import Registry, resolve
from shared.resumption import OnOutage
from shared.session import Origin

CLOUD = "cloud"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to speculate."""

    policy: Policy
    max_draft_tokens: int
    fallback_threshold: float
    rollback_threshold: float
    """Nats; means nothing under `lossless`."""

    @property
    def name(self) -> str:
        name = f"{self.policy.value}-{self.max_draft_tokens}"
        if self.fallback_threshold:
            name += f"-fb{self.fallback_threshold:g}"
        if self.policy is Policy.BILD:
            name += f"-rb{self.rollback_threshold:g}"
        return name


def grid(
    policies: Sequence[Policy],
    draft_lengths: Sequence[int],
    fallbacks: Sequence[float],
    rollbacks: Sequence[float],
) -> tuple[Setting, ...]:
    """Every combination that differs, once: `lossless` has no rollback threshold."""
    settings = (
        Setting(
            policy=policy, max_draft_tokens=length, fallback_threshold=fallback, rollback_threshold=rollback
        )
        for policy, length, fallback in itertools.product(policies, draft_lengths, fallbacks)
        for rollback in (rollbacks if policy is Policy.BILD else rollbacks[:1])
    )
    return tuple(dict.fromkeys(settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPlan:
    """Settings of the experiment. Each question's plain stream from the cloud is one row more."""

    experiment = "speculation"
    num_parallel = 1

    config: EdgeConfig
    cloud: CloudSpec
    settings: tuple[Setting, ...]

    def identity(self) -> dict[str, object]:
        return {
            "cloud": self.cloud.model,
            "settings": [setting.name for setting in self.settings],
            "temperature": self.config.temperature,
            "seed": self.config.seed,
            "max_answer_tokens": self.config.max_tokens,
        }

    def units(self, items: Sequence[Item]) -> list[Unit]:
        names = [CLOUD, *(setting.name for setting in self.settings)]
        return [Unit(f"{item.id}|{name}", item, {"setting": name}) for item in items for name in names]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Examine]:
        # Passes are counted here, and how many drafts share one must not depend on how fast they came.
        config = self.config.model_copy(update={"mode": "speculate", "proactive": False})
        async with AsyncExitStack() as stack:
            cloud = await stack.enter_async_context(connect(self.cloud, config))
            resolved = resolve(config.model, Registry.load())
            edge = await EdgeModel.load(resolved.path, resolved.name, config)
            stack.push_async_callback(edge.close)
            yield _Examiner(self, edge, cloud).rows


class _Examiner:
    def __init__(self, plan: SpeculationPlan, edge: EdgeModel, cloud: Cloud) -> None:
        self._plan = plan
        self._edge = edge
        self._cloud = cloud
        self._settings = {setting.name: setting for setting in plan.settings}
        self._streams: dict[str, list[int]] = {}
        """Each question's tokens from the cloud alone: what lossless answers must equal."""

    async def rows(self, units: Sequence[Unit]) -> AsyncGenerator[Row, None]:
        for unit in units:
            yield await self._row(unit)

    async def _row(self, unit: Unit) -> Row:
        setting = self._settings.get(str(unit.condition["setting"]))
        answer, seconds = await self._answer(unit.item, setting)
        tokens = [token.id for token in answer.tokens]
        if setting is None:
            self._streams[unit.item.id] = tokens
        elif unit.item.id not in self._streams:  # made in an earlier session of this run
            stream, _ = await self._answer(unit.item, None)
            self._streams[unit.item.id] = [token.id for token in stream.tokens]
        return {
            "id": unit.id,
            "item": unit.item.id,
            "category": unit.item.group,
            "setting": unit.condition["setting"],
            "policy": setting.policy.value if setting else CLOUD,
            "max_draft_tokens": setting.max_draft_tokens if setting else 0,
            "fallback_threshold": setting.fallback_threshold if setting else 0.0,
            "rollback_threshold": setting.rollback_threshold
            if setting and setting.policy is Policy.BILD
            else None,
            "temperature": self._plan.config.temperature,
            "committed": answer.completion_tokens,
            "rounds": answer.rounds if setting else answer.completion_tokens,
            "drafted": answer.drafted_tokens,
            "accepted": answer.accepted_tokens,
            "rejections": sum(token.origin is Origin.CORRECTION for token in answer.tokens),
            "target_passes": answer.target_passes if setting else answer.completion_tokens,
            "seconds": round(seconds, 4),
            "ttft_s": None if answer.ttft_ms is None else round(answer.ttft_ms / 1e3, 4),
            "bytes_per_token": answer.bytes_per_token,
            "correct": is_right(unit.item, answer.answer),
            "agreement": agreement(tokens, self._streams[unit.item.id]),
        }

    async def _answer(self, item: Item, setting: Setting | None) -> tuple[Answer, float]:
        """An answer that the cloud did not fail, and the seconds that it took."""
        cloud = self._plan.cloud
        answer, seconds = await patiently(partial(self._ask, item, setting), cloud.patience_s)
        check_model(answer.cloud_model, cloud.model)
        if setting and answer.policy is not setting.policy:
            raise InvalidRequest(
                f"the cloud does not verify by policy {setting.policy.value}: leave it out, or serve what it"
                " needs (docs/policies.md)"
            )
        return answer, seconds

    async def _ask(self, item: Item, setting: Setting | None) -> tuple[Answer, float]:
        update: dict[str, object] = {"mode": CLOUD}
        if setting is not None:
            update = {
                "mode": "speculate",
                "policy": setting.policy,
                "max_draft_tokens": setting.max_draft_tokens,
                "fallback_threshold": setting.fallback_threshold,
                "rollback_threshold": setting.rollback_threshold,
            }
        # What the run waits for and asks again must not be finished by the edge.
        update["on_outage"] = OnOutage.STOP
        agent = Agent(self._plan.config.model_copy(update=update), edge=self._edge, cloud=self._cloud)
        began = time.monotonic()
        async with aclosing(agent.ask(item.question)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    return event, time.monotonic() - began
        raise CloudFailed("an answer ended without its figures")


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of positions, up to the shorter length, at which two texts have the same token."""
    positions = min(len(tokens), len(reference))
    if not positions:
        return 1.0
    return sum(a == b for a, b in zip(tokens, reference, strict=False)) / positions
