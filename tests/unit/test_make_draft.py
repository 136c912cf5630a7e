"""Cutting a draft from a target, the adapter's file, and how acceptance is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from cloud_service.make_draft.acceptance import Agreement, acceptance
from cloud_service.make_draft.adapter import Adapter
from cloud_service.make_draft.cut import cut, interleave_heads
from cloud_service.make_draft.texts import pack, read_texts
from shared.errors import InvalidSetting, ModelFileInvalid, ModelUnsupported
from tests.tiny_pair import FFN_SIZE, HEAD_DIM, HIDDEN_SIZE, TinyPair, write_hybrid_gguf


def adapter(sha256: str = "a" * 64, num_layers: int = 1) -> Adapter:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    attention = {
        f"self_attn.{name}_proj.{kind}": normal(*((size, HIDDEN_SIZE) if kind == "weight" else (size,)))
        for name, size in (("q", HIDDEN_SIZE), ("k", HEAD_DIM), ("v", HEAD_DIM))
        for kind in ("weight", "bias")
    }
    return Adapter(
        sha256,
        num_layers,
        attention
        | {
            "self_attn.o_proj.weight": normal(HIDDEN_SIZE, HIDDEN_SIZE),
            "input_layernorm.weight": normal(HIDDEN_SIZE),
            "norm.weight": normal(HIDDEN_SIZE),
        },
    )


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def value(path: Path, name: str) -> object:
    field = GGUFReader(path).get_field(name)
    return None if field is None else field.contents()


def test_a_draft_keeps_the_first_layers_the_words_and_the_head(tiny_pair: TinyPair, tmp_path: Path) -> None:
    out = tmp_path / "draft.gguf"
    made = cut(tiny_pair.target_gguf, "a" * 64, 1, None, out)
    assert (made.num_layers, made.num_blocks) == (1, 2)
    whole, kept = tensors(tiny_pair.target_gguf), tensors(out)
    assert kept.keys() == {name for name in whole if not name.startswith("blk.1.")}
    for name in kept:
        np.testing.assert_array_equal(kept[name], whole[name])
    for name in ("tokenizer.ggml.tokens", "tokenizer.chat_template", "qwen2.rope.freq_base"):
        assert value(out, name) == value(tiny_pair.target_gguf, name)


def test_a_draft_names_its_target(tiny_pair: TinyPair, tmp_path: Path) -> None:
    out = tmp_path / "draft.gguf"
    cut(tiny_pair.target_gguf, "a" * 64, 1, adapter(), out)
    assert value(out, "duet.draft.target_sha256") == "a" * 64
    assert value(out, "duet.draft.num_layers") == 1
    assert value(out, "duet.draft.adapter") is True
    assert value(out, "general.name") == "target cut at 1"
    assert value(out, "qwen2.block_count") == 2


def test_the_adapter_is_a_block_whose_feed_forward_layer_adds_nothing(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    out = tmp_path / "draft.gguf"
    cut(tiny_pair.target_gguf, "a" * 64, 1, adapter(), out)
    written = tensors(out)
    assert written["blk.1.ffn_down.weight"].shape == (HIDDEN_SIZE, FFN_SIZE)
    assert not written["blk.1.ffn_down.weight"].any()
    np.testing.assert_array_equal(written["blk.1.attn_v.bias"], adapter().tensors["self_attn.v_proj.bias"])
    np.testing.assert_array_equal(written["output_norm.weight"], adapter().tensors["norm.weight"])


def test_cost_counts_what_a_token_reads(tiny_pair: TinyPair, tmp_path: Path) -> None:
    bare = cut(tiny_pair.target_gguf, "a" * 64, 1, None, tmp_path / "bare.gguf")
    with_adapter = cut(tiny_pair.target_gguf, "a" * 64, 1, adapter(), tmp_path / "adapter.gguf")
    whole = tensors(tiny_pair.target_gguf)
    read = sum(tensor.size for name, tensor in whole.items() if name != "token_embd.weight")
    assert bare.num_target_weights == read
    assert bare.num_draft_weights == read - sum(t.size for n, t in whole.items() if n.startswith("blk.1."))
    assert with_adapter.cost == 1  # as deep as the tiny target


def test_neighbouring_rows_of_a_llama_head_are_a_rotary_pair() -> None:
    # Two heads of four rows: in Hugging Face's order row i turns with row i + 2.
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleave_heads(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("layers", [0, 2, 99])
def test_layers_that_the_target_does_not_have_are_refused(
    tiny_pair: TinyPair, tmp_path: Path, layers: int
) -> None:
    with pytest.raises(InvalidSetting, match=f"must be from 1 to 1, as the target has 2; got {layers}"):
        cut(tiny_pair.target_gguf, "a" * 64, layers, None, tmp_path / "draft.gguf")
    assert not list(tmp_path.iterdir())


def test_a_target_of_another_family_is_refused(tmp_path: Path) -> None:
    write_hybrid_gguf(tmp_path / "hybrid.gguf")
    with pytest.raises(ModelUnsupported, match="families llama and qwen2; this target is 'jamba'"):
        cut(tmp_path / "hybrid.gguf", "a" * 64, 1, None, tmp_path / "draft.gguf")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target.gguf").write_bytes(b"not a model at all, but long enough to be read as a header")
    with pytest.raises(ModelFileInvalid, match="cannot be read as GGUF"):
        cut(tmp_path / "target.gguf", "a" * 64, 1, None, tmp_path / "draft.gguf")


def test_the_target_is_never_written_over(tiny_pair: TinyPair) -> None:
    before = tiny_pair.target_gguf.read_bytes()
    with pytest.raises(InvalidSetting, match="is the target itself"):
        cut(tiny_pair.target_gguf, "a" * 64, 1, None, tiny_pair.target_gguf)
    assert tiny_pair.target_gguf.read_bytes() == before


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (adapter(sha256="b" * 64), "belongs to a target of sha256 bbbbbbbbbbbb"),
        (adapter(num_layers=5), "trained on top of 5 layers: use --layers 5"),
    ],
)
def test_an_adapter_of_another_target_is_refused(
    tiny_pair: TinyPair, tmp_path: Path, found: Adapter, message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        cut(tiny_pair.target_gguf, "a" * 64, 1, found, tmp_path / "draft.gguf")


def test_an_adapter_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    adapter().save(tmp_path / "a.safetensors")
    read = Adapter.load(tmp_path / "a.safetensors")
    assert (read.target_sha256, read.num_layers) == ("a" * 64, 1)
    for name, expected in adapter().tensors.items():
        np.testing.assert_array_equal(read.tensors[name], expected)


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    expected = {"other": "is not an adapter", "text": "cannot be read", "gone": "cannot be read"}
    for name, message in expected.items():
        with pytest.raises(InvalidSetting, match=message):
            Adapter.load(tmp_path / f"{name}.safetensors")


def test_texts_come_from_json_lines_or_a_plain_file(tmp_path: Path) -> None:
    lines = ('{"text": "one"}', "", '{"question": "two", "answer": "no"}', '{"prompt": "three"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("all of it\nis one text")
    assert read_texts(tmp_path / "a.jsonl") == ["one", "two", "three"]
    assert read_texts(tmp_path / "b.txt") == ["all of it\nis one text"]


def test_only_newlines_part_json_lines(tmp_path: Path) -> None:
    texts = ["one\u2028two\u2029", "three\x85four"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    assert read_texts(tmp_path / "a.jsonl") == texts


@pytest.mark.parametrize("line", ["not json", "[1]", '{"other": 1}'])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + line)
    with pytest.raises(InvalidSetting, match=r"a\.jsonl, line 3: expected a JSON object with text"):
        read_texts(tmp_path / "a.jsonl")


def test_a_corpus_keeps_a_tenth_for_validation() -> None:
    corpus = pack(["x" * 1000, "y" * 1000], lambda text: [ord(c) for c in text], 0, 50)
    assert corpus.training.shape == (36, 50)
    assert corpus.validation.shape == (4, 50)
    assert corpus.training.ravel()[1000] == 0  # the end of the first text


def test_a_text_too_short_to_train_on_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="has 11 tokens, and 320 are the least"):
        pack(["x" * 10], lambda text: [1] * len(text), 0, 32)


def agreement(agrees: list[bool], top_prob: list[float] | None = None) -> Agreement:
    probs = np.array([top_prob or [1.0] * len(agrees)], np.float32)
    return Agreement(np.array([agrees]), probs)


def test_a_round_commits_what_is_accepted_and_one_token_more() -> None:
    # Drafts of 2: [y n], [y y], [n .]; each round goes on behind its own correction.
    found = acceptance(agreement([True, False, True, True, False, False, True]), 2, 0.0)
    assert found.by_position == (2 / 3, 1 / 3)
    assert found.compression_rate == (2 + 3 + 1) / 3
    assert found.mean_draft_tokens == 2


def test_an_unlikely_token_ends_a_draft_and_is_not_sent() -> None:
    found = acceptance(agreement([True] * 6, [0.9, 0.1, 0.9, 0.9, 0.9, 0.9]), 2, 0.5)
    # [0.9 0.1], whose second is not sent, then [0.9 0.9], then too little is left.
    assert found.by_position == (1.0, 1.0)
    assert found.compression_rate == (2 + 3) / 2
    assert found.mean_draft_tokens == 2


def test_speed_weighs_tokens_against_drafting() -> None:
    found = acceptance(agreement([True] * 9), 2, 0.0)
    assert found.compression_rate == 3
    assert found.speed_up(0.25) == 3 / 1.5


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=12, max_size=60),
    st.integers(1, 8),
    st.floats(0, 1),
)
def test_a_pass_commits_between_one_token_and_the_whole_draft_and_one(
    positions: list[tuple[bool, float]], cap: int, threshold: float
) -> None:
    agrees, probs = zip(*positions, strict=True)
    found = acceptance(agreement(list(agrees), list(probs)), cap, threshold)
    assert 1 <= found.compression_rate <= cap + 1
    assert found.compression_rate <= 1 + found.mean_draft_tokens
