"""A draft and a target that the tests make themselves: random Qwen2 models of 0.1 million weights.

Each model is written twice from the very same tensors: as float32 GGUF for llama.cpp and as a Hugging
Face folder for vLLM. The draft is the target plus noise, so that it is right often but not always. The
scales below are chosen so that greedy text neither loops at once nor ends at once, holds some multi-byte
characters and has few near-ties; tests/engine/test_tiny_pair.py holds them to that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 2
NUM_KV_HEADS = 1
HEAD_DIM = 32
FFN_SIZE = 128
CONTEXT_LENGTH = 65536
ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-6

MERGES = (
    ("Ġ", "t"), ("Ġ", "a"), ("h", "e"), ("i", "n"), ("r", "e"), ("o", "n"), ("Ġt", "he"), ("e", "r"),
    ("a", "t"), ("n", "d"), ("o", "r"), ("e", "s"), ("i", "s"), ("i", "t"), ("e", "n"), ("a", "n"),
    ("Ċ", "Ċ"), ("in", "g"), ("a", "l"), ("Ġa", "nd"),
)  # fmt: skip
"""In order of rank, in GPT-2's alphabet, where Ġ stands for the space and Ċ for the newline."""

OTHER_MERGES = (
    *MERGES[:6],
    ("o", "u"), ("e", "d"), ("Ġ", "s"), ("a", "r"), ("s", "t"), ("Ġ", "c"), ("l", "l"), ("Ġ", "w"),
    ("v", "er"), ("o", "m"), ("l", "e"), ("Ġ", "b"), ("i", "c"), ("c", "h"),
)  # fmt: skip
"""As many, for a vocabulary of other tokens."""

NUM_PLAIN_TOKENS = 256 + len(MERGES)
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = range(NUM_PLAIN_TOKENS, NUM_PLAIN_TOKENS + 3)
SPECIALS = {"<|endoftext|>": END_OF_TEXT_ID, "<|im_start|>": IM_START_ID, "<|im_end|>": IM_END_ID}
NUM_TOKENS = NUM_PLAIN_TOKENS + len(SPECIALS)
"""Ids from here up to a model's vocab_size are padding rows: they have weights and no text."""
PADDED_VOCAB_SIZE = 288

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Qwen2's own, so that GGUF's `pre = qwen2` and tokenizer.json split text alike.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SSM_INNER_SIZE = 2 * HIDDEN_SIZE  # llama.cpp asks for this factor
_SSM_CONV_KERNEL = 4
_SSM_STATE_SIZE = 16
_SSM_RANK = 4

TARGET_SEED = 2
DRAFT_PERTURBATION = 0.045


@dataclass(frozen=True)
class TinyModel:
    """One model in both formats."""

    gguf: Path
    hf: Path


@dataclass(frozen=True)
class TinyPair:
    """A target and a draft of one vocabulary."""

    target_gguf: Path
    draft_gguf: Path
    target_hf: Path
    draft_hf: Path


def write_tiny_pair(folder: Path) -> TinyPair:
    """Write the pair under `folder`, which is made if missing; equal bytes every time."""
    target = write_tiny_model(folder, name="target", seed=TARGET_SEED)
    draft = write_tiny_model(folder, name="draft", seed=TARGET_SEED, perturbation=DRAFT_PERTURBATION)
    return TinyPair(target_gguf=target.gguf, draft_gguf=draft.gguf, target_hf=target.hf, draft_hf=draft.hf)


