"""The guide experiment: the target begins answers and the edge finishes them, by length of guidance.

What the target writes first does not depend on where it is cut off, so that one answer of the target gives
the guidance of every length, and the row of the target alone. Answers are greedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.drafting.translated import tokens_of
from edge_agent.edge_model import EdgeModel
from edge_agent.evaluation.batch import Answered, Job, answers, load_batch_edge
from edge_agent.evaluation.cloud_answers import CloudAnswers
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item
from edge_agent.evaluation.plan import Examine, Unit
from edge_agent.evaluation.routing import CloudSpec, connect, request_text
from edge_agent.evaluation.runs import Row, read_run
from shared.byte_tokens import ByteTokenizer
from shared.config import EdgeConfig
from shared.errors import InvalidRequest
from shared.messages import Message
from shared.models import Registry, resolve

EDGE, CLOUD = "edge", "cloud"
"""Settings of a row: one model alone; otherwise the number of guidance tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswers:
    """A routing run that has the answers of both models alone, so that no cloud is asked."""

    folder: Path
    model: str

    @classmethod
    def of(cls, folder: Path, *, edge_sha256: str, items_sha256: str, max_tokens: int) -> StoredAnswers:
        """
        Raises:
            InvalidRequest: no routing run of this edge and a cloud, over these questions, up to this length.
        """
        manifest, _ = read_run(folder)
        found = manifest["identity"]
        if found["experiment"] != "routing":
            raise InvalidRequest(f"{folder} is no routing run")
        for name, there, here in (
            ("edge model", found["edge"]["sha256"], edge_sha256),
            ("questions", found["items_sha256"], items_sha256),
            ("--max-tokens", found["max_answer_tokens"], max_tokens),
        ):
            if there != here:
                raise InvalidRequest(f"{folder} has other {name}: {there}, and not {here}")
        if found["cloud"] is None:
            raise InvalidRequest(f"{folder} has no answers of a cloud; `duet eval pair` joins two runs")
        return cls(folder=folder, model=found["cloud"])


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidePlan:
    """Settings of the experiment."""

    experiment = "guide"

    config: EdgeConfig
    source: CloudSpec | StoredAnswers
    guidance_tokens: tuple[int, ...]
    num_parallel: int
    """Edge answers at once."""

    def identity(self) -> dict[str, object]:
        return {
            "cloud": self.source.model,
            "guidance_tokens": list(self.guidance_tokens),
            "max_answer_tokens": self.config.max_tokens,
        }

    def units(self, items: Sequence[Item]) -> list[Unit]:
        names = [CLOUD, EDGE, *map(str, self.guidance_tokens)]
        return [Unit(f"{item.id}|{name}", item, {"setting": name}) for item in items for name in names]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Examine]:
        async with AsyncExitStack() as stack:
            resolved = resolve(self.config.model, Registry.load())
            edge = await asyncio.to_thread(load_batch_edge, resolved, self.config, self.num_parallel)
            stack.push_async_callback(edge.close)
            source: Source
            if isinstance(self.source, StoredAnswers):
                source = _Stored(self.source.folder, edge)
            else:
                cloud = CloudAnswers(
                    await stack.enter_async_context(connect(self.source, self.config)),
                    model=self.source.model,
                    num_streams=self.source.num_streams,
                    patience_s=self.source.patience_s,
                )
                source = _Asked(cloud, self.config.max_tokens)
            yield _Examiner(self, edge, source).rows


class Source(Protocol):
    async def by_cloud(self, items: Sequence[Item]) -> Mapping[str, Answered]:
        """The target's whole answers by item, with their pieces."""

    def by_edge(self, item: Item) -> Answered | None:
        """The edge's answer where it is known already."""


