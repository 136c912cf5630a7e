"""The tiny pair is what other tests take it for: a pair that drafts well but not perfectly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import jinja2
import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tests.tiny_pair import (
    END_OF_TEXT_ID,
    IM_END_ID,
    NUM_LAYERS,
    NUM_TOKENS,
    PADDED_VOCAB_SIZE,
    TARGET_SEED,
    TinyPair,
    write_hybrid_gguf,
    write_tiny_model,
    write_tiny_pair,
)

pytestmark = pytest.mark.engine

PROMPTS = [
    "Hello",
    "Tell me a story.",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):",
    "éà 你好",
]
TEXT_LENGTH = 200


class Scorer:
    """A model in llama.cpp that gives the logits after every token, computed in float32 throughout.

    That takes a float32 cache and no flash attention, which rounds keys and values to float16.
    """

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
        self.vocab = llama_cpp.llama_model_get_vocab(self._llama.model)

    def tokenize(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def text_bytes(self, token_ids: list[int]) -> bytes:
        return self._llama.detokenize(token_ids, special=True)

    def rows(self, token_ids: list[int], batch_size: int) -> NDArray[np.float32]:
        """[len(token_ids), vocab_size], the logits after each token, scored batch_size at a time."""
        self._llama.reset()
        for start in range(0, len(token_ids), batch_size):
            self._llama.eval(token_ids[start : start + batch_size])
        return self._llama.scores[: len(token_ids)].copy()

    def continue_greedily(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        self._llama.reset()
        pending, text = prompt_ids, []
        for _ in range(num_tokens):
            self._llama.eval(pending)
            pending = [int(self._llama.scores[self._llama.n_tokens - 1].argmax())]
            text += pending
        return text

    def close(self) -> None:
        self._llama.close()


@dataclass(frozen=True)
class Text:
    """What the target writes after one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]

    def rows_of(self, scorer: Scorer, batch_size: int = 512) -> NDArray[np.float32]:
        """[TEXT_LENGTH, vocab_size]: row i is what `scorer` predicts where the text has token i."""
        rows = scorer.rows(self.prompt_ids + self.token_ids, batch_size)
        return rows[len(self.prompt_ids) - 1 : -1]


@pytest.fixture(scope="module")
def target(tiny_pair: TinyPair) -> Iterator[Scorer]:
    with closing(Scorer(tiny_pair.target_gguf)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def draft(tiny_pair: TinyPair) -> Iterator[Scorer]:
    with closing(Scorer(tiny_pair.draft_gguf)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def texts(target: Scorer) -> list[Text]:
    prompts = [target.tokenize(prompt) for prompt in PROMPTS]
    return [Text(prompt, target.continue_greedily(prompt, TEXT_LENGTH)) for prompt in prompts]


@pytest.fixture(scope="module")
def target_rows(target: Scorer, texts: list[Text]) -> NDArray[np.float32]:
    """[num_prompts * TEXT_LENGTH, vocab_size]."""
    return np.concatenate([text.rows_of(target) for text in texts])


# What is written


def test_equal_calls_write_equal_bytes(tmp_path):
    write_tiny_pair(tmp_path / "once")
    write_tiny_pair(tmp_path / "again")
    once, again = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
                   for d in (tmp_path / "once", tmp_path / "again"))  # fmt: skip
    assert len(once) == 12
    assert once == again


@pytest.mark.parametrize("side", ["target", "draft"])
def test_both_formats_hold_the_same_tensors(tiny_pair, side):
    in_hf = load_file(getattr(tiny_pair, f"{side}_hf") / "model.safetensors")
    in_gguf = gguf_tensors(getattr(tiny_pair, f"{side}_gguf"))
    assert len(in_hf) == len(in_gguf) == 3 + 12 * NUM_LAYERS
    for hf_name, gguf_name in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.q_proj.bias": "blk.0.attn_q.bias",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }.items():
        np.testing.assert_array_equal(in_hf[hf_name], in_gguf[gguf_name])
    assert sorted(t.tobytes() for t in in_hf.values()) == sorted(t.tobytes() for t in in_gguf.values())


def test_both_formats_give_each_id_the_same_text(tiny_pair, target):
    tokenizer = Tokenizer.from_file(str(tiny_pair.target_hf / "tokenizer.json"))
    tokens = gguf_tokens(tiny_pair.target_gguf)
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    assert [tokenizer.id_to_token(token_id) for token_id in range(NUM_TOKENS)] == tokens[:NUM_TOKENS]
    assert target.text_bytes(list(range(256))) == bytes(range(256))


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "the thing and the other one's, in at",
        "  two  spaces\tand\n\nlines \r\n end ",
        "numbers 1234567 and x=3.14; def f(x):\n    return x\n",
        "emoji 🙂👩‍👩‍👧 and flags 🇫🇷",
        "你好，世界。日本語テキスト",
        "Café e\u0301 ẞ ﬁ \u00a0 \u200b",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|> [PAD280] <|im_other|>",
    ],
)
def test_both_formats_split_text_alike(tiny_pair, target, text):
    tokenizer = Tokenizer.from_file(str(tiny_pair.target_hf / "tokenizer.json"))
    token_ids = target.tokenize(text)
    assert token_ids == tokenizer.encode(text).ids
    assert target.text_bytes(token_ids) == text.encode()
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


def test_merges_apply_and_chain(target):
    assert [target.text_bytes([t]) for t in target.tokenize("in the thing and")] == [
        b"in", b" the", b" t", b"h", b"ing", b" and",
    ]  # fmt: skip


