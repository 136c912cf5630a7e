"""The routing experiment: what the probes say of each question, and who answers it rightly."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

import numpy as np

from edge_agent.edge_model import EdgeModel
from edge_agent.evaluation.batch import Answered, Job, answers, load_batch_edge
from edge_agent.evaluation.cloud_answers import CloudAnswers
from edge_agent.evaluation.grading import extract, is_right
from edge_agent.evaluation.items import Item, Kind
from edge_agent.evaluation.plan import Examine, Unit
from edge_agent.evaluation.runs import Row
from edge_agent.remote import Cloud
from edge_agent.routing.probes import Probe, Question, Reading, Said, cheap_features
from edge_agent.routing.reading import QuestionReader
from edge_agent.routing.router import probes_named, templates_folder
from edge_agent.routing.template import templates_sha256
from shared.config import EdgeConfig
from shared.messages import Message
from shared.models import Registry, resolve

LETTER_REQUEST = "Reply with the letter of the right option."
MAX_LETTER_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSpec:
    """The service whose answers are compared."""

    address: str
    model: str
    """What it served when the run began."""
    num_streams: int
    patience_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Settings of the experiment."""

    experiment = "routing"

    config: EdgeConfig
    probes: tuple[str, ...]
    num_parallel: int
    """Edge answers at once."""
    answer: bool
    """Without, only the probes run: for labels of other pairs."""
    cloud: CloudSpec | None

    def identity(self) -> dict[str, object]:
        return {
            "probes": list(self.probes),
            "prompts_sha256": templates_sha256(templates_folder(self.config)),
            "letter_request_sha256": hashlib.sha256(LETTER_REQUEST.encode()).hexdigest(),
            "max_answer_tokens": self.config.max_tokens,
            "answer": self.answer,
            "cloud": self.cloud.model if self.cloud else None,
        }

    def units(self, items: Sequence[Item]) -> list[Unit]:
        return [Unit(item.id, item) for item in items]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Examine]:
        async with AsyncExitStack() as stack:
            resolved = resolve(self.config.model, Registry.load())
            edge = await asyncio.to_thread(load_batch_edge, resolved, self.config, self.num_parallel)
            stack.push_async_callback(edge.close)
            cloud = None
            if self.cloud is not None:
                cloud = CloudAnswers(
                    await stack.enter_async_context(connect(self.cloud, self.config)),
                    model=self.cloud.model,
                    num_streams=self.cloud.num_streams,
                    patience_s=self.cloud.patience_s,
                )
            probes = probes_named(self.probes, templates_folder(self.config))
            yield _Examiner(self, edge, cloud, probes).rows


def connect(spec: CloudSpec, config: EdgeConfig) -> Cloud:
    return Cloud.of(config, spec.address)


def request_text(item: Item) -> str:
    """The question as it is asked for an answer in words."""
    return f"{item.question}\n\n{LETTER_REQUEST}" if item.kind is Kind.CHOICE else item.question


def limit_tokens(item: Item, config: EdgeConfig) -> int:
    return min(MAX_LETTER_TOKENS, config.max_tokens) if item.kind is Kind.CHOICE else config.max_tokens


@dataclass(frozen=True, slots=True)
class _Read:
    question: Question
    readings: list[Reading]
    num_evaluated: int
    """Tokens, and seconds, of the probes that read one token each."""
    seconds: float