class _Asked:
    def __init__(self, cloud: CloudAnswers, max_tokens: int) -> None:
        self._cloud = cloud
        self._max_tokens = max_tokens

    async def by_cloud(self, items: Sequence[Item]) -> Mapping[str, Answered]:
        made = await asyncio.gather(
            *(self._cloud.answer(request_text(item), self._max_tokens) for item in items)
        )
        return {item.id: answered for item, answered in zip(items, made, strict=True)}

    def by_edge(self, item: Item) -> Answered | None:
        return None


class _Stored:
    """Texts are cut by the edge model's tokens, for those of the target are not stored."""

    def __init__(self, folder: Path, edge: EdgeModel) -> None:
        _, rows = read_run(folder)
        self._rows = {row["id"]: row for row in rows if row["edge"] and row["cloud"]}
        self._edge = edge

    async def by_cloud(self, items: Sequence[Item]) -> Mapping[str, Answered]:
        if absent := [item.id for item in items if item.id not in self._rows]:
            raise InvalidRequest(f"the run of --answers has no answers to {absent[0]}")
        return {item.id: self._answered(self._rows[item.id]["cloud"]) for item in items}

    def by_edge(self, item: Item) -> Answered | None:
        return self._answered(self._rows[item.id]["edge"])

    def _answered(self, stored: Row) -> Answered:
        model = self._edge.model
        pieces = map(model.piece, model.tokenize(stored["text"], special=False))
        return Answered(stored["text"], stored["tokens"], stored["censored"], pieces=tuple(pieces))


class _Examiner:
    def __init__(self, plan: GuidePlan, edge: EdgeModel, source: Source) -> None:
        self._plan = plan
        self._edge = edge
        self._source = source
        by_bytes = ByteTokenizer(edge.model.vocabulary)
        self._tokens_of: Callable[[bytes], list[int]] = lambda text: tokens_of(
            text, by_bytes, lambda run: edge.model.tokenize(run, special=False)
        )

    async def rows(self, units: Sequence[Unit]) -> AsyncGenerator[Row, None]:
        items = {unit.item.id: unit.item for unit in units}
        by_cloud = await self._source.by_cloud(list(items.values()))
        by_id = {unit.id: unit for unit in units}
        jobs = []
        for unit in units:
            target = by_cloud[unit.item.id]
            num_guidance = _num_guidance(unit, target)
            by_edge = None if num_guidance else self._source.by_edge(unit.item)
            if num_guidance >= target.num_tokens:
                yield self._row(unit, target, b"", target)
            elif by_edge is not None:
                yield self._row(unit, target, b"", by_edge)
            else:
                jobs.append(self._job(unit, target, num_guidance))
        async with aclosing(answers(self._edge, jobs)) as answered:
            async for job, rest in answered:
                unit = by_id[job.key]
                target = by_cloud[unit.item.id]
                begun = b"".join(target.pieces[: _num_guidance(unit, target)])
                yield self._row(unit, target, begun, rest)

    def _job(self, unit: Unit, target: Answered, num_guidance: int) -> Job:
        model = self._edge.model
        prompt = model.render_chat([Message("user", request_text(unit.item))])
        begun = self._tokens_of(b"".join(target.pieces[:num_guidance]))
        return Job(unit.id, (*prompt, *begun), self._plan.config.max_tokens - num_guidance)

    def _row(self, unit: Unit, target: Answered, begun: bytes, rest: Answered) -> Row:
        text = (begun + b"".join(rest.pieces)).decode("utf-8", "replace")
        by_target = min(_num_guidance(unit, target), target.num_tokens)
        return {
            "id": unit.id,
            "item": unit.item.id,
            "group": unit.item.group,
            "setting": unit.condition["setting"],
            "correct": is_right(unit.item, text),
            "text": text,
            "target_tokens": by_target,
            "edge_tokens": 0 if rest is target else rest.num_tokens,
            "censored": rest.censored,
        }


def _num_guidance(unit: Unit, target: Answered) -> int:
    setting = str(unit.condition["setting"])
    if setting == CLOUD:
        return target.num_tokens
    return 0 if setting == EDGE else int(setting)
