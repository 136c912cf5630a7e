"""Whatever a user gets wrong ends in one line that says what and what to do, and in a telling exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest

from edge_agent.agent import Agent
from shared.config import CacheType, EdgeConfig
from shared.errors import (
    TABLE,
    AddressInUse,
    CloudUnavailable,
    DuetError,
    InvalidRequest,
    InvalidSetting,
    ModelFileInvalid,
    ModelUnsupported,
    OutOfMemory,
    PromptTooLong,
    UnknownModel,
    UnknownSetting,
)
from shared.events import Answer, Notice
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message
from tests.ports import free_port
from tests.service import RunningServer, connection, in_process_cloud, loaded_edge, run_duet, running_cloud
from tests.tiny_pair import TinyPair, write_hybrid_gguf

pytestmark = pytest.mark.engine

CONTEXT_TOKENS = 128
LONG = "word " * 300


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32", context_tokens=CONTEXT_TOKENS) as cloud:
        yield cloud


def refused(
    kind: type[DuetError],
    *arguments: str,
    folder: Path,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    program: str = "duet",
) -> str:
    """The one line that the command ends with."""
    done = run_duet(*arguments, folder=folder, stdin=stdin, env=env, program=program)
    shown = done.stderr.decode()
    assert done.returncode == TABLE[kind].exit_code, shown
    assert done.stdout == b""
    lines = shown.splitlines()
    assert len(lines) == 1, shown
    assert lines[0].startswith(f"{program}: ")
    assert "Traceback" not in shown
    return lines[0]


# The cloud


@pytest.mark.parametrize("mode", ["cloud", "speculate"])
def test_no_cloud_at_the_address(tiny_pair: TinyPair, tmp_path: Path, mode: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    line = refused(
        CloudUnavailable,
        *("ask", "hello", "--mode", mode, "--cloud", address, "--model", str(tiny_pair.draft_gguf)),
        folder=tmp_path,
    )
    assert address in line
    assert "--mode local" in line


# The question


def test_an_empty_question(tiny_pair: TinyPair, tmp_path: Path) -> None:
    mode = ("--mode", "local", "--model", str(tiny_pair.draft_gguf))
    assert "empty" in refused(InvalidRequest, "ask", " ", *mode, folder=tmp_path)


def test_an_empty_question_on_standard_input(tiny_pair: TinyPair, tmp_path: Path) -> None:
    mode = ("--mode", "local", "--model", str(tiny_pair.draft_gguf))
    assert "standard input" in refused(InvalidRequest, "ask", *mode, folder=tmp_path, stdin=b"\n")


@pytest.mark.parametrize("mode", ["local", "cloud", "speculate"])
def test_a_question_longer_than_the_context(
    tiny_pair: TinyPair, tmp_path: Path, service: RunningServer, mode: str
) -> None:
    line = refused(
        PromptTooLong,
        *("ask", "--mode", mode, "--cloud", service.address, "--model", str(tiny_pair.draft_gguf)),
        folder=tmp_path,
        stdin=LONG.encode(),
        env={"DUET_CONTEXT_TOKENS": str(CONTEXT_TOKENS)},
    )
    assert str(CONTEXT_TOKENS) in line
    assert "shorten" in line


# The model


@pytest.fixture(scope="module")
def bad_models(tmp_path_factory: pytest.TempPathFactory, tiny_pair: TinyPair) -> Path:
    """A folder of files that cannot be used as models."""
    folder = tmp_path_factory.mktemp("bad_models")
    (folder / "text.gguf").write_text("this is no model\n" * 100)
    (folder / "empty.gguf").write_bytes(b"")
    whole = tiny_pair.target_gguf.read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "header.gguf").write_bytes(whole[:100])
    write_hybrid_gguf(folder / "hybrid.gguf")
    _without_chat_template(tiny_pair.target_gguf, folder / "base.gguf")
    return folder


def _without_chat_template(source: Path, copy: Path) -> None:
    """The same file, whose template goes by a name that nobody looks up."""
    name = gguf.Keys.Tokenizer.CHAT_TEMPLATE.encode()
    content = source.read_bytes()
    assert content.count(name) == 1
    copy.write_bytes(content.replace(name, name[:-1] + b"_"))


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("text.gguf", ModelFileInvalid, "text.gguf is not a GGUF file"),
        ("truncated.gguf", ModelFileInvalid, "not within the file bounds"),
        ("base.gguf", ModelUnsupported, "chat template"),
        ("hybrid.gguf", ModelUnsupported, "rolled back"),
        ("missing.gguf", UnknownModel, "missing.gguf"),
    ],
)
def test_an_edge_model_that_cannot_be_used(
    bad_models: Path, tmp_path: Path, service: RunningServer, name: str, kind: type[DuetError], word: str
) -> None:
    model = ("--model", str(bad_models / name))
    assert word in refused(
        kind, "ask", "hello", "--mode", "speculate", "--cloud", service.address, *model, folder=tmp_path
    )


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("empty.gguf", ModelFileInvalid, "empty.gguf is not a GGUF file"),
        ("header.gguf", ModelFileInvalid, "failed to read key-value pairs"),
        ("truncated.gguf", ModelFileInvalid, "not within the file bounds"),
        ("hybrid.gguf", ModelUnsupported, "rolled back"),
        ("missing.gguf", UnknownModel, "missing.gguf"),
    ],
)
def test_a_target_that_cannot_be_used(
    bad_models: Path, tmp_path: Path, name: str, kind: type[DuetError], word: str
) -> None:
    flags = ("--model", str(bad_models / name), "--listen", "127.0.0.1:0")
    line = refused(kind, "serve", *flags, folder=tmp_path, program="duet-cloud")
    assert word in line
    assert "--mode" not in line, "advice for the edge does not help an operator"


def test_an_unknown_model_name(tmp_path: Path) -> None:
    line = refused(
        UnknownModel, "ask", "hello", "--mode", "local", "--model", "qwen2.5-coder-0.6b", folder=tmp_path
    )
    assert "qwen2.5-coder-0.5b" in line


# Settings


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-k", "0", "top_k"),
        ("--top-k", "65", "top_k"),
        ("--top-p", "0", "top_p"),
        ("--seed", "-1", "seed"),
        ("--max-tokens", "0", "max_tokens"),
        ("--mode", "nonsense", "mode"),
        ("--policy", "nonsense", "policy"),
        ("--fallback-threshold", "1.5", "fallback_threshold"),
        ("--fallback-threshold", "-0.1", "fallback_threshold"),
        ("--fallback-threshold", "nan", "fallback_threshold"),
        ("--rollback-threshold", "0", "rollback_threshold"),
        ("--rollback-threshold", "inf", "rollback_threshold"),
        ("--acceptance-threshold", "2", "acceptance_threshold"),
        ("--max-draft-tokens", "0", "max_draft_tokens"),
        ("--max-in-flight-tokens", "0", "max_in_flight_tokens"),
        ("--cloud", "localhost", "cloud"),
    ],
)
def test_a_flag_out_of_range(tmp_path: Path, flag: str, value: str, name: str) -> None:
    line = refused(InvalidSetting, "ask", "hello", f"{flag}={value}", folder=tmp_path)
    assert name in line
    assert "flags" in line


def test_a_value_of_the_environment_that_cannot_be_used(tmp_path: Path) -> None:
    line = refused(InvalidSetting, "ask", "hello", folder=tmp_path, env={"DUET_TOP_K": "many"})
    assert "top_k" in line
    assert "environment" in line


@pytest.mark.parametrize(("program", "file"), [("duet", "duet.yaml"), ("duet-cloud", "duet-cloud.yaml")])
def test_an_unknown_setting_in_a_file_brings_up_the_nearest(tmp_path: Path, program: str, file: str) -> None:
    (tmp_path / file).write_text("context_token: 512\n")
    arguments = ("ask", "hello") if program == "duet" else ("serve",)
    line = refused(UnknownSetting, *arguments, folder=tmp_path, program=program)
    assert file in line
    assert "'context_tokens'" in line


@pytest.mark.parametrize("content", ["- a\n- b\n", "mode: [unclosed\n", "\x00"])
def test_a_settings_file_that_holds_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "duet.yaml").write_text(content)
    assert "duet.yaml" in refused(InvalidSetting, "ask", "hello", folder=tmp_path)


@pytest.mark.parametrize(("program", "verb"), [("duet", ("ask", "hello")), ("duet-cloud", ("serve",))])
def test_a_settings_file_that_does_not_exist(tmp_path: Path, program: str, verb: tuple[str, ...]) -> None:
    line = refused(InvalidSetting, *verb, "--config", "nowhere.yaml", folder=tmp_path, program=program)
    assert "nowhere.yaml" in line


# Slots and context


@pytest.fixture(scope="module")
def trained_long(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target, whose file says that it was trained for two billion positions."""
    copy = tmp_path_factory.mktemp("trained_long") / "target.gguf"
    copy.write_bytes(tiny_pair.target_gguf.read_bytes())
    field = gguf.GGUFReader(copy, "r+").get_field("qwen2.context_length")
    assert field is not None
    field.parts[field.data[0]][0] = 2 * 10**9
    return copy


