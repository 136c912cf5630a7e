"""`duet chat` at a pseudo-terminal and in a pipe, against a service that hosts the tiny target."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, aclosing
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.chat.display import printable
from edge_agent.routing.router import load_router
from shared.config import EdgeConfig
from shared.events import Answer
from shared.llama.context import common_prefix
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.service import (
    InProcessCloud,
    TargetAlone,
    connection,
    eventually,
    in_process_cloud,
    loaded_edge,
    run_duet,
)
from tests.terminal import Terminal, at_terminal
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

QUESTION = "Tell me a story."
MAX_TOKENS = 40
STEP_S = 0.1
MODES = ("auto", "local", "cloud", "speculate")
NOBODY = "127.0.0.1:9"
COLOURS = re.compile(rb"\x1b\[[0-9;]*\b(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])\b[0-9;]*m")


@pytest.fixture
async def service(tiny_pair: TinyPair) -> AsyncIterator[InProcessCloud]:
    """Slow enough to watch an answer being made."""
    async with in_process_cloud(tiny_pair.target_gguf, slots=2, context_tokens=65536, step_s=STEP_S) as cloud:
        yield cloud


Chat = Callable[..., AbstractContextManager[Terminal]]


@pytest.fixture
def settings(tiny_pair: TinyPair, service: InProcessCloud) -> dict[str, str]:
    return {
        "DUET_CLOUD": service.address,
        "DUET_MODEL": str(tiny_pair.draft_gguf),
        "DUET_MAX_TOKENS": str(MAX_TOKENS),
        "DUET_CONTEXT_TOKENS": "65536",
        "DUET_THREADS": "1",
        "DUET_SEED": "11",
        "DUET_MODE": "speculate",
    }


@pytest.fixture
def chat(tmp_path: Path, settings: dict[str, str]) -> Chat:
    def start(*arguments: str, **env: str) -> AbstractContextManager[Terminal]:
        return at_terminal("chat", *arguments, folder=tmp_path, env=settings | env)

    return start


def request(*said: str) -> Open:
    """A question, or questions and answers by turns."""
    roles = ("user", "assistant") * len(said)
    return Open(
        prompt=tuple(Message(role, text) for role, text in zip(roles, said, strict=False)),
        sampling=Sampling(temperature=0.0),
        seed=11,
        max_tokens=MAX_TOKENS,
    )


def unspaced(text: str) -> str:
    """Lines are broken to the terminal's width."""
    return "".join(text.split())


def shows_prompt(terminal: Terminal) -> bool:
    """A free line to type in, and the status below it."""
    lines = [line for line in terminal.lines if line]
    return len(lines) > 1 and lines[-2] == ">" and lines[-1].startswith(MODES)


def last_answer(terminal: Terminal, question: str) -> str:
    """What stands between the question and the next prompt."""
    after = terminal.text.rsplit(f"> {question}\n", 1)[1]
    return after.split("\n>", 1)[0]


async def test_drafts_are_dim_at_once_corrections_flash_and_all_turns_solid(
    chat: Chat, alone: TargetAlone
) -> None:
    first = alone.shown(alone.complete(request(QUESTION)))
    second = alone.shown(alone.complete(request(QUESTION, first, "Again?")))
    with chat() as terminal:
        await terminal.shows(lambda: "a cloud at" in terminal.text and shows_prompt(terminal))
        terminal.enter(QUESTION)
        await terminal.shows(lambda: terminal.dim)
        assert "tokens/s" not in terminal.text, "nothing was confirmed yet"
        await terminal.shows(lambda: terminal.flashing)
        await terminal.shows(lambda: re.search(r"speculate · [\d.]+ tokens/s · \d+% accepted", terminal.text))
        await terminal.shows(lambda: shows_prompt(terminal))
        assert terminal.dim == terminal.flashing == ""
        assert unspaced(last_answer(terminal, QUESTION)) == unspaced(printable(first))
        assert re.search(r"speculate · [\d.]+ tokens/s · \d+% accepted · link \d+ ms", terminal.lines[-1])
        terminal.enter("Again?")
        await terminal.shows(lambda: "> Again?" in terminal.text and shows_prompt(terminal))
        assert unspaced(last_answer(terminal, "Again?")) == unspaced(printable(second))
        terminal.type("\x04")  # Ctrl-D
        assert await terminal.ends() == 0


