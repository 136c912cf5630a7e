"""`duet` as a user runs it, against a service that hosts the tiny target."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import EXIT_INTERRUPTED
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.service import (
    InProcessCloud,
    RunningServer,
    TargetAlone,
    clean_environment,
    command,
    eventually,
    in_process_cloud,
    run_duet,
    running_cloud,
    started_ask,
)
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."
MAX_TOKENS = 48
ANSWER_KEYS = {
    "speed",
    "answer",
    "mode",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "rounds",
    "target_passes",
    "guidance_tokens",
    "policy",
    "acceptance_length",
    "drafted_tokens",
    "accepted_tokens",
    "ttft_ms",
    "tpot_ms",
    "bytes_per_token",
    "seed",
    "edge_model",
    "cloud_model",
    "tokens",
    "decision",
    "reason",
}


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=512) as cloud:
        yield cloud


class Duet:
    """`duet ask` with the tiny pair."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self._env = {f"DUET_{name.upper()}": value for name, value in settings.items()}

    def ask(self, *arguments: str, stdin: bytes = b"") -> str:
        """What it prints."""
        done = run_duet("ask", *arguments, folder=self._folder, stdin=stdin, env=self._env)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
        return done.stdout.decode("utf-8")  # strict: only whole characters are shown

    def ask_json(self, *arguments: str) -> dict[str, Any]:
        [line] = self.ask("--json", *arguments).splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture
def duet(tiny_pair: TinyPair, tmp_path: Path, service: RunningServer) -> Duet:
    settings = {
        "cloud": service.address,
        "model": str(tiny_pair.draft_gguf),
        "max_tokens": str(MAX_TOKENS),
        "threads": "1",
        "seed": "11",
    }
    return Duet(tmp_path, settings)


