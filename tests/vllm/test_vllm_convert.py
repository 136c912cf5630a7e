"""`duet-cloud convert` writes the folder that the model came from: same weights, words, ends and chats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_service.targets.hf_text import HfText
from shared.llama import LlamaModel
from shared.messages import Message
from tests.service import run_duet
from tests.tiny_pair import PADDED_VOCAB_SIZE, TinyPair

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def converted(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "target"
    ended = run_duet(
        *("convert", str(tiny_pair.target_gguf), str(folder), "--dtype=float32"),
        folder=folder.parent,
        program="duet-cloud",
    )
    assert ended.returncode == 0, ended.stderr
    assert f"--model {folder}".encode() in ended.stdout
    return folder


@pytest.fixture(scope="module")
def in_gguf(tiny_pair: TinyPair) -> Iterator[LlamaModel]:
    model = LlamaModel(tiny_pair.target_gguf, "target")
    yield model
    model.close()


def test_weights_are_the_same(tiny_pair: TinyPair, converted: Path) -> None:
    original = load_file(tiny_pair.target_hf / "model.safetensors")
    written = load_file(converted / "model.safetensors")
    assert original.keys() == written.keys()
    for name in original:
        np.testing.assert_array_equal(written[name], original[name])


def test_words_ends_and_chats_are_the_same(in_gguf: LlamaModel, converted: Path) -> None:
    text = HfText.load(str(converted), "target", vocab_size=PADDED_VOCAB_SIZE)
    assert text.vocabulary.sha256 == in_gguf.vocabulary.sha256
    assert text.end_token_ids == in_gguf.end_token_ids
    chat = [Message("user", "  éà 你好 in the 12 thing")]
    assert text.render_chat(chat) == in_gguf.render_chat(chat)


def test_a_folder_that_is_in_use_is_left_alone(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    ended = run_duet("convert", str(tiny_pair.target_gguf), ".", folder=tmp_path, program="duet-cloud")
    assert (ended.returncode, ended.stderr) == (2, b"duet-cloud: . is there already; name a new folder\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_type_is_refused_before_any_work(tiny_pair: TinyPair, tmp_path: Path) -> None:
    ended = run_duet(
        *("convert", str(tiny_pair.target_gguf), "out", "--dtype=int4"),
        folder=tmp_path,
        program="duet-cloud",
    )
    assert (ended.returncode, list(tmp_path.iterdir())) == (2, [])
    assert b"bfloat16, float16, float32" in ended.stderr