class _Examiner:
    def __init__(
        self, plan: RoutingPlan, edge: EdgeModel, cloud: CloudAnswers | None, probes: Sequence[Probe]
    ) -> None:
        self._plan = plan
        self._edge = edge
        self._cloud = cloud
        self._asked = [probe for probe in probes if probe.max_words == 0]
        self._writing = [probe for probe in probes if probe.max_words > 0]
        self._estimates = {probe.name: probe.estimates for probe in probes}
        self._reader = QuestionReader(edge, {})

    async def rows(self, units: Sequence[Unit]) -> AsyncGenerator[Row, None]:
        if not self._plan.answer and not self._writing:  # nothing is written side by side: a row at a time
            for unit in units:
                yield self._row(unit.item, await self._read(unit.item), None, None)
            return
        by_cloud = {unit.id: asyncio.create_task(self._ask_cloud(unit.item)) for unit in units}
        try:
            read = {unit.id: await self._read(unit.item) for unit in units}
            await self._let_write(read)
            by_id = {unit.id: unit for unit in units}
            if not self._plan.answer:
                for unit in units:
                    yield self._row(unit.item, read[unit.id], None, None)
                return
            jobs = [self._job(unit) for unit in units]
            async with aclosing(answers(self._edge, jobs)) as answered:
                async for job, answer in answered:
                    item = by_id[job.key].item
                    yield self._row(item, read[job.key], answer, await by_cloud[job.key])
        finally:
            for task in by_cloud.values():
                task.cancel()
            await asyncio.gather(*by_cloud.values(), return_exceptions=True)

    async def _ask_cloud(self, item: Item) -> Answered | None:
        if self._cloud is None:
            return None
        return await self._cloud.answer(request_text(item), limit_tokens(item, self._plan.config))

    def _job(self, unit: Unit) -> Job:
        question = self._reader.question([Message("user", request_text(unit.item))])
        return Job(unit.id, question.token_ids, limit_tokens(unit.item, self._plan.config))

    async def _read(self, item: Item) -> _Read:
        def work() -> _Read:
            began = time.monotonic()
            before = self._edge.context.num_decoded_tokens
            question = self._reader.question([Message("user", item.question)])
            readings = self._reader.read(question, self._asked, answer_follows=False)
            evaluated = self._edge.context.num_decoded_tokens - before
            return _Read(question, readings, evaluated, time.monotonic() - began)

        return await self._edge.run(work)

    async def _let_write(self, read: Mapping[str, _Read]) -> None:
        """Add the readings of probes that let the model write: the texts of all questions side by side."""
        asked = {
            f"{number}|{key}": (probe, one)
            for number, probe in enumerate(self._writing)
            for key, one in read.items()
            if probe.applies(one.question)
        }
        jobs = [
            Job(key, tuple(self._reader.prompt(one.question, probe)), probe.max_words)
            for key, (probe, one) in asked.items()
        ]
        async with aclosing(answers(self._edge, jobs)) as written:
            async for job, answer in written:
                probe, one = asked[job.key]
                said = Said(np.empty(0), answer.text, answer.logprobs)
                one.readings.append(probe.read(self._edge.model, one.question, said, None))

    def _row(self, item: Item, read: _Read, edge: Answered | None, cloud: Answered | None) -> Row:
        features = cheap_features(read.question)
        for reading in read.readings:
            features |= reading.features
        return {
            "id": item.id,
            "kind": item.kind.value,
            "group": item.group,
            "level": item.level,
            "prompt_tokens": len(read.question.token_ids),
            "prompt_chars": len(item.question),
            "is_cut": read.question.is_cut,
            "features": _rounded(features),
            "values": {r.probe: None if r.value is None else round(r.value, 5) for r in read.readings},
            "distributions": {r.probe: _rounded(r.distribution) for r in read.readings if r.distribution},
            "texts": {r.probe: r.text for r in read.readings if r.text is not None},
            "estimates": {r.probe: self._estimates[r.probe] for r in read.readings},
            "edge": None if edge is None else self._edge_answer(item, edge, read.readings),
            "cloud": None if cloud is None else graded(item, cloud),
            "labels": dict(item.labels),
            "num_evaluated": read.num_evaluated,
            "seconds": round(read.seconds, 4),
        }

    def _edge_answer(self, item: Item, answered: Answered, readings: Sequence[Reading]) -> Row:
        """Multiple choice counts by letter, with the words beside it; where a cloud sends words, by words."""
        in_words = graded(item, answered)
        letter = by_letter(item, readings)
        if letter is None:
            return in_words
        if self._cloud is not None:
            return {**in_words, "letter_correct": letter["correct"], "letter_answer": letter["answer"]}
        return {
            **in_words,
            **letter,
            "text_correct": in_words["correct"],
            "text_answer": in_words["answer"],
        }


def graded(item: Item, answered: Answered) -> Row:
    """What an answer in words was worth. Multiple choice keeps the letter, a longer answer its course."""
    row: Row = {
        "correct": is_right(item, answered.text),
        "answer": extract(item, answered.text),
        "by": "text",
        "text": answered.text,
        "tokens": answered.num_tokens,
        "words": len(answered.text.split()),
        "censored": answered.censored,
    }
    if answered.logprobs and item.kind is not Kind.CHOICE:
        row["logprobs"] = [round(logprob, 3) for logprob in answered.logprobs]
    return row


def by_letter(item: Item, readings: Sequence[Reading]) -> Row | None:
    """A multiple-choice question answered by the likeliest letter; None for any other."""
    letters = next((r.distribution for r in readings if r.probe == "letters"), None)
    if item.kind is not Kind.CHOICE or not letters:
        return None
    letter = max(letters, key=letters.__getitem__)
    return {"correct": letter == item.answer, "answer": letter, "by": "letter"}


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in numbers.items()}