async def test_commands_change_the_mode_and_tell_save_clear_and_load(chat: Chat, tmp_path: Path) -> None:
    with chat("--system", "Be brief.", DUET_CHAT_DIR=str(tmp_path / "chats")) as terminal:

        async def entered(line: str, says: str) -> None:
            terminal.enter(line)
            await terminal.shows(
                lambda: says in terminal.text.rsplit(f"> {line}", 1)[-1] and shows_prompt(terminal)
            )

        await terminal.shows(lambda: shows_prompt(terminal))
        await entered("/stats", "no answers yet")
        await entered("/mode local", "mode local")
        terminal.enter(QUESTION)
        await terminal.shows(lambda: "local ·" in terminal.lines[-1] and shows_prompt(terminal))
        await entered("/stats", "1 answer, ")
        await entered("/mode fast", "there is no mode 'fast'; there are auto, local, cloud, speculate")
        await entered("/route", "the router decides in mode auto")
        await entered("/route What is 1+1?", "because")
        await entered("/system", "system prompt: Be brief.")
        await entered("/save first", "saved 1 questions")
        await entered("/clear", "a new chat")
        await entered("/load", "saved: first, last")
        await entered("/load ../x", "cannot name a chat")
        await entered("/load first", "going on with first after 1 questions")
        await entered("/system off", "no system prompt")
        await entered("/help", "/quit")
        await entered("/nope", "there is no /nope")
        terminal.enter("/quit")
        assert await terminal.ends() == 0
    saved = json.loads((tmp_path / "chats" / "first.json").read_text())
    assert saved["system"] == "Be brief."
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("mode", ["local", "speculate"])
async def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    chat: Chat, service: InProcessCloud, mode: str
) -> None:
    with chat("--mode", mode, "--max-tokens", "60000", "--temperature", "1", DUET_SEED="3") as terminal:
        await terminal.shows(lambda: shows_prompt(terminal))
        terminal.enter(QUESTION)
        await terminal.shows(lambda: "tokens/s" in terminal.text)
        terminal.interrupt()
        await terminal.shows(lambda: "stopped" in terminal.text and shows_prompt(terminal), within_s=5.0)
        await eventually(lambda: service.is_idle, within_s=2.0)
        terminal.type("half a line")
        await terminal.shows(lambda: "> half a line" in terminal.text)
        terminal.interrupt()
        await terminal.shows(lambda: shows_prompt(terminal))
        terminal.enter("/stats")
        await terminal.shows(lambda: "no answers yet" in terminal.text and shows_prompt(terminal))
        terminal.type("\x04")
        assert await terminal.ends() == 0


async def test_without_colour_only_weight_and_reverse_are_used(chat: Chat) -> None:
    with chat(NO_COLOR="1") as terminal:
        await terminal.shows(lambda: shows_prompt(terminal))
        terminal.enter(QUESTION)
        await terminal.shows(lambda: terminal.dim)
        await terminal.shows(lambda: shows_prompt(terminal))
        assert COLOURS.findall(terminal.raw) == []


async def test_a_dumb_terminal_gets_plain_text(chat: Chat, alone: TargetAlone) -> None:
    expected = printable(alone.shown(alone.complete(request(QUESTION))))
    with chat(TERM="dumb") as terminal:
        await terminal.shows(lambda: "leaves" in terminal.text)
        terminal.enter(QUESTION)
        await terminal.shows(lambda: unspaced(expected) + ">" in unspaced(terminal.text))
        terminal.type("\x04")
        assert await terminal.ends() == 0
        assert b"\x1b" not in terminal.raw


async def test_without_a_cloud_the_chat_stays_and_auto_answers_here(chat: Chat) -> None:
    with chat(DUET_CLOUD=NOBODY) as terminal:
        await terminal.shows(lambda: "link down" in terminal.text)
        terminal.enter(QUESTION)
        await terminal.shows(lambda: "refuses connections" in terminal.text and shows_prompt(terminal))
        terminal.enter("/mode auto")
        await terminal.shows(lambda: "mode auto" in terminal.text and shows_prompt(terminal))
        terminal.enter(QUESTION)
        await terminal.shows(lambda: "answered by the edge model alone" in terminal.text)
        await terminal.shows(lambda: "auto: local ·" in terminal.lines[-1] and shows_prompt(terminal))
        terminal.enter("/route")
        await terminal.shows(lambda: "because no cloud" in terminal.text)


