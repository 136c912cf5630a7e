"""The router: asks the edge model about a question, and decides with `shared.routing`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isnan
from pathlib import Path

import numpy as np

from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud
from edge_agent.routing.calibration import Calibration, find_calibration
from edge_agent.routing.probes import (
    NO_CONTENT,
    Probe,
    Question,
    Reading,
    all_probes,
    cheap_features,
    default_probes,
    multiple_choice,
)
from edge_agent.routing.reading import Priors, QuestionReader
from shared.config import EdgeConfig
from shared.errors import CloudError, InvalidSetting
from shared.messages import Message
from shared.routing import Decision, Limits, Link, Route, decide

UNCALIBRATED_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Routing:
    """A decision, and the link that it saw."""

    decision: Decision
    link: Link


class Router:
    """Decides who answers. Holds what stays the same between questions."""

    def __init__(
        self,
        edge: EdgeModel,
        cloud: Cloud,
        config: EdgeConfig,
        *,
        probes: Sequence[Probe],
        calibration: Calibration | None,
    ) -> None:
        self._edge = edge
        self._cloud = cloud
        self._config = config
        self.probes = probes
        self._calibration = calibration
        priors = {} if calibration is None else calibration.priors
        self._priors = {key: np.array(prior) for key, prior in priors.items()}
        self._limits = limits_of(config, calibration)

    async def route(
        self, messages: Sequence[Message], private: str | None, *, edge: EdgeModel | None = None
    ) -> Routing:
        """Read the question and decide. A private one opens no connection.

        Args:
            private: why the chat must not leave the device, if it must not.
            edge: the model as the request holds it.
        """
        link_task = asyncio.create_task(self._link(private))
        try:
            question, readings = await self._read(messages, edge or self._edge)
            link = await link_task
        finally:
            link_task.cancel()
        features = cheap_features(question) | {k: v for r in readings for k, v in r.features.items()}
        room = self._edge.context.context_tokens - len(question.token_ids)
        decision = decide(
            p_cloud=self._p_cloud(features, readings),
            predicted_tokens=self._predicted_tokens(features, readings),
            link=link,
            private=private,
            fits_edge=not question.is_cut and room > 0,
            can_draft=self._edge.can_draft,
            limits=self._limits,
        )
        decision = replace(
            decision,
            reasons=(*decision.reasons, *self._remarks(question)),
            probes={reading.probe: _shown(reading) for reading in readings},
        )
        return Routing(decision, link)

    async def _read(self, messages: Sequence[Message], edge: EdgeModel) -> tuple[Question, list[Reading]]:
        reader = QuestionReader(edge, self._priors)
        question = await edge.run(lambda: reader.question(messages))
        await edge.read(question.token_ids)
        return question, await edge.run(lambda: reader.read(question, self.probes))

    async def _link(self, private: str | None) -> Link:
        return Link(up=False, detail="not asked") if private is not None else await link_to(self._cloud)

    def _p_cloud(self, features: dict[str, float], readings: list[Reading]) -> float:
        if self._calibration is not None:
            return self._calibration.p_cloud(features)
        values = [r.value for p, r in self._by_probe(readings) if p.estimates == "difficulty"]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else UNCALIBRATED_THRESHOLD

    def _predicted_tokens(self, features: dict[str, float], readings: list[Reading]) -> int:
        if self._calibration is not None and self._calibration.length is not None:
            tokens = self._calibration.length.tokens(features)
        else:
            lengths = [r.value for p, r in self._by_probe(readings) if p.estimates == "length"]
            tokens = next((value for value in lengths if value is not None), self._config.max_tokens)
        most = self._config.max_tokens
        return most if isnan(tokens) else round(max(1, min(most, tokens)))

    def _by_probe(self, readings: list[Reading]) -> list[tuple[Probe, Reading]]:
        by_name = {probe.name: probe for probe in self.probes}
        return [(by_name[reading.probe], reading) for reading in readings]

    def _remarks(self, question: Question) -> list[str]:
        remarks = []
        if question.is_cut:
            remarks.append(
                "only the question's head and tail were read: it is longer than the edge's context"
            )
        if self._calibration is None:
            remarks.append(f"{self._edge.model.name} has no calibration: the probability is a plain mean")
        return remarks


def limits_of(config: EdgeConfig, calibration: Calibration | None) -> Limits:
    """What the settings allow, with the calibration's threshold where they name none."""
    threshold = config.cloud_threshold
    if threshold is None:
        threshold = calibration.threshold if calibration else UNCALIBRATED_THRESHOLD
    return Limits(
        threshold=threshold,
        slow_rtt_s=inf if config.slow_rtt_ms is None else config.slow_rtt_ms / 1e3,
        price_per_1k_tokens=config.cloud_price,
        max_price=config.max_price,
        guidance_tokens=config.guidance_tokens,
    )


