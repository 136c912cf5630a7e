"""The length experiment: how long the edge model's answers are, and what it says of that beforehand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from edge_agent.edge_model import EdgeModel
from edge_agent.evaluation.batch import Answered, Job, answers, load_batch_edge
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item
from edge_agent.evaluation.plan import Examine, Unit
from edge_agent.evaluation.runs import Row
from edge_agent.routing.probes import cheap_features
from edge_agent.routing.reading import QuestionReader
from edge_agent.routing.router import probes_named, templates_folder
from edge_agent.routing.template import load_template, templates_sha256
from edge_agent.routing.verdicts import parse_num_words
from shared.config import EdgeConfig
from shared.messages import Message
from shared.models import Registry, resolve
from shared.sampling import Sampling

PLAIN = "plain"
FIRST_LINE = "words-first-line"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPlan:
    """Settings of the experiment: every question plain and with the length prompt, at each temperature.

    At a temperature above 0 each is asked `num_samples` times, which shows how much the model's own
    sampling leaves to chance.
    """

    experiment = "length"

    config: EdgeConfig
    probes: tuple[str, ...]
    num_parallel: int
    temperatures: tuple[float, ...]
    num_samples: int

    def identity(self) -> dict[str, object]:
        return {
            "probes": list(self.probes),
            "prompts_sha256": templates_sha256(templates_folder(self.config)),
            "max_answer_tokens": self.config.max_tokens,
            "temperatures": list(self.temperatures),
            "samples": self.num_samples,
        }

    def units(self, items: Sequence[Item]) -> list[Unit]:
        return [
            Unit(
                f"{item.id}|{prompt}|{temperature:g}|{seed}",
                item,
                {"prompt": prompt, "temperature": temperature, "seed": seed},
            )
            for item in items
            for prompt in (PLAIN, FIRST_LINE)
            for temperature in self.temperatures
            for seed in range(self.num_samples if temperature > 0 else 1)
        ]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Examine]:
        resolved = resolve(self.config.model, Registry.load())
        edge = await asyncio.to_thread(load_batch_edge, resolved, self.config, self.num_parallel)
        try:
            yield _Examiner(self, edge).rows
        finally:
            await edge.close()


class _Examiner:
    def __init__(self, plan: LengthPlan, edge: EdgeModel) -> None:
        self._plan = plan
        self._edge = edge
        folder = templates_folder(plan.config)
        self._probes = probes_named(plan.probes, folder)
        self._first_line = load_template(FIRST_LINE, folder)
        self._reader = QuestionReader(edge, {})
        self._read: dict[str, Row] = {}

    async def rows(self, units: Sequence[Unit]) -> AsyncGenerator[Row, None]:
        for unit in units:
            if unit.item.id not in self._read:
                self._read[unit.item.id] = await self._edge.run(partial(self._probe, unit.item))
        by_id = {unit.id: unit for unit in units}
        async with aclosing(answers(self._edge, [self._job(unit) for unit in units])) as answered:
            async for job, answer in answered:
                yield self._row(by_id[job.key], answer)

    def _probe(self, item: Item) -> Row:
        question = self._reader.question([Message("user", item.question)])
        readings = self._reader.read(question, self._probes, answer_follows=False)
        features = cheap_features(question)
        for reading in readings:
            features |= reading.features
        return {
            "prompt_tokens": len(question.token_ids),
            "features": {name: round(value, 5) for name, value in features.items()},
            "values": {r.probe: r.value for r in readings},
            "estimates": {probe.name: probe.estimates for probe in self._probes},
            "distributions": {
                r.probe: {option: round(p, 5) for option, p in r.distribution.items()} for r in readings
            },
        }

    def _job(self, unit: Unit) -> Job:
        text = unit.item.question
        if unit.condition["prompt"] == FIRST_LINE:
            text = self._first_line.with_question(text)
        question = self._reader.question([Message("user", text)])
        temperature, seed = unit.condition["temperature"], unit.condition["seed"]
        assert isinstance(temperature, float)
        assert isinstance(seed, int)
        sampling = Sampling(temperature=temperature)
        return Job(unit.id, question.token_ids, self._plan.config.max_tokens, sampling, seed)

    def _row(self, unit: Unit, answered: Answered) -> Row:
        text, tokens, predicted = answered.text, answered.num_tokens, None
        if unit.condition["prompt"] == FIRST_LINE:
            predicted = parse_num_words(text)
            first, _, rest = text.partition("\n")
            if rest:
                text = rest
                tokens -= len(self._edge.model.tokenize(f"{first}\n"))
        return {
            "id": unit.id,
            "item": unit.item.id,
            "kind": unit.item.kind.value,
            "group": unit.item.group,
            **unit.condition,
            "tokens": max(tokens, 0),
            "words": len(text.split()),
            "censored": answered.censored,
            "correct": is_right(unit.item, text),
            "predicted_words": predicted,
            **self._read[unit.item.id],
        }