def test_slots_and_a_context_that_do_not_fit_in_memory(trained_long: Path, tmp_path: Path) -> None:
    flags = ("--model", str(trained_long), "--slots", "256", "--context-tokens", "2000000000")
    line = refused(OutOfMemory, "serve", *flags, folder=tmp_path, program="duet-cloud")
    assert "256 x 2000000000 tokens" in line
    assert "MB are free" in line
    assert re.search(r"choose a context of \d+ tokens at 256 slots", line)


def test_the_context_that_is_advised_instead_can_be_served(
    trained_long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    model = LlamaModel(trained_long, "target")
    sizes: dict[str, Any] = {"num_sequences": 8, "rollback_tokens": 0, "threads": 1, "cache_type": "f32"}
    with pytest.raises(OutOfMemory) as caught:
        LlamaContext(model, context_tokens=512, **sizes)
    [advised] = re.findall(r"context of (\d+) tokens at 8 slots", str(caught.value))
    assert int(advised) == 1_000_000 // (8 * model.cache_bytes_per_token("f32"))
    with LlamaContext(model, context_tokens=int(advised), **sizes) as context:
        assert len(context.extend(0, [65], 1)) == 1
    model.close()


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
def test_the_bytes_of_a_cache_are_those_that_llama_cpp_allocates(
    tiny_pair: TinyPair, caplog: pytest.LogCaptureFixture, cache_type: CacheType
) -> None:
    model = LlamaModel(tiny_pair.target_gguf, "target")
    with caplog.at_level("DEBUG", "duet.llama"):
        LlamaContext(
            model, num_sequences=2, context_tokens=4096, rollback_tokens=0, threads=1, cache_type=cache_type
        ).close()
    [allocated] = re.findall(r"KV buffer size = +([\d.]+) MiB", caplog.text)
    assert model.cache_bytes_per_token(cache_type) * 8192 / 2**20 == pytest.approx(float(allocated), abs=0.01)
    model.close()


@pytest.mark.parametrize("program", ["duet", "duet-cloud"])
def test_a_context_longer_than_the_model_was_trained_for(
    tiny_pair: TinyPair, tmp_path: Path, program: str
) -> None:
    arguments = ("ask", "hello", "--mode", "local") if program == "duet" else ("serve",)
    line = refused(
        InvalidSetting,
        *(*arguments, "--model", str(tiny_pair.target_gguf)),
        folder=tmp_path,
        env={"DUET_CONTEXT_TOKENS": "65537", "DUET_CLOUD_CONTEXT_TOKENS": "65537"},
        program=program,
    )
    assert "context_tokens = 65537" in line
    assert "at most 65536" in line


# The service


def test_a_port_in_use(tiny_pair: TinyPair, tmp_path: Path, service: RunningServer) -> None:
    flags = ("--model", str(tiny_pair.target_gguf), "--listen", service.address)
    line = refused(AddressInUse, "serve", *flags, folder=tmp_path, program="duet-cloud")
    assert service.address in line
    assert "--listen" in line


@pytest.mark.parametrize("listen", ["localhost", "192.0.2.1:0"])
def test_an_address_that_cannot_be_bound(tiny_pair: TinyPair, tmp_path: Path, listen: str) -> None:
    done = run_duet(
        *("serve", "--model", str(tiny_pair.target_gguf), "--listen", listen),
        folder=tmp_path,
        program="duet-cloud",
    )
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2, lines
    assert len(lines) == 1, lines
    assert listen in lines[0]


# A chat that outgrows the context


@pytest.mark.parametrize("mode", ["local", "cloud", "speculate"])
async def test_a_long_chat_loses_its_oldest_turns_and_says_so(tiny_pair: TinyPair, mode: str) -> None:
    system = Message("system", "Be brief.")
    turns = [
        message
        for i in range(20)
        for message in (Message("user", f"question {i}"), Message("assistant", f"answer {i}"))
    ]
    question = Message("user", "And the last one?")
    config = EdgeConfig.model_validate({"mode": mode, "max_tokens": 4, "seed": 0})
    async with (
        in_process_cloud(tiny_pair.target_gguf, context_tokens=CONTEXT_TOKENS) as service,
        loaded_edge(tiny_pair.draft_gguf, context_tokens=CONTEXT_TOKENS) as edge,
        connection(service.address) as cloud,
    ):
        agent = Agent(config, edge=edge, cloud=cloud)
        events = [event async for event in agent.chat([system, *turns, question])]
        notices = [event for event in events if isinstance(event, Notice)]
        answer = events[-1]
        assert isinstance(answer, Answer)
        assert "oldest" in notices[-1].message
        assert "\n" not in notices[-1].message
        num_dropped = next(n for n in range(2, 41, 2) if f" {n} " in notices[-1].message)
        kept = [system, *turns[num_dropped:], question]
        fits = len(edge.model.render_chat(kept))
        assert answer.prompt_tokens == fits < CONTEXT_TOKENS
        one_turn_more = [system, *turns[num_dropped - 2 :], question]
        assert len(edge.model.render_chat(one_turn_more)) >= CONTEXT_TOKENS


async def test_a_last_question_that_does_not_fit_alone_is_an_error(tiny_pair: TinyPair) -> None:
    config = EdgeConfig.model_validate({"mode": "local"})
    async with loaded_edge(tiny_pair.draft_gguf, context_tokens=CONTEXT_TOKENS) as edge:
        agent = Agent(config, edge=edge, cloud=None)
        chat = [Message("user", "a"), Message("assistant", "b"), Message("user", LONG)]
        with pytest.raises(PromptTooLong):
            [event async for event in agent.chat(chat)]
