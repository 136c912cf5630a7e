"""An early exit in PyTorch, its training, and the GGUF model that is cut from the same target."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cloud_service.make_draft import training
from cloud_service.make_draft.acceptance import Agreement
from cloud_service.make_draft.adapter import Adapter
from cloud_service.make_draft.answers import answered
from cloud_service.make_draft.cut import cut
from cloud_service.make_draft.early_exit import EarlyExit, Target, hidden_after, load_target
from cloud_service.make_draft.texts import Corpus
from cloud_service.make_draft.training import Progress, Schedule, train
from shared.errors import InvalidSetting
from shared.messages import Open
from shared.sampling import Sampling
from tests.service import TargetAlone, run_duet
from tests.tiny_pair import NUM_PLAIN_TOKENS, TinyPair, write_tiny_llama_gguf

pytestmark = pytest.mark.vllm  # what this environment has and the other has not is PyTorch

# The models are too small for two threads, which would wait for each other.
torch.set_num_threads(1)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

SHA256 = "a" * 64
SCHEDULE = Schedule(num_layers=1, num_steps=60, batch=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def target(tiny_pair: TinyPair) -> Target:
    return load_target(tiny_pair.target_gguf, SHA256, "cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Random tokens: the target is random, too, and says something of any text."""
    sequences = np.random.default_rng(0).integers(0, NUM_PLAIN_TOKENS, (80, 32))
    return Corpus(sequences[:-8], sequences[-8:])


@pytest.fixture(scope="module")
def trained(target: Target, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return train(target, corpus, SCHEDULE, tmp_path_factory.mktemp("trained") / "state", lambda _: None)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, NUM_PLAIN_TOKENS, rng.integers(1, 40)).tolist() for _ in range(50)]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_llama_cpp_drafts_as_the_early_exit_does(
    tiny_pair: TinyPair, tmp_path: Path, family: str, with_adapter: bool
) -> None:
    """Greedy and in float32, on 50 prompts."""
    gguf = tiny_pair.target_gguf
    if family == "llama":
        gguf = tmp_path / "llama.gguf"
        write_tiny_llama_gguf(gguf)
    target = load_target(gguf, SHA256, "cpu")
    draft = EarlyExit(target, 1, adapter=with_adapter)
    adapter = scrambled(draft.adapter(target)) if with_adapter else None
    if adapter is not None:
        draft.load(adapter)
    out = tmp_path / "draft.gguf"
    cut(gguf, SHA256, 1, adapter, out)
    with closing(TargetAlone(out)) as exported:
        for prompt in prompts():
            request = Open(prompt=tuple(prompt), sampling=Sampling(), seed=0, max_tokens=8)
            written = exported.complete(request)
            assert written == draft.greedy(prompt, len(written))


def scrambled(adapter: Adapter) -> Adapter:
    """Moved away from the target's own block, so that a wrong tensor would show."""
    rng = np.random.default_rng(2)
    return dataclasses.replace(
        adapter,
        tensors={
            name: each + 0.05 * rng.standard_normal(each.shape).astype(np.float32)
            for name, each in adapter.tensors.items()
        },
    )