def write_tiny_model(
    folder: Path,
    *,
    name: str,
    seed: int,
    perturbation: float = 0.0,
    padded_vocab_size: int = PADDED_VOCAB_SIZE,
    rotate_bytes_by: int = 0,
    same_text: bool = False,
    merges: tuple[tuple[str, str], ...] = MERGES,
) -> TinyModel:
    """Write `name`.gguf and the folder `name`-hf.

    Args:
        seed: of the weights. Models of one seed differ only by the arguments below.
        perturbation: noise added to each matrix, in units of the matrix's own standard deviation.
        padded_vocab_size: rows of the embedding and the head, >= NUM_TOKENS. The rows below NUM_TOKENS
            do not depend on it.
        rotate_bytes_by: id i < 256 stands for the byte (i + rotate_bytes_by) % 256; anything but 0 gives
            a vocabulary of the same size that is incompatible.
        same_text: rotate the rows of embedding and head too, so that the model still writes the same bytes.
        merges: as many as MERGES; others give a vocabulary of other tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _weights(seed, perturbation, padded_vocab_size)
    if same_text:
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[table][:256] = np.roll(tensors[table][:256], -rotate_bytes_by, axis=0)
    vocabulary = _vocabulary(rotate_bytes_by, merges)
    model = TinyModel(gguf=folder / f"{name}.gguf", hf=folder / f"{name}-hf")
    _write_gguf(model.gguf, name, vocabulary, tensors, merges)
    _write_hf(model.hf, vocabulary, tensors, merges)
    return model


def write_tiny_llama_gguf(path: Path, seed: int = TARGET_SEED) -> None:
    """Write the tiny target's likeness in the llama family: no biases, rotary pairs in neighbouring rows."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, path.stem, num_kv_heads=NUM_KV_HEADS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(PADDED_VOCAB_SIZE)
    _add_tokenizer(writer, _vocabulary(rotate_bytes_by=0), PADDED_VOCAB_SIZE)
    weights = _weights(seed, 0.0, PADDED_VOCAB_SIZE)
    _add_tensors(writer, {name: each for name, each in weights.items() if not name.endswith(".bias")})
    _save(writer)


def write_hybrid_gguf(path: Path) -> None:
    """Write a model with one recurrent and one attention layer, whose memory llama.cpp cannot roll back.

    Jamba (arXiv:2403.19887): a Mamba layer keeps one running state per sequence. Not all hybrids do here:
    for LFM2, say, llama.cpp keeps snapshots of the state where the context asks for them (`n_rs_seq`).
    """
    writer = gguf.GGUFWriter(path, "jamba")
    _add_hyperparameters(writer, "hybrid", num_kv_heads=[0, NUM_KV_HEADS])  # without any: recurrent
    writer.add_ssm_conv_kernel(_SSM_CONV_KERNEL)
    writer.add_ssm_inner_size(_SSM_INNER_SIZE)
    writer.add_ssm_state_size(_SSM_STATE_SIZE)
    writer.add_ssm_time_step_rank(_SSM_RANK)
    _add_tokenizer(writer, _vocabulary(rotate_bytes_by=0), PADDED_VOCAB_SIZE)
    for name, tensor in _hybrid_weights().items():
        writer.add_tensor(name, tensor)
    _save(writer)


def _hybrid_weights() -> dict[str, NDArray[np.float32]]:
    """All tensors of `write_hybrid_gguf` by their GGUF names."""
    weights = _Draws(seed=0, perturbation=0.0)
    kv_size = NUM_KV_HEADS * HEAD_DIM
    tensors = {
        "token_embd.weight": weights.rows(PADDED_VOCAB_SIZE, np.ones(NUM_TOKENS)),
        "blk.0.ssm_in.weight": weights.matrix(2 * _SSM_INNER_SIZE, HIDDEN_SIZE, gain=1.0),
        "blk.0.ssm_conv1d.weight": weights.matrix(_SSM_INNER_SIZE, _SSM_CONV_KERNEL, gain=1.0),
        "blk.0.ssm_conv1d.bias": weights.bias(_SSM_INNER_SIZE),
        "blk.0.ssm_x.weight": weights.matrix(_SSM_RANK + 2 * _SSM_STATE_SIZE, _SSM_INNER_SIZE, gain=1.0),
        "blk.0.ssm_dt_norm.weight": weights.norm(_SSM_RANK),
        "blk.0.ssm_dt.weight": weights.matrix(_SSM_INNER_SIZE, _SSM_RANK, gain=1.0),
        "blk.0.ssm_dt.bias": weights.bias(_SSM_INNER_SIZE),
        "blk.0.ssm_b_norm.weight": weights.norm(_SSM_STATE_SIZE),
        "blk.0.ssm_c_norm.weight": weights.norm(_SSM_STATE_SIZE),
        "blk.0.ssm_a": np.full((_SSM_INNER_SIZE, _SSM_STATE_SIZE), -1.0, dtype=np.float32),
        "blk.0.ssm_d": weights.norm(_SSM_INNER_SIZE),
        "blk.0.ssm_out.weight": weights.matrix(HIDDEN_SIZE, _SSM_INNER_SIZE, gain=1.0),
        "blk.1.attn_q.weight": weights.matrix(HIDDEN_SIZE, HIDDEN_SIZE, gain=1.0),
        "blk.1.attn_k.weight": weights.matrix(kv_size, HIDDEN_SIZE, gain=1.0),
        "blk.1.attn_v.weight": weights.matrix(kv_size, HIDDEN_SIZE, gain=1.0),
        "blk.1.attn_output.weight": weights.matrix(HIDDEN_SIZE, HIDDEN_SIZE, gain=1.0),
    }
    for layer in range(NUM_LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": weights.norm(HIDDEN_SIZE),
            f"blk.{layer}.ffn_norm.weight": weights.norm(HIDDEN_SIZE),
            f"blk.{layer}.ffn_gate.weight": weights.matrix(FFN_SIZE, HIDDEN_SIZE, gain=1.0),
            f"blk.{layer}.ffn_up.weight": weights.matrix(FFN_SIZE, HIDDEN_SIZE, gain=1.0),
            f"blk.{layer}.ffn_down.weight": weights.matrix(HIDDEN_SIZE, FFN_SIZE, gain=1.0),
        }
    tensors["output_norm.weight"] = weights.norm(HIDDEN_SIZE)
    tensors["output.weight"] = weights.rows(PADDED_VOCAB_SIZE, _head_scales())
    return tensors


