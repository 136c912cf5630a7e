"""Whoever proposes the tokens, the text is the target's own: copiers, or models of other vocabularies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from edge_agent.drafting.drafters import Drafters
from edge_agent.drafting.store import DocumentStore
from shared.drafts import Source
from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.engine.test_lossless import random_requests
from tests.service import (
    InProcessCloud,
    RunningServer,
    TargetAlone,
    connection,
    generate,
    in_process_cloud,
    loaded_edge,
    run_duet,
    running_cloud,
    speculate,
)
from tests.tiny_pair import OTHER_MERGES, TARGET_SEED, TinyPair, write_tiny_model

pytestmark = pytest.mark.engine


@pytest_asyncio.fixture
async def service(tiny_pair: TinyPair) -> AsyncIterator[InProcessCloud]:
    async with in_process_cloud(tiny_pair.target_gguf) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def other_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target itself behind other ids: byte b has the id (b - 1) % 256."""
    folder = tmp_path_factory.mktemp("other")
    return write_tiny_model(folder, name="other", seed=TARGET_SEED, rotate_bytes_by=1, same_text=True).gguf


@pytest.fixture(scope="module")
def other_merges_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has other tokens, not only other ids."""
    folder = tmp_path_factory.mktemp("merges")
    return write_tiny_model(folder, name="merges", seed=TARGET_SEED, merges=OTHER_MERGES).gguf


@pytest.mark.parametrize("edge_gguf", ["other_gguf", "other_merges_gguf"])
async def test_an_edge_of_another_vocabulary_gives_the_targets_own_text(
    edge_gguf: str, request: pytest.FixtureRequest, alone: TargetAlone, service: InProcessCloud
) -> None:
    num_drafted = num_accepted = 0
    async with (
        loaded_edge(request.getfixturevalue(edge_gguf)) as edge,
        connection(service.address) as cloud,
    ):
        drafters = Drafters(edge)
        for i, asked in enumerate(random_requests(60, seed=3)):
            made = await speculate(drafters, cloud, asked, max_draft_tokens=1 + i % 8)
            assert made.token_ids == alone.complete(asked), asked
            if asked.sampling.greedy:
                num_drafted += made.num_drafted
                num_accepted += made.num_accepted
    print(f"greedy: accepted {num_accepted} of {num_drafted} translated draft tokens")
    # The first is the target itself, so only where it wrote what no tokenizer would split so do they differ.
    assert num_accepted > (0.9 * num_drafted if edge_gguf == "other_gguf" else 0)


async def test_copies_and_the_model_together_give_the_targets_own_text(
    tiny_pair: TinyPair, alone: TargetAlone, service: InProcessCloud, tmp_path: Path
) -> None:
    sources: list[Source | None] = []
    async with loaded_edge(tiny_pair.draft_gguf) as edge, connection(service.address) as cloud:
        store = DocumentStore(tmp_path, edge.model.vocabulary.sha256)
        requests = random_requests(40, seed=4)
        for i, request in enumerate(requests[::2]):
            store.add(f"{i}", alone.complete(request))
        drafters = Drafters(edge, ("lookup", "retrieval", "model"), store_folder=tmp_path)
        for request in requests:
            made = await speculate(drafters, cloud, request, 4)
            assert made.token_ids == alone.complete(request), request
            sources += made.sources
    counts = {source: sources.count(source) for source in (*Source, None)}
    print("accepted by source:", {str(s): n for s, n in counts.items()})
    assert counts[Source.MODEL] > 0
    assert counts[Source.RETRIEVAL] > 0
    assert counts[None] > 0, "the target's own tokens have no source"


async def test_no_model_is_needed_at_the_edge(alone: TargetAlone, service: InProcessCloud) -> None:
    async with connection(service.address) as cloud:
        drafters = Drafters(None, ("lookup",))
        text = "the river counts nine stones and the river counts nine stones and the river counts"
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            request = Open(prompt=(Message("user", text),), sampling=sampling, seed=7, max_tokens=48)
            made = await speculate(drafters, cloud, request, 4)
            assert made.token_ids == alone.complete(request)
            assert set(made.sources) <= {Source.LOOKUP, None}


async def test_an_answer_that_is_remembered_is_copied_the_next_time(
    tiny_pair: TinyPair, alone: TargetAlone, service: InProcessCloud, tmp_path: Path
) -> None:
    request = Open(prompt=(Message("user", "the river"),), sampling=Sampling(), seed=0, max_tokens=24)
    async with connection(service.address) as cloud:
        drafters = Drafters(None, ("retrieval",), store_folder=tmp_path, remember_answers=True)
        first = await speculate(drafters, cloud, request, 4)
        assert first.num_accepted == 0
        drafters.remember("the river", alone.shown(first.token_ids))
        second = await speculate(drafters, cloud, request, 4)
    assert second.token_ids == first.token_ids
    assert second.num_accepted > 0


def test_without_remember_answers_nothing_is_kept(tmp_path: Path) -> None:
    Drafters(None, ("lookup",), store_folder=tmp_path).remember("question", "answer")
    assert list(tmp_path.iterdir()) == []


async def test_translated_streams_equal_the_clouds_own(other_gguf: Path, service: InProcessCloud) -> None:
    request = Open(
        prompt=(Message("user", "émigré 你好 🦀 <|im_end|> \u0065\u0301"),),
        sampling=Sampling(),
        seed=0,
        max_tokens=64,
    )
    async with loaded_edge(other_gguf) as edge, connection(service.address) as cloud:
        drafters = Drafters(edge, ("lookup", "model"))
        assert (await speculate(drafters, cloud, request, 6)).token_ids == (
            await generate(cloud, request)
        ).token_ids


# The command


@pytest.fixture(scope="module")
def running(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    with running_cloud(tiny_pair.target_gguf, cache_type="f32") as cloud:
        yield cloud


def test_duet_ask_runs_without_a_model(running: RunningServer, tmp_path: Path) -> None:
    arguments = ("ask", "the river", "--cloud", running.address, "--max-tokens", "32", "--json")
    copied = run_duet(*arguments, "--mode", "speculate", "--drafter", "lookup", folder=tmp_path)
    streamed = run_duet(*arguments, "--mode", "cloud", folder=tmp_path)
    assert copied.returncode == streamed.returncode == 0, copied.stderr
    assert json.loads(copied.stdout)["answer"] == json.loads(streamed.stdout)["answer"]
    assert json.loads(copied.stdout)["edge_model"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("--drafter", "lookup"), "--mode speculate", id="auto without a model"),
        pytest.param(("--mode", "local", "--drafter", "lookup"), "--drafter model", id="local without one"),
        pytest.param(("--drafter", "crystal-ball"), "'lookup'", id="an unknown drafter"),
        pytest.param(("--drafter", "model", "--drafter", "model"), "once", id="one drafter twice"),
    ],
)
def test_drafters_that_cannot_be_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = run_duet("ask", "hello", *arguments, folder=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr.decode()
    assert result.stderr.decode().count("\n") == 1


def test_duet_store_adds_lists_and_clears_and_retrieval_uses_it(
    running: RunningServer, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    env = {"DUET_STORE_DIR": str(tmp_path / "store"), "DUET_MODEL": str(tiny_pair.draft_gguf)}

    def duet(*arguments: str) -> tuple[int, str]:
        result = run_duet(*arguments, folder=tmp_path, env=env)
        return result.returncode, (result.stdout + result.stderr).decode()

    ask = ("ask", "the river", "--cloud", running.address, "--mode", "speculate", "--drafter", "retrieval")
    code, line = duet(*ask)
    assert code == 2
    assert "duet store add" in line
    (tmp_path / "notes.txt").write_text("the river counts nine stones <|im_end|> 🦀")
    assert duet("store", "add", "notes.txt")[0] == 0
    assert "there already" in duet("store", "add", "notes.txt")[1]
    assert "notes.txt" in duet("store", "list")[1]
    assert duet(*ask)[0] == 0
    (tmp_path / "key.txt").write_text("my password is hunter2222")
    code, line = duet("store", "add", "key.txt")
    assert code == 4
    assert "--allow-private" in line
    assert "hunter" not in line
    assert duet("store", "add", "key.txt", "--allow-private")[0] == 0
    [database] = (tmp_path / "store").glob("*.sqlite")
    database.write_bytes(b"garbage" * 1000)
    for arguments in (("store", "list"), ask, ("store", "add", "notes.txt")):
        code, line = duet(*arguments)
        assert code == 2
        assert "duet store clear" in line
        assert line.count("\n") == 1
    assert duet("store", "clear") == (0, "The store is cleared.\n")
    assert "Nothing is stored" in duet("store", "list")[1]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"\x00\xff\xfe", "UTF-8"), (None, "cannot read")]
)
def test_files_that_cannot_be_stored_are_one_line(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    result = run_duet("store", "add", "file", folder=tmp_path)
    assert result.returncode == 4
    assert words in result.stderr.decode()
    assert result.stderr.decode().count("\n") == 1