async def link_to(cloud: Cloud) -> Link:
    """The way to a cloud as it is now."""
    try:
        return Link(up=True, rtt_s=await cloud.ping())
    except CloudError as error:
        return Link(up=False, detail=str(error))


def load_router(
    edge: EdgeModel, cloud: Cloud, config: EdgeConfig, sha256: Callable[[], str], *, every: bool = False
) -> Router:
    """A router with the probes and the calibration that the settings name.

    Args:
        sha256: of the edge model's file; asked only where a calibration has to be checked.
        every: ask all probes, not only those that decide.
    Raises:
        InvalidSetting: a template or the calibration cannot be used.
    """
    folder = templates_folder(config)
    named = Path(config.routing_calibration).expanduser() if config.routing_calibration else None
    calibration = find_calibration(edge.model.name, sha256, named)
    ratio = calibration.tokens_per_word if calibration else None
    return Router(
        edge,
        cloud,
        config,
        probes=all_probes(folder, ratio) if every else default_probes(folder),
        calibration=calibration,
    )


@dataclass(frozen=True, slots=True)
class WithoutContent:
    """What the deciding probes say to questions without content."""

    priors: dict[str, list[float]]
    """Of each probe's options, nats."""
    features: frozenset[str]
    """Names of everything that `auto` reads of a question."""


async def read_without_content(edge: EdgeModel, config: EdgeConfig) -> WithoutContent:
    """Ask the deciding probes about nothing: a calibration keeps the priors, and fits on these features."""
    probes = default_probes(templates_folder(config))
    priors: Priors = {}
    features: set[str] = set()
    reader = QuestionReader(edge, priors)

    def work() -> None:
        for content in (NO_CONTENT, *(multiple_choice(NO_CONTENT, [NO_CONTENT] * n) for n in range(2, 6))):
            question = reader.question([Message("user", content)])
            features.update(cheap_features(question))
            for reading in reader.read(question, probes):
                features.update(reading.features)

    await edge.run(work)
    return WithoutContent(
        {key: [float(x) for x in prior] for key, prior in priors.items()}, frozenset(features)
    )


def probes_named(names: Sequence[str], folder: Path | None = None) -> list[Probe]:
    """The probes of these names, in this order.

    Raises:
        InvalidSetting: there is none of a name; lists those that exist.
    """
    known = {probe.name: probe for probe in all_probes(folder)}
    if unknown := [name for name in names if name not in known]:
        raise InvalidSetting(f"no probe is called {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def templates_folder(config: EdgeConfig) -> Path | None:
    """The user's own prompts, if any."""
    return Path(config.routing_templates).expanduser() if config.routing_templates else None


def _shown(reading: Reading) -> dict[str, object]:
    shown = asdict(replace(reading, features=dict(reading.features), distribution=dict(reading.distribution)))
    del shown["probe"], shown["features"]
    return {name: value for name, value in shown.items() if name == "value" or value}


def moved_by_doubt(decision: Decision, num_shown: int) -> Decision:
    """The same decision after late evidence moved a running answer to the cloud's verification."""
    why = f"late evidence: the edge became unsure after {num_shown} tokens that stand"
    return replace(decision, route=Route.SPECULATE, reasons=(*decision.reasons, why))