# In a pipe


@pytest.fixture
def piped(tiny_pair: TinyPair, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Give lines to `duet chat` in mode local; returns exit code, answers and the rest."""
    env = {
        "DUET_MODEL": str(tiny_pair.draft_gguf),
        "DUET_MAX_TOKENS": str(MAX_TOKENS),
        "DUET_THREADS": "1",
        "DUET_CHAT_DIR": str(tmp_path / "chats"),
    }

    def run(lines: bytes, *arguments: str) -> tuple[int, str, str]:
        done = run_duet("chat", "--mode", "local", *arguments, folder=tmp_path, stdin=lines, env=env)
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


def test_a_pipe_gets_answers_only_and_the_rest_goes_to_standard_error(
    piped: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, answers, rest = piped(b"Hello\n\n/stats\nAgain?\r\n\xff\xfe without an end")
    assert code == 0
    assert "\x1b" not in answers.replace("\x1b[", "")
    assert "duet: 1 answer" in rest
    saved = json.loads((tmp_path / "chats" / "last.json").read_text())["messages"]
    asked = [message["content"] for message in saved if message["role"] == "user"]
    assert asked == ["Hello", "Again?", "\ufffd\ufffd without an end"]
    assert answers == "".join(m["content"] + "\n" for m in saved if m["role"] == "assistant")


def test_a_failure_in_a_pipe_is_one_line_and_the_exit_code(
    piped: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    huge = b"word " * 5000
    code, answers, rest = piped(huge + b"\n/load nothing\nHello\n", "--private")
    assert code == 4
    assert [line[:6] for line in rest.splitlines()] == ["duet: ", "duet: "]
    assert "tokens, but the edge's context holds" in rest
    assert "is not kept" in rest
    assert answers.strip()
    assert not (tmp_path / "chats").exists(), "a private chat is not kept"


# KV caches


async def test_both_sides_read_only_what_is_new_in_the_second_turn(tiny_pair: TinyPair) -> None:
    """Counted in tokens. Generated text is split into tokens anew by the template, so what is shared is
    counted from the tokens, too: the tiny models' text is not split as it was written."""
    async with (
        in_process_cloud(tiny_pair.target_gguf, context_tokens=2048) as cloud,
        connection(cloud.address) as remote,
        loaded_edge(tiny_pair.draft_gguf, mode="auto", context_tokens=2048) as edge,
    ):
        config = EdgeConfig(max_tokens=MAX_TOKENS, seed=11, mode="auto", cloud_threshold=0.0)
        router = load_router(edge, remote, config, lambda: "")
        agent = Agent(config, edge=edge, cloud=remote, router=router)

        async def turn(messages: list[Message], mode: str) -> tuple[Answer, int, int]:
            before = edge.context.num_decoded_tokens, cloud.context.num_decoded_tokens
            async with aclosing(agent.chat(messages, mode=mode)) as events:
                answer = [event async for event in events if isinstance(event, Answer)][-1]
            await eventually(lambda: cloud.is_idle)
            return (
                answer,
                edge.context.num_decoded_tokens - before[0],
                cloud.context.num_decoded_tokens - before[1],
            )

        for mode in ("local", "cloud", "speculate"):
            first = [Message("user", f"{QUESTION} In mode {mode}.")]
            answer, _, _ = await turn(first, mode)
            second = [*first, Message("assistant", answer.answer), Message("user", "Go on. " * 20)]
            known = [*edge.model.render_chat(first), *(token.id for token in answer.tokens)]
            num_new = len(edge.model.render_chat(second)) - common_prefix(
                known[:-1], edge.model.render_chat(second)
            )
            answer, at_edge, at_cloud = await turn(second, mode)
            assert num_new < answer.prompt_tokens - 40, "most of the first turn is shared"
            written = answer.completion_tokens
            if mode == "local":
                assert (at_edge, at_cloud) == (num_new + written - 1, 0)
            elif mode == "cloud":
                assert (at_edge, at_cloud) == (0, num_new + written - 1)
            else:
                assert at_cloud <= num_new + answer.drafted_tokens + answer.rounds
                # Drafts that were made and never sent count, too.
                assert at_edge <= num_new + 2 * (answer.drafted_tokens + answer.rounds)