def _vocabulary(rotate_bytes_by: int, merges: tuple[tuple[str, str], ...] = MERGES) -> list[str]:
    """The texts of ids 0 to NUM_TOKENS - 1, plain ones in GPT-2's alphabet."""
    letters = _gpt2_alphabet()
    rotated = letters[rotate_bytes_by:] + letters[:rotate_bytes_by]
    return [*rotated, *(left + right for left, right in merges), *SPECIALS]


def _gpt2_alphabet() -> list[str]:
    """The printable character that GPT-2 writes for each byte, by byte value."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _weights(seed: int, perturbation: float, padded_vocab_size: int) -> dict[str, NDArray[np.float32]]:
    """All tensors by their Hugging Face names, [out, in] as in torch."""
    weights = _Draws(seed, perturbation)
    kv_size = NUM_KV_HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": weights.rows(padded_vocab_size, np.ones(NUM_TOKENS))}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": weights.norm(HIDDEN_SIZE),
            f"{prefix}.self_attn.q_proj.weight": weights.matrix(HIDDEN_SIZE, HIDDEN_SIZE, gain=1.7),
            f"{prefix}.self_attn.q_proj.bias": weights.bias(HIDDEN_SIZE),
            f"{prefix}.self_attn.k_proj.weight": weights.matrix(kv_size, HIDDEN_SIZE, gain=1.7),
            f"{prefix}.self_attn.k_proj.bias": weights.bias(kv_size),
            f"{prefix}.self_attn.v_proj.weight": weights.matrix(kv_size, HIDDEN_SIZE, gain=1.0),
            f"{prefix}.self_attn.v_proj.bias": weights.bias(kv_size),
            f"{prefix}.self_attn.o_proj.weight": weights.matrix(HIDDEN_SIZE, HIDDEN_SIZE, gain=1.5),
            f"{prefix}.post_attention_layernorm.weight": weights.norm(HIDDEN_SIZE),
            f"{prefix}.mlp.gate_proj.weight": weights.matrix(FFN_SIZE, HIDDEN_SIZE, gain=1.5),
            f"{prefix}.mlp.up_proj.weight": weights.matrix(FFN_SIZE, HIDDEN_SIZE, gain=1.5),
            f"{prefix}.mlp.down_proj.weight": weights.matrix(HIDDEN_SIZE, FFN_SIZE, gain=1.5),
        }
    tensors["model.norm.weight"] = weights.norm(HIDDEN_SIZE)
    tensors["lm_head.weight"] = weights.rows(padded_vocab_size, _head_scales())
    return tensors


def _head_scales() -> NDArray[np.float64]:
    """[NUM_TOKENS], how strongly each token's logit varies: what is scaled down is rarely the argmax."""
    printable_ascii = np.zeros(256, dtype=bool)
    printable_ascii[ord(" ") : ord("~") + 1] = True
    scales = np.full(NUM_TOKENS, 0.375)
    scales[:256] = np.where(printable_ascii, 0.375, 0.275)
    scales[NUM_PLAIN_TOKENS:] = 0.05
    scales[IM_END_ID] = 0.325
    return scales