def test_a_chat_reads_as_chatml_in_both_formats(tiny_pair):
    in_hf = json.loads((tiny_pair.target_hf / "tokenizer_config.json").read_text())["chat_template"]
    in_gguf = gguf_field(tiny_pair.target_gguf, "tokenizer.chat_template")
    assert in_gguf == in_hf
    as_transformers = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = as_transformers.from_string(in_hf).render(
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_same_two_tokens_end_a_text_in_both_formats(tiny_pair, target):
    is_end = [
        token_id
        for token_id in range(PADDED_VOCAB_SIZE)
        if llama_cpp.llama_vocab_is_eog(target.vocab, token_id)
    ]
    in_hf = json.loads((tiny_pair.target_hf / "generation_config.json").read_text())["eos_token_id"]
    assert is_end == sorted(in_hf) == [END_OF_TEXT_ID, IM_END_ID]


# How the pair behaves


def test_the_draft_agrees_with_the_target_on_60_to_85_percent_of_positions(texts, draft):
    agreed = [text.rows_of(draft).argmax(axis=1) == text.token_ids for text in texts]
    assert 0.60 < np.mean(agreed) < 0.85
    assert all(0.5 < share < 0.95 for share in np.mean(agreed, axis=1))


def test_the_target_is_unsure_but_not_clueless(target_rows):
    probs = softmax(target_rows)
    entropies = -np.sum(probs * np.log(probs), axis=1)
    assert 1.5 < entropies.mean() < 4.0


def test_near_ties_are_rare(target_rows):
    runner_up, top = np.sort(target_rows, axis=1)[:, -2:].T
    assert np.mean(top - runner_up < 1e-3) < 0.005
    assert np.mean(top - runner_up < 1e-2) < 0.05


def test_a_batch_of_8_and_single_steps_choose_the_same_tokens(texts, target):
    for text in texts:
        assert text.rows_of(target, batch_size=8).argmax(axis=1).tolist() == text.token_ids
        np.testing.assert_allclose(
            text.rows_of(target, batch_size=8), text.rows_of(target, batch_size=1), atol=1e-4
        )


def test_greedy_text_depends_on_the_prompt(texts):
    assert len({tuple(text.token_ids[:16]) for text in texts}) == len(PROMPTS)


def test_greedy_text_does_not_end_in_a_loop(texts):
    for text in texts:
        assert len(set(text.token_ids[-100:])) > 30


def test_greedy_text_runs_on_and_sometimes_ends(texts):
    lengths = [
        next((i for i, t in enumerate(text.token_ids) if t in (END_OF_TEXT_ID, IM_END_ID)), TEXT_LENGTH)
        for text in texts
    ]
    assert min(lengths) >= 32
    assert min(lengths) < TEXT_LENGTH


def test_greedy_text_holds_bytes_that_are_no_characters_of_their_own(texts, target):
    assert any(128 <= token_id < 256 for text in texts for token_id in text.token_ids)


def test_padding_rows_have_some_probability_but_never_win(target_rows):
    assert target_rows.shape[1] == PADDED_VOCAB_SIZE > NUM_TOKENS
    assert softmax(target_rows)[:, NUM_TOKENS:].sum(axis=1).mean() > 1e-3
    assert target_rows.argmax(axis=1).max() < NUM_TOKENS


# The odd ones out


def test_more_padding_leaves_every_token_as_it_was(tmp_path, tiny_pair):
    padded = write_tiny_model(tmp_path, name="padded", seed=TARGET_SEED, padded_vocab_size=320)
    wider = load_file(padded.hf / "model.safetensors")
    usual = load_file(tiny_pair.target_hf / "model.safetensors")
    for name in usual:
        np.testing.assert_array_equal(wider[name][:NUM_TOKENS], usual[name][:NUM_TOKENS])
    assert gguf_tokens(padded.gguf)[:NUM_TOKENS] == gguf_tokens(tiny_pair.target_gguf)[:NUM_TOKENS]
    with closing(Scorer(padded.gguf)) as scorer:
        assert scorer.rows([1, 2, 3], batch_size=3).shape == (3, 320)


def test_rotated_bytes_make_a_vocabulary_of_other_meaning(tmp_path, tiny_pair):
    rotated = write_tiny_model(tmp_path, name="rotated", seed=TARGET_SEED, rotate_bytes_by=7)
    tokens, usual = gguf_tokens(rotated.gguf), gguf_tokens(tiny_pair.target_gguf)
    assert sorted(tokens) == sorted(usual)
    assert all(a != b for a, b in zip(tokens[:256], usual[:256], strict=True))
    assert tokens[256:] == usual[256:]
    with closing(Scorer(rotated.gguf)) as scorer:
        assert scorer.text_bytes([0, 255]) == bytes([7, 6])
        hf_ids = Tokenizer.from_file(str(rotated.hf / "tokenizer.json")).encode("Hi the 你").ids
        assert scorer.tokenize("Hi the 你") == hf_ids


def test_the_hybrid_model_decodes_but_cannot_roll_back(tmp_path):
    write_hybrid_gguf(tmp_path / "hybrid.gguf")
    model = llama_cpp.llama_model_load_from_file(
        str(tmp_path / "hybrid.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    assert model, "llama.cpp does not load the file"
    assert llama_cpp.llama_model_is_hybrid(model)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 64
    params.n_rs_seq = 8
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        assert llama_cpp.llama_n_rs_seq(context) == 0
        tokens = (llama_cpp.llama_token * 10)(*range(65, 75))
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 10)) == 0
        assert not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, 7, -1)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


# Helpers


def softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(rows.astype(np.float64) - rows.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def gguf_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def gguf_field(path: Path, key: str) -> object:
    field = gguf.GGUFReader(path).get_field(key)
    assert field is not None
    return field.contents()


def gguf_tokens(path: Path) -> list[str]:
    tokens = gguf_field(path, "tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    return tokens
