"""The router on the tiny pair: what it costs, what it sends, and how a running answer changes hands."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.edge_model import PROBE_SEQUENCES, EdgeModel
from edge_agent.routing.calibration import Calibration
from edge_agent.routing.probes import Said, all_probes, default_probes
from edge_agent.routing.reading import QuestionReader
from edge_agent.routing.router import load_router
from edge_agent.routing.words import sample_ratio
from shared.config import EdgeConfig
from shared.errors import EXIT_INTERRUPTED, TABLE, DuetError, InvalidRequest, InvalidSetting
from shared.events import Answer, Event, Notice, Text
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.messages import Message, Open
from shared.models import file_sha256
from shared.routing import WATCH_TOKENS
from shared.sampling import Sampling
from shared.session import Origin
from tests.service import (
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    in_process_cloud,
    loaded_edge,
    run_duet,
    started_ask,
)
from tests.tiny_pair import TARGET_SEED, TinyPair, write_hybrid_gguf, write_tiny_model
from tests.wiretap import wiretap

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."
CHOICES = "Which is a fruit?\nA. apple\nB. stone\nC. river\nD. chair"
MAX_TOKENS = 40


# Reading the question


@pytest.fixture
async def edge(tiny_pair: TinyPair) -> AsyncIterator[EdgeModel]:
    async with loaded_edge(tiny_pair.draft_gguf) as model:
        yield model


async def test_the_question_is_read_once_whatever_the_number_of_probes(edge: EdgeModel) -> None:
    reader = QuestionReader(edge, {})
    question = reader.question([Message("user", CHOICES)])
    reader.read(question, default_probes())  # measures the priors
    edge.context.align(0, [])
    before = edge.context.num_decoded_tokens
    readings = reader.read(question, default_probes())
    suffixes = sum(
        len(probe.prompt(edge.model, question)) - len(question.token_ids) for probe in default_probes()
    )
    assert edge.context.num_decoded_tokens - before == len(question.token_ids) + suffixes
    assert [reading.probe for reading in readings] == ["confidence", "letters", "who", "rating", "bins"]


async def test_the_answer_finds_its_prompt_already_read(edge: EdgeModel) -> None:
    for probes in (default_probes(), all_probes()):
        reader = QuestionReader(edge, {})
        question = reader.question([Message("user", QUESTION)])
        reader.read(question, probes)
        assert edge.context.cached[0] == list(question.token_ids)


async def test_probes_in_one_batch_read_what_each_reads_alone(tiny_pair: TinyPair, edge: EdgeModel) -> None:
    question = QuestionReader(edge, {}).question([Message("user", CHOICES)])
    together = QuestionReader(edge, {}).read(question, default_probes())
    for probe, reading in zip(default_probes(), together, strict=True):
        edge.context.align(0, [])
        [alone] = QuestionReader(edge, {}).read(question, [probe])
        assert alone.value == pytest.approx(reading.value, rel=0.02)  # the cache is f16


async def test_a_prior_is_measured_once(edge: EdgeModel) -> None:
    priors: dict[str, np.ndarray] = {}
    reader = QuestionReader(edge, priors)
    reader.read(reader.question([Message("user", CHOICES)]), default_probes())
    assert set(priors) == {"letters/4", "who/2", "rating/5"}
    assert all(np.exp(prior).sum() == pytest.approx(1.0) for prior in priors.values())


async def test_letters_are_asked_only_of_a_multiple_choice_question(edge: EdgeModel) -> None:
    reader = QuestionReader(edge, {})
    names = [r.probe for r in reader.read(reader.question([Message("user", QUESTION)]), default_probes())]
    assert "letters" not in names


def test_a_copied_prefix_costs_nothing_and_reads_alike(tiny_pair: TinyPair) -> None:
    model = LlamaModel(tiny_pair.draft_gguf, "draft")
    with LlamaContext(
        model, num_sequences=3, context_tokens=64, rollback_tokens=0, threads=1, cache_type="f32"
    ) as context:
        text, tail = list(range(60, 90)), [50, 51]
        context.extend(0, text, 0)
        before = context.num_decoded_tokens
        context.copy_prefix(0, 1, 20)
        context.copy_prefix(0, 2, 30)
        assert context.num_decoded_tokens == before
        one, two = context.decode([Extension(1, tail, 1), Extension(2, tail, 1)])
        branched = one[0].copy(), two[0].copy()
        for kept, row in zip((20, 30), branched, strict=True):
            context.align(0, [])
            np.testing.assert_allclose(context.extend(0, text[:kept] + tail, 1)[0], row, atol=1e-4)
        with pytest.raises(ValueError, match="holds"):
            context.copy_prefix(0, 1, 99)
        with pytest.raises(ValueError, match="nothing to decode"):
            context.extend(0, [], 1)
    model.close()


# A hybrid edge model, whose recurrent state cannot be rolled back


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "hybrid.gguf"
    write_hybrid_gguf(path)
    return path


@asynccontextmanager
async def exact_edge(path: Path) -> AsyncIterator[EdgeModel]:
    """As `duet` loads a model that cannot roll back, but in float32."""
    model = LlamaModel(path, path.stem)
    context = LlamaContext(
        model,
        num_sequences=1 + PROBE_SEQUENCES,
        context_tokens=1024,
        rollback_tokens=0,
        max_rows=1,
        threads=1,
        cache_type="f32",
    )
    edge = EdgeModel(model, context, can_draft=False)
    try:
        yield edge
    finally:
        await edge.close()


async def test_a_hybrid_reads_in_turn_what_a_fresh_context_reads(hybrid: Path) -> None:
    probes = all_probes()
    async with exact_edge(hybrid) as edge:
        priors: dict[str, np.ndarray] = {}
        reader = QuestionReader(edge, priors)
        question = reader.question([Message("user", CHOICES)])
        reader.read(reader.question([Message("user", QUESTION)]), probes)  # leaves another question behind
        readings = reader.read(question, probes)
        probes = [probe for probe in probes if probe.applies(question)]
        assert edge.context.cached[0] == list(question.token_ids)
        ahead = edge.context.extend(0, [65], 1)[0].copy()
    assert len(readings) == len(probes)
    for probe, reading in zip(probes, readings, strict=True):
        async with exact_edge(hybrid) as fresh:
            if probe.max_words:
                [alone] = QuestionReader(fresh, {}).read(question, [probe])
            else:
                row = fresh.context.extend(0, probe.prompt(fresh.model, question), 1)[0].astype(np.float64)
                said = Said(row - np.logaddexp.reduce(row))
                prior = priors.get(f"{probe.name}/{len(reading.distribution)}")
                alone = probe.read(fresh.model, question, said, prior)
        assert alone.text == reading.text
        assert alone.features == pytest.approx(reading.features, abs=1e-5)
        assert alone.distribution == pytest.approx(reading.distribution, abs=1e-5)
    async with exact_edge(hybrid) as fresh:
        row = fresh.context.extend(0, [*question.token_ids, 65], 1)[0]
        np.testing.assert_allclose(ahead, row, atol=1e-4)


async def test_a_hybrid_answers_what_it_answers_in_mode_local(hybrid: Path, service: InProcessCloud) -> None:
    alone = await ask(hybrid, service.address, mode="local")
    asked = await ask(hybrid, service.address, cloud_threshold=1.0, doubt_threshold=1.0)
    assert asked.answer.mode == "local"  # doubt cannot move it: it cannot draft
    assert asked.answer.tokens == alone.answer.tokens
    assert asked.notices == []


async def test_a_hard_question_to_a_hybrid_gets_the_clouds_own_stream(
    tiny_pair: TinyPair, hybrid: Path, service: InProcessCloud
) -> None:
    asked = await ask(hybrid, service.address, cloud_threshold=0.0)
    assert asked.answer.mode == "cloud"
    assert asked.answer.decision is not None
    assert "cannot roll back" in asked.answer.decision.reasons[-2]
    alone = TargetAlone(tiny_pair.target_gguf)
    assert [token.id for token in asked.answer.tokens] == alone.complete(request())
    alone.close()


# Routes


@dataclass
class Asked:
    answer: Answer
    events: list[Event]

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]

    @property
    def shown(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))


async def ask(model: Path, address: str, question: str = QUESTION, **settings: object) -> Asked:
    raw = {"threads": 1, "context_tokens": 512, "max_tokens": MAX_TOKENS, "seed": 11, "cloud": address}
    config = EdgeConfig.model_validate(raw | settings)
    edge = await EdgeModel.load(model, model.stem, config)
    try:
        async with connection(config.cloud) as cloud:
            router = load_router(edge, cloud, config, lambda: "")
            events = [e async for e in Agent(config, edge=edge, cloud=cloud, router=router).ask(question)]
    finally:
        await edge.close()
    assert isinstance(events[-1], Answer)
    return Asked(events[-1], events)


def request() -> Open:
    return Open(prompt=(Message("user", QUESTION),), sampling=Sampling(), seed=11, max_tokens=MAX_TOKENS)


@pytest.fixture
async def service(tiny_pair: TinyPair) -> AsyncIterator[InProcessCloud]:
    async with in_process_cloud(tiny_pair.target_gguf) as cloud:
        yield cloud


async def test_a_hard_question_gets_the_targets_own_text(
    tiny_pair: TinyPair, service: InProcessCloud
) -> None:
    asked = await ask(tiny_pair.draft_gguf, service.address, cloud_threshold=0.0)
    alone = TargetAlone(tiny_pair.target_gguf)
    assert [token.id for token in asked.answer.tokens] == alone.complete(request())
    alone.close()
    assert asked.answer.mode == "speculate"
    assert asked.answer.decision is not None
    assert asked.answer.decision.route == "speculate"


async def test_an_easy_question_is_answered_here(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    asked = await ask(tiny_pair.draft_gguf, service.address, cloud_threshold=1.0, doubt_threshold=0.0)
    assert asked.answer.mode == "local"
    assert {token.origin for token in asked.answer.tokens} == {Origin.LOCAL}
    assert asked.notices == []


async def test_without_a_cloud_the_edge_answers_and_says_so(tiny_pair: TinyPair) -> None:
    asked = await ask(tiny_pair.draft_gguf, "127.0.0.1:1", cloud_threshold=0.0)
    assert asked.answer.mode == "local"
    assert asked.answer.completion_tokens > 0
    [notice] = asked.notices
    assert "127.0.0.1:1" in notice


async def test_a_cloud_of_another_vocabulary_verifies_translated_drafts(
    tmp_path: Path, service: InProcessCloud
) -> None:
    other = write_tiny_model(tmp_path, name="other", seed=TARGET_SEED, rotate_bytes_by=1).gguf
    asked = await ask(other, service.address, cloud_threshold=0.0)
    assert asked.answer.mode == "speculate"
    assert asked.notices == []


async def test_a_question_longer_than_the_edges_context_is_probed_at_head_and_tail(
    tiny_pair: TinyPair, service: InProcessCloud
) -> None:
    question = "word " * 60
    asked = await ask(tiny_pair.draft_gguf, service.address, question, context_tokens=128)
    assert asked.answer.mode == "cloud"
    assert asked.answer.decision is not None
    assert any("head and tail" in reason for reason in asked.answer.decision.reasons)


# Late evidence


async def test_doubt_moves_a_running_answer_to_the_cloud_and_keeps_what_stands(
    tiny_pair: TinyPair, service: InProcessCloud
) -> None:
    settings = {"cloud_threshold": 1.0, "max_tokens": MAX_TOKENS}
    local = await ask(tiny_pair.draft_gguf, service.address, doubt_threshold=0.0, **settings)
    moved = await ask(tiny_pair.draft_gguf, service.address, doubt_threshold=0.4, **settings)
    assert moved.answer.mode == "speculate"
    assert moved.answer.decision is not None
    assert any("late evidence" in reason for reason in moved.answer.decision.reasons)
    assert moved.shown == moved.answer.answer  # nothing that was shown was taken back

    origins = [token.origin for token in moved.answer.tokens]
    stands = origins.index(next(origin for origin in origins if origin is not Origin.LOCAL))
    assert Origin.LOCAL not in origins[stands:]
    ids = [token.id for token in moved.answer.tokens]
    assert ids[:stands] == [token.id for token in local.answer.tokens][:stands]

    # The rest is what the target alone writes after those tokens.
    alone = TargetAlone(tiny_pair.target_gguf)
    prompt = (*alone.model.render_chat([Message("user", QUESTION)]), *ids[:stands])
    rest = Open(prompt=prompt, sampling=Sampling(), seed=11, max_tokens=MAX_TOKENS - stands)
    assert ids[stands:] == alone.complete(rest)
    alone.close()


async def test_what_was_written_in_doubt_is_sent_as_the_first_draft(
    tiny_pair: TinyPair, service: InProcessCloud
) -> None:
    moved = await ask(
        tiny_pair.draft_gguf, service.address, cloud_threshold=1.0, doubt_threshold=1.0, max_draft_tokens=1
    )
    assert [token.origin for token in moved.answer.tokens].count(Origin.LOCAL) == 0
    # Later drafts are of one token: only the held ones make up for a first draft of a whole window.
    first_round = moved.answer.drafted_tokens - (moved.answer.rounds - 1)
    assert first_round >= WATCH_TOKENS - 1


async def test_doubt_without_help_goes_on_here_with_a_notice(tiny_pair: TinyPair, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path, name="other", seed=TARGET_SEED, rotate_bytes_by=1).gguf
    async with in_process_cloud(tiny_pair.target_gguf) as service:
        asked = await ask(other, service.address, cloud_threshold=1.0, doubt_threshold=1.0)
        alone = await ask(other, service.address, cloud_threshold=1.0, doubt_threshold=0.0)
    assert asked.answer.mode == "local"
    assert asked.answer.answer == alone.answer.answer
    assert any("unsure" in notice for notice in asked.notices)


# Ctrl-C


ENDLESS = {"DUET_CONTEXT_TOKENS": "65536", "DUET_MAX_TOKENS": "60000", "DUET_TEMPERATURE": "1"}


async def test_ctrl_c_while_probing_stops_at_once(tiny_pair: TinyPair, tmp_path: Path) -> None:
    async with (
        in_process_cloud(tiny_pair.target_gguf, slots=1, context_tokens=1024) as service,
        wiretap(service.address) as tap,
    ):
        duet = await started_ask(
            *("--model", str(tiny_pair.draft_gguf), "--cloud", tap.address),
            folder=tmp_path,
            env=ENDLESS | {"DUET_CLOUD_THRESHOLD": "0"},
            stdin=b"word " * 12_000,  # seconds to read
        )
        await eventually(lambda: tap.num_connections == 1)  # the link is asked while the question is read
        assert await interrupted(duet) == b""
        await eventually(lambda: service.is_idle, within_s=2.0)
        assert service.context.num_decoded_tokens == 0


async def test_ctrl_c_in_a_watched_local_answer_stops_at_once(tiny_pair: TinyPair, tmp_path: Path) -> None:
    async with in_process_cloud(tiny_pair.target_gguf, slots=1) as service:
        duet = await started_ask(
            *("--model", str(tiny_pair.draft_gguf), "--cloud", service.address, "--seed", "3", QUESTION),
            folder=tmp_path,
            env=ENDLESS | {"DUET_CLOUD_THRESHOLD": "1", "DUET_DOUBT_THRESHOLD": "1e-9"},
        )
        assert duet.stdout is not None
        assert await duet.stdout.read(1)
        await interrupted(duet)
        await eventually(lambda: service.is_idle, within_s=2.0)
        assert service.context.num_decoded_tokens == 0


async def test_ctrl_c_after_late_evidence_frees_the_slot(tiny_pair: TinyPair, tmp_path: Path) -> None:
    async with in_process_cloud(tiny_pair.target_gguf, slots=1, context_tokens=65536, step_s=0.1) as service:
        duet = await started_ask(
            *("--model", str(tiny_pair.draft_gguf), "--cloud", service.address, "--seed", "3", QUESTION),
            folder=tmp_path,
            env=ENDLESS | {"DUET_CLOUD_THRESHOLD": "1", "DUET_DOUBT_THRESHOLD": "0.4"},
        )
        await eventually(lambda: service.context.num_decoded_tokens > 100, within_s=60.0)  # some rounds
        assert service.target.num_free_slots == 0
        assert await interrupted(duet)
        await eventually(lambda: service.is_idle, within_s=2.0)


async def interrupted(duet: asyncio.subprocess.Process) -> bytes:
    """Ctrl-C: it ends within two seconds, silently, with no thread left that would hold it."""
    assert duet.returncode is None
    began = time.monotonic()
    duet.send_signal(signal.SIGINT)
    shown, said = await duet.communicate()
    assert time.monotonic() - began < 2.0
    assert duet.returncode == EXIT_INTERRUPTED
    assert said == b""
    return shown


# Privacy


EAGER = {"cloud_threshold": 0.0, "doubt_threshold": 1.0}
"""Settings that send all they may to the cloud."""


async def test_the_wiretap_sees_what_is_not_private(tiny_pair: TinyPair, service: InProcessCloud) -> None:
    async with wiretap(service.address) as tap:
        asked = await ask(tiny_pair.draft_gguf, tap.address, **EAGER)
    assert asked.answer.mode == "speculate"
    assert tap.num_connections == 1
    assert QUESTION.encode() in tap.received


@pytest.mark.parametrize(
    ("question", "settings"),
    [
        pytest.param(QUESTION, {"private": True}, id="the user says so"),
        pytest.param("About Nightjar", {"private_patterns": ("(?i)nightjar",)}, id="a pattern matches"),
        pytest.param("My key is AKIAIOSFODNN7EXAMPLE", {}, id="it holds a secret"),
        pytest.param("Mail jane@example.com", {}, id="it holds personal data"),
        pytest.param(
            QUESTION, {"system": "Call +49 170 1234567"}, id="the system prompt holds personal data"
        ),
    ],
)
async def test_of_a_private_prompt_not_a_byte_leaves_the_device(
    tiny_pair: TinyPair, service: InProcessCloud, question: str, settings: dict[str, object]
) -> None:
    async with wiretap(service.address) as tap:
        asked = await ask(tiny_pair.draft_gguf, tap.address, question, **EAGER, **settings)
    assert asked.answer.mode == "local"
    assert asked.answer.completion_tokens > 0
    assert asked.answer.decision is not None
    assert asked.answer.decision.reasons[0].startswith("private: ")
    assert (tap.num_connections, len(tap.received)) == (0, 0)
    assert service.servicer.num_streams == 0


@pytest.mark.parametrize("mode", ["cloud", "speculate"])
async def test_a_private_prompt_in_a_mode_that_sends_is_refused(
    tiny_pair: TinyPair, service: InProcessCloud, mode: str
) -> None:
    async with wiretap(service.address) as tap:
        with pytest.raises(InvalidRequest, match="private"):
            await ask(tiny_pair.draft_gguf, tap.address, private=True, mode=mode)
    assert (tap.num_connections, len(tap.received)) == (0, 0)


# Settings


async def test_a_template_without_its_placeholder_is_refused_by_name(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    (tmp_path / "who.txt").write_text('options: {"Yes": 1, "No": 0}\n---\nIs it hard? {answer}\n')
    with pytest.raises(InvalidSetting, match=r"who\.txt must hold \{question\} once"):
        await ask(tiny_pair.draft_gguf, "127.0.0.1:1", routing_templates=str(tmp_path))


async def test_a_template_of_the_user_replaces_the_shipped_one(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "who.txt").write_text('options: {"y": 1, "n": 0, "m": 0.5}\n---\n{question}Hard: {answer}\n')
    asked = await ask(tiny_pair.draft_gguf, "127.0.0.1:1", routing_templates=str(tmp_path))
    assert asked.answer.decision is not None
    assert set(asked.answer.decision.probes["who"]["distribution"]) == {"y", "n", "m"}


# The command


def test_route_explains_itself(tiny_pair: TinyPair, tmp_path: Path) -> None:
    arguments = ("--model", str(tiny_pair.draft_gguf), "--cloud", "127.0.0.1:1")
    env = {"DUET_CONTEXT_TOKENS": "1024", "DUET_THREADS": "1"}
    done = run_duet("route", QUESTION, "--all-probes", *arguments, folder=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert "route: local" in shown
    for name in ("ten-times", "who", "rating", "confidence", "who-few-shot", "words-first-line", "bins"):
        assert name in shown
    done = run_duet("route", QUESTION, "--json", *arguments, folder=tmp_path, env=env)
    found = json.loads(done.stdout)
    assert set(found) == {"route", "p_cloud", "predicted_tokens", "reasons", "probes"}
    assert found["route"] == "local"
    assert 0 <= found["p_cloud"] <= 1
    assert set(found["probes"]) == {"confidence", "who", "rating", "bins"}


def test_calibrate_fits_saves_and_is_used_for_this_model_only(tiny_pair: TinyPair, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"features": {"who": float(who)}, "edge_correct": bool(rng.uniform() > who)}
        for who in rng.uniform(size=200)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft, target = (("--model", str(path)) for path in (tiny_pair.draft_gguf, tiny_pair.target_gguf))
    env = {"DUET_CONTEXT_TOKENS": "512", "DUET_THREADS": "1"}
    done = run_duet(
        *("calibrate", "--results", "r.jsonl", "--cloud-share", "0.4", "--output", "c.yaml", *draft),
        folder=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    env |= {"DUET_ROUTING_CALIBRATION": "c.yaml", "DUET_CLOUD": "127.0.0.1:1"}
    found = json.loads(run_duet("route", QUESTION, "--json", *draft, folder=tmp_path, env=env).stdout)
    assert not any("no calibration" in reason for reason in found["reasons"])
    done = run_duet("route", QUESTION, *target, folder=tmp_path, env=env)
    assert done.returncode == TABLE[InvalidSetting].exit_code
    assert b"was made for draft, not for target" in done.stderr


async def test_a_calibration_for_another_tokenizer_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path, name="draft", seed=TARGET_SEED, rotate_bytes_by=1).gguf
    Calibration(
        model="draft",
        sha256=file_sha256(tiny_pair.draft_gguf),
        fitted_on="nothing",
        intercept=0.0,
        weights={},
        threshold=0.5,
        tokens_per_word=9.0,
    ).save(tmp_path / "c.yaml")
    config = EdgeConfig(routing_calibration=str(tmp_path / "c.yaml"))
    async with loaded_edge(other) as edge, connection("127.0.0.1:1") as cloud:
        assert edge.model.name == "draft"
        with pytest.raises(InvalidSetting, match=r"made for draft \(another file of this name\)"):
            load_router(edge, cloud, config, lambda: file_sha256(other), every=True)


@pytest.mark.parametrize("ratio", [None, 9.0])
async def test_words_count_by_the_calibration_in_force(
    tiny_pair: TinyPair, tmp_path: Path, ratio: float | None
) -> None:
    calibration = Calibration(
        model="draft",
        sha256="",
        fitted_on="nothing",
        intercept=0.0,
        weights={},
        threshold=0.5,
        tokens_per_word=ratio,
    )
    calibration.save(tmp_path / "c.yaml")
    config = EdgeConfig(routing_calibration=str(tmp_path / "c.yaml"))
    async with loaded_edge(tiny_pair.draft_gguf) as edge, connection("127.0.0.1:1") as cloud:
        router = load_router(edge, cloud, config, lambda: "", every=True)
        [probe] = [probe for probe in router.probes if probe.name == "words-first-line"]
        question = QuestionReader(edge, {}).question([Message("user", QUESTION)])
        reading = probe.read(edge.model, question, Said(np.zeros(1), "100 words"), None)
        assert reading.value == pytest.approx(100 * (ratio or sample_ratio(edge.model.tokenize)))


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        pytest.param(("route", " "), InvalidRequest, "empty", id="an empty question"),
        pytest.param(
            ("route", "Hi", "--cloud-threshold", "1.5"),
            InvalidSetting,
            "cloud_threshold = 1.5",
            id="threshold",
        ),
        pytest.param(
            ("calibrate", "--results", "r.jsonl"), InvalidSetting, "--cloud-share and --quality", id="no aim"
        ),
        pytest.param(
            ("calibrate", "--results", "r.jsonl", "--quality", "0.9"),
            InvalidRequest,
            "r.jsonl",
            id="no results",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], kind: type[DuetError], said: str
) -> None:
    done = run_duet(*arguments, folder=tmp_path)
    assert done.returncode == TABLE[kind].exit_code, done.stderr
    [line] = done.stderr.decode().splitlines()
    assert said in line