class _Draws:
    """Random tensors in a fixed order, each with the perturbation added."""

    def __init__(self, seed: int, perturbation: float) -> None:
        # Apart from each other, so that neither the noise nor the padding moves the weights.
        self._weights, self._noise, self._padding = np.random.default_rng(seed).spawn(3)
        self._perturbation = perturbation

    def matrix(self, num_out: int, num_in: int, gain: float) -> NDArray[np.float32]:
        """Maps inputs of unit variance to outputs of variance gain**2."""
        return self._normal(num_out, num_in, scale=gain / np.sqrt(num_in))

    def rows(self, num_rows: int, scales: NDArray[np.float64]) -> NDArray[np.float32]:
        """[num_rows, HIDDEN_SIZE]: one row per scale, then small padding rows."""
        rows = self._normal(len(scales), HIDDEN_SIZE, scale=scales[:, None])
        padding = 0.2 * self._padding.standard_normal((num_rows - len(scales), HIDDEN_SIZE))
        return np.concatenate([rows, padding.astype(np.float32)])

    def norm(self, size: int) -> NDArray[np.float32]:
        return (1.0 + 0.1 * self._weights.standard_normal(size)).astype(np.float32)

    def bias(self, size: int) -> NDArray[np.float32]:
        return (0.3 * self._weights.standard_normal(size)).astype(np.float32)

    def _normal(self, num_out: int, num_in: int, scale: float | NDArray[np.float64]) -> NDArray[np.float32]:
        weights = self._weights.standard_normal((num_out, num_in))
        noise = self._noise.standard_normal((num_out, num_in))
        return (scale * (weights + self._perturbation * noise)).astype(np.float32)


def _write_gguf(
    path: Path,
    name: str,
    vocabulary: list[str],
    tensors: dict[str, NDArray[np.float32]],
    merges: tuple[tuple[str, str], ...],
) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    _add_hyperparameters(writer, name, num_kv_heads=NUM_KV_HEADS)
    writer.add_rope_freq_base(ROPE_THETA)
    _add_tokenizer(writer, vocabulary, len(tensors["lm_head.weight"]), merges)
    _add_tensors(writer, tensors)
    _save(writer)


def _add_tensors(writer: gguf.GGUFWriter, tensors: dict[str, NDArray[np.float32]]) -> None:
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, NUM_LAYERS)
    for hf_name, tensor in tensors.items():
        gguf_name = gguf_names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, hf_name
        writer.add_tensor(gguf_name, tensor)


def _add_hyperparameters(writer: gguf.GGUFWriter, name: str, num_kv_heads: int | list[int]) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(FFN_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)


def _add_tokenizer(
    writer: gguf.GGUFWriter,
    vocabulary: list[str],
    padded_vocab_size: int,
    merges: tuple[tuple[str, str], ...] = MERGES,
) -> None:
    padding = [f"[PAD{token_id}]" for token_id in range(NUM_TOKENS, padded_vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*vocabulary, *padding])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * NUM_PLAIN_TOKENS
        + [gguf.TokenType.CONTROL] * len(SPECIALS)
        + [gguf.TokenType.UNUSED] * len(padding)
    )
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_eos_token_id(IM_END_ID)
    writer.add_pad_token_id(END_OF_TEXT_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_hf(
    folder: Path,
    vocabulary: list[str],
    tensors: dict[str, NDArray[np.float32]],
    merges: tuple[tuple[str, str], ...],
) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(tensors["lm_head.weight"]),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": FFN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": RMS_NORM_EPS,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": IM_END_ID,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"eos_token_id": [IM_END_ID, END_OF_TEXT_ID], "pad_token_id": END_OF_TEXT_ID}
    for file_name, content in {
        "config.json": config,
        "generation_config.json": generation_config,
        "tokenizer.json": _tokenizer_json(vocabulary, merges),
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (folder / file_name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _tokenizer_json(vocabulary: list[str], merges: tuple[tuple[str, str], ...]) -> dict[str, object]:
    """What the `tokenizers` library reads: byte-level BPE with Qwen2's split, without its normaliser,
    which llama.cpp does not have."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, token_id in SPECIALS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: token_id for token_id, text in enumerate(vocabulary[:NUM_PLAIN_TOKENS])},
            "merges": [[left, right] for left, right in merges],
        },
    }