def test_training_brings_the_draft_nearer_to_its_target(
    target: Target, corpus: Corpus, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    train(target, corpus, SCHEDULE, tmp_path / "state", seen.append)
    first, last = np.mean([p.loss for p in seen[:5]]), np.mean([p.loss for p in seen[-5:]])
    measured = [p.agreement for p in seen if p.agreement is not None]
    print(f"loss {first:.2f} to {last:.2f} nats, agreement {measured}")
    assert last < 0.8 * first
    assert [p.step for p in seen if p.agreement is not None] == [50, 60]


@pytest.mark.parametrize("rows", [7, 10_000])
def test_the_gradient_that_is_written_out_is_autograds(
    target: Target, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """In chunks and in one piece."""
    monkeypatch.setattr(training, "CHUNK_ROWS", rows)
    draft = EarlyExit(target, 1, adapter=True)
    draft.load(scrambled(draft.adapter(target)))
    weights = [each for each in draft.parameters() if each.requires_grad]
    sequences = corpus.training[:4]
    hidden, last = hidden_after(target, torch.from_numpy(sequences), 1)
    wanted, found = (target.head(each).log_softmax(-1).flatten(0, 1) for each in (last, draft(hidden)))
    loss = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    expected = torch.autograd.grad(loss, weights)

    assert training.learn(target, draft, 1, sequences) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close([each.grad for each in weights], list(expected))


def test_agreement_is_measured_on_a_part_while_it_learns_and_on_all_at_the_end(
    target: Target, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    real = training.measure

    def measure(target: Target, draft: EarlyExit, num_layers: int, sequences: np.ndarray) -> Agreement:
        seen.append(sequences)
        return real(target, draft, num_layers, sequences)

    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(training, "MEASURED_SEQUENCES", 3)
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    short = dataclasses.replace(SCHEDULE, num_steps=2)
    train(target, corpus, short, tmp_path / "state", lambda _: None)
    part, whole = seen
    # Of eight, from all over: the text may be sorted.
    np.testing.assert_array_equal(part, corpus.validation[[0, 3, 6]])
    np.testing.assert_array_equal(whole, corpus.validation)


def test_answers_keep_the_questions_order_whatever_is_answered_together(
    target: Target, tmp_path: Path
) -> None:
    # JSON leaves these separators as they are, and they do not part lines.
    questions = [f"{n}\u2028\x85 " + "word " * (5 * n % 17) for n in range(20)]
    together = answered(target, questions, 8, tmp_path / "together", lambda _: None)
    alone = [
        text
        for n, question in enumerate(questions)
        for text in answered(target, [question], 8, tmp_path / f"alone{n}", lambda _: None)
    ]
    assert together == alone

    written = (tmp_path / "together").read_bytes()
    lines = written.splitlines(keepends=True)
    within_a_character = lines[3].index("\u2028".encode()) + 1
    (tmp_path / "cut").write_bytes(b"".join(lines[:3]) + lines[3][:within_a_character])
    seen: list[int] = []
    assert answered(target, questions, 8, tmp_path / "cut", seen.append) == together
    assert (tmp_path / "cut").read_bytes() == written
    assert (seen[0], seen[-1]) == (3, 20)


def test_a_training_that_was_killed_goes_on_to_the_same_adapter(
    target: Target, corpus: Corpus, tmp_path: Path, trained: Adapter
) -> None:
    class Killed(Exception):
        pass

    def die_after_the_first_state(progress: Progress) -> None:
        if progress.step == 55:
            raise Killed

    with pytest.raises(Killed):
        train(target, corpus, SCHEDULE, tmp_path / "state", die_after_the_first_state)
    steps: list[int] = []
    resumed = train(target, corpus, SCHEDULE, tmp_path / "state", lambda p: steps.append(p.step))
    assert steps == list(range(51, 61))
    for name, expected in trained.tensors.items():
        np.testing.assert_array_equal(resumed.tensors[name], expected)


def test_the_state_of_another_training_is_refused(target: Target, corpus: Corpus, tmp_path: Path) -> None:
    short = dataclasses.replace(SCHEDULE, num_steps=1)
    train(target, corpus, short, tmp_path / "state", lambda _: None)
    with pytest.raises(InvalidSetting, match="belongs to another training"):
        train(target, corpus, SCHEDULE, tmp_path / "state", lambda _: None)


def test_an_adapter_of_other_widths_is_refused(target: Target, trained: Adapter) -> None:
    narrow = dataclasses.replace(trained, tensors={**trained.tensors, "norm.weight": np.ones(3, np.float32)})
    with pytest.raises(InvalidSetting, match="the adapter does not fit"):
        EarlyExit(target, 1, adapter=True).load(narrow)


def test_the_commands_train_compare_and_cut(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(
        "\n".join(f'{{"question": "What is the {n}th thing and the other in it?"}}' for n in range(24))
    )
    target = str(tiny_pair.target_gguf)

    def make_draft(*arguments: str) -> tuple[list[str], str]:
        ended = run_duet("make-draft", *arguments, folder=tmp_path, program="duet-cloud", env=ONE_THREAD)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.decode().splitlines(), ended.stderr.decode()

    on_cpu = ("--length=32", "--device=cpu")
    _, said = make_draft(
        *("train", target, "a.safetensors", "--layers=1", "--text=questions.jsonl"),
        *("--answers=24", "--steps=2", *on_cpu),
    )
    assert "step 2: loss" in said
    answers = "a.safetensors.answers.jsonl"
    assert len((tmp_path / answers).read_text().splitlines()) == 24

    table, _ = make_draft(
        *("search", target, "--layers=1", "--adapter=a.safetensors", f"--text={answers}"),
        *("--threshold=0", *on_cpu),
    )
    assert [line.split()[:3] for line in table[1:]] == [["1", "no", "0"], ["1", "yes", "0"]]

    [wrote], _ = make_draft(target, "d.gguf", "--layers=1", "--adapter=a.safetensors")
    assert wrote.startswith("wrote d.gguf: 1 of 2 layers and the adapter, 100% of the target's weights")
    with closing(TargetAlone(tmp_path / "d.gguf")) as exported:
        assert exported.complete(Open(prompt=(1, 2, 3), sampling=Sampling(), seed=0, max_tokens=4))


def test_a_text_too_short_is_a_line_that_says_so(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    ended = run_duet(
        *("make-draft", "train", str(tiny_pair.target_gguf), "a.safetensors", "--layers=1"),
        *("--text=short.txt", "--device=cpu"),
        folder=tmp_path,
        program="duet-cloud",
        env=ONE_THREAD,
    )
    assert ended.returncode == 2
    assert b"duet-cloud: the text has 9 tokens" in ended.stderr