def asked(question: str = QUESTION, *, temperature: float = 0.0) -> Open:
    """The same request, for the target alone."""
    return Open(
        prompt=(Message("user", question),),
        sampling=Sampling(temperature=temperature),
        seed=11,
        max_tokens=MAX_TOKENS,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cloud_and_speculate_print_the_targets_own_text(
    duet: Duet, alone: TargetAlone, temperature: float
) -> None:
    expected = alone.shown(alone.complete(asked(temperature=temperature))) + "\n"
    for mode in ("cloud", "speculate"):
        assert duet.ask(QUESTION, "--mode", mode, "--temperature", str(temperature)) == expected


def test_local_prints_the_same_text_for_the_same_seed(duet: Duet) -> None:
    local = ("--mode", "local", "--temperature", "0.8", QUESTION)
    first = duet.ask(*local)
    assert first.strip()
    assert duet.ask(*local) == first


@pytest.mark.parametrize("mode", ["local", "cloud", "speculate"])
def test_json_gives_the_answer_and_its_figures(duet: Duet, alone: TargetAlone, mode: str) -> None:
    answer = duet.ask_json(QUESTION, "--mode", mode)
    assert set(answer) == ANSWER_KEYS
    assert answer["mode"] == mode
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["prompt_tokens"] == len(alone.model.render_chat([Message("user", QUESTION)]))
    assert answer["completion_tokens"] == len(answer["tokens"]) <= MAX_TOKENS
    assert all(set(token) == {"id", "text", "origin", "source"} for token in answer["tokens"])
    assert {token["source"] for token in answer["tokens"] if token["origin"] == "accepted"} <= {"model"}
    assert {token["source"] for token in answer["tokens"] if token["origin"] != "accepted"} <= {None}
    assert answer["seed"] == 11
    assert answer["ttft_ms"] > 0
    assert answer["tpot_ms"] > 0
    assert (answer["edge_model"] is None) == (mode == "cloud")
    assert (answer["cloud_model"] is None) == (mode == "local")
    assert (answer["bytes_per_token"] is None) == (mode == "local")
    origins = {token["origin"] for token in answer["tokens"]}
    if mode == "speculate":
        assert origins == {"accepted", "correction", "bonus"}
        assert answer["policy"] == "lossless"
        assert answer["target_passes"] == answer["rounds"]
        assert answer["acceptance_length"] == answer["completion_tokens"] / answer["rounds"]
        assert 0 < answer["accepted_tokens"] < answer["drafted_tokens"]
    else:
        assert origins == {mode}
        assert answer["rounds"] == 0
        assert answer["policy"] is None
        assert answer["target_passes"] == (answer["completion_tokens"] if mode == "cloud" else 0)
        assert answer["acceptance_length"] is None


def test_the_question_may_come_on_standard_input(duet: Duet, alone: TargetAlone) -> None:
    assert duet.ask("--mode", "speculate", stdin="Erzähl 你好 🦀\n".encode()) == (
        alone.shown(alone.complete(asked("Erzähl 你好 🦀\n"))) + "\n"
    )


@pytest.mark.parametrize("mode", ["cloud", "speculate"])
def test_characters_of_several_tokens_are_shown_whole(duet: Duet, alone: TargetAlone, mode: str) -> None:
    question = first_question_with_multibyte_answer(alone)
    token_ids = alone.complete(asked(question))
    assert duet.ask(question, "--mode", mode) == alone.shown(token_ids) + "\n"


def first_question_with_multibyte_answer(alone: TargetAlone) -> str:
    """The tiny models write arbitrary bytes: some answer holds a character that takes several tokens."""
    for i in range(500):
        question = f"question {i}"
        shown = alone.shown(alone.complete(asked(question)))
        if any(ord(character) > 0x7F and character != "\ufffd" for character in shown):
            return question
    raise AssertionError("no answer holds a character of several bytes")


@pytest.mark.parametrize("mode", ["cloud", "speculate"])
def test_the_answer_ends_before_a_stop_text(duet: Duet, alone: TargetAlone, mode: str) -> None:
    whole = alone.shown(alone.complete(asked()))
    stop = whole[12:15]
    cut = duet.ask_json(QUESTION, "--mode", mode, "--stop", "never met", "--stop", stop)
    assert cut["answer"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_max_tokens_limits_the_answer(duet: Duet) -> None:
    for mode in ("local", "cloud", "speculate"):
        answer = duet.ask_json(QUESTION, "--mode", mode, "--max-tokens", "5")
        assert answer["completion_tokens"] == 5
        assert answer["finish_reason"] == "length"


def test_a_system_prompt_comes_before_the_question(duet: Duet, alone: TargetAlone) -> None:
    system = Message("system", "Answer like a pirate.")
    request = replace(asked(), prompt=(system, *asked().prompt))
    answer = duet.ask(QUESTION, "--mode", "speculate", "--system", system.content)
    assert answer == alone.shown(alone.complete(request)) + "\n"


def test_show_origin_prints_the_same_text_and_a_legend(duet: Duet) -> None:
    flags = (
        "--mode",
        "speculate",
        "--max-draft-tokens",
        "4",
        "--no-proactive",
    )  # how drafts are cut is in it
    answer = duet.ask_json(QUESTION, *flags)
    shown = duet.ask(QUESTION, *flags, "--show-origin")
    text, legend = shown.rstrip("\n").rsplit("\n", 1)
    assert text == answer["answer"]
    counts = {
        mark: sum(token["origin"] == origin for token in answer["tokens"])
        for mark, origin in (
            ("edge, accepted", "accepted"),
            ("cloud, correction", "correction"),
            ("cloud, bonus", "bonus"),
        )
    }
    assert legend == " · ".join(f"{mark} {count}" for mark, count in counts.items())


# Ctrl-C


@pytest.mark.parametrize("mode", ["local", "cloud", "speculate"])
async def test_ctrl_c_stops_at_once_and_frees_the_slot(
    tiny_pair: TinyPair, tmp_path: Path, mode: str
) -> None:
    async with in_process_cloud(tiny_pair.target_gguf, slots=1, context_tokens=65536, step_s=0.1) as service:
        arguments = ("--mode", mode, "--cloud", service.address, "--model", str(tiny_pair.draft_gguf))
        process = await started_ask(
            *(QUESTION, *arguments, "--max-tokens", "60000", "--temperature", "1", "--seed", "3"),
            folder=tmp_path,
            env={"DUET_CONTEXT_TOKENS": "65536"},
        )
        await _interrupt_in_the_middle(process, service, mode)


async def _interrupt_in_the_middle(
    process: asyncio.subprocess.Process, service: InProcessCloud, mode: str
) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.stdout.read(1), await process.stderr.read()
    if mode != "local":
        assert service.target.num_free_slots == 0
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, shown = await process.communicate()
    assert time.monotonic() - began < 2.0
    assert process.returncode == EXIT_INTERRUPTED
    assert b"Traceback" not in shown
    await eventually(lambda: service.is_idle, within_s=2.0)


# Settings


def test_config_show_names_the_source_of_every_setting(tmp_path: Path) -> None:
    (tmp_path / "duet.yaml").write_text("temperature: 0.5\nmax_tokens: 9\nstop: [a, b]\n")
    done = run_duet("config", "show", folder=tmp_path, env={"DUET_MAX_TOKENS": "7"})
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.decode().splitlines()}
    assert rows["temperature"] == ["0.5", "duet.yaml"]
    assert rows["max_tokens"] == ["7", "environment"]
    assert rows["top_k"] == ["64", "default"]
    assert rows["stop"] == ['["a",', '"b"]', "duet.yaml"]


def test_a_named_settings_file_wins_over_the_one_that_lies_here(tmp_path: Path) -> None:
    (tmp_path / "duet.yaml").write_text("top_k: 3\n")
    (tmp_path / "mine.yaml").write_text("top_k: 4\n")
    done = run_duet("config", "show", "--config", "mine.yaml", folder=tmp_path)
    assert ["top_k", "4", "mine.yaml"] in [line.split() for line in done.stdout.decode().splitlines()]


def test_a_flag_wins_over_the_environment_and_the_file(duet: Duet, tmp_path: Path) -> None:
    (tmp_path / "duet.yaml").write_text("max_tokens: 9\nmode: local\n")
    answer = duet.ask_json(QUESTION, "--max-tokens", "3")
    assert answer["completion_tokens"] == 3
    assert answer["mode"] == "local"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        pytest.param("duet-cloud", ["plan", "--help"], id="help"),
        pytest.param("duet", ["config", "show"], id="a table"),
        pytest.param("duet", ["ask", QUESTION, "--mode=local"], id="an answer as it is made"),
        pytest.param("duet", ["ask", QUESTION, "--mode=local", "--json"], id="JSON"),
    ],
)
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(
    tiny_pair: TinyPair, tmp_path: Path, program: str, arguments: list[str]
) -> None:
    """As `duet ask ... | head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [command(program), *arguments],
        cwd=tmp_path,
        env=clean_environment(tmp_path, {"DUET_MODEL": str(tiny_pair.draft_gguf), "DUET_THREADS": "1"}),
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert ended.stderr == b""
    assert ended.returncode == 1
