"""Writes the first blocks of a target, an adapter as one more, and the target's head as a GGUF model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloud_service.make_draft.adapter import Adapter, check_family, check_layers
from shared.errors import InvalidSetting, ModelFileInvalid, ModelUnsupported

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
"""Names of Hugging Face's modules and of GGUF's tensors."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What was written, in weights; a token reads each once, and one row of the embedding."""

    num_layers: int
    num_blocks: int
    """Of the target."""
    num_draft_weights: int
    num_target_weights: int

    @property
    def cost(self) -> float:
        """Weights that the draft reads for a token, as a share of the target's."""
        return self.num_draft_weights / self.num_target_weights


def cut(target: Path, target_sha256: str, num_layers: int, adapter: Adapter | None, out: Path) -> Cut:
    """Write a draft model that stock llama.cpp loads as one of the target's family.

    Blocks and head keep the target's own quantisation, byte for byte. The adapter has no feed-forward
    layer, but every block of these families has one: its own is written as zeros, which add nothing.

    Args:
        target: a GGUF file of the families llama or qwen2.
        num_layers: blocks that are kept, from the first.
        out: appears whole or not at all.
    Raises:
        ModelUnsupported: another family, or gguf is missing.
        ModelFileInvalid: the file cannot be read.
        InvalidSetting: more layers than the target has, an adapter of another target, `out` is the target.
    """
    reader = _open(target)
    architecture = str(_value(reader, "general.architecture"))
    check_family(architecture)
    num_blocks = int(_value(reader, f"{architecture}.block_count"))
    check_layers(num_layers, num_blocks)
    if adapter is not None:
        adapter.check_target(target_sha256, num_layers)
    if out.exists() and out.samefile(target):
        raise InvalidSetting(f"{out} is the target itself; name another file for the draft")
    kept = [t for t in reader.tensors if (_block(t.name) is None or _block(t.name) < num_layers)]  # type: ignore[operator]
    added: list[_Added] = []
    if adapter is not None:
        kept = [tensor for tensor in kept if tensor.name != "output_norm.weight"]
        added = list(_adapter_block(reader, architecture, num_layers, adapter))
    depth = num_layers + (adapter is not None)
    partial = out.with_name(f".{out.name}.partial")
    try:
        _write(partial, reader, architecture, depth, num_layers, target_sha256, kept, added)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return Cut(
        num_layers,
        num_blocks,
        _weights_of_a_token(kept) + sum(tensor.values.size for tensor in added),
        _weights_of_a_token(reader.tensors),
    )


@dataclass(frozen=True, slots=True)
class _Added:
    name: str
    values: NDArray[np.float32]
    type: GGMLQuantizationType


def _open(target: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelUnsupported("cutting a draft needs gguf; run: pip install 'duet-llm[convert]'") from None
    try:
        return GGUFReader(target)
    except (OSError, ValueError) as error:
        raise ModelFileInvalid(f"{target} cannot be read as GGUF: {' '.join(str(error).split())}") from None


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ModelFileInvalid(f"the target's file does not say its {name}")
    return field.contents()


def _block(tensor_name: str) -> int | None:
    """The number of the block that a tensor belongs to."""
    first, _, rest = tensor_name.partition(".")
    return int(rest.partition(".")[0]) if first == "blk" else None


def _weights_of_a_token(tensors: list[ReaderTensor]) -> int:
    """All but the embedding, of which a token reads a row, unless it is the head, too."""
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return sum(int(tensor.n_elements) for tensor in tensors if tied or tensor.name != "token_embd.weight")


def _adapter_block(reader: GGUFReader, architecture: str, block: int, adapter: Adapter) -> Iterator[_Added]:
    from gguf import GGMLQuantizationType

    prefix = f"blk.{block}"
    num_heads = int(_value(reader, f"{architecture}.attention.head_count"))
    num_kv_heads = int(_value(reader, f"{architecture}.attention.head_count_kv"))
    neighbour = {t.name: t for t in reader.tensors if t.name.startswith(f"blk.{block - 1}.")}
    exact = GGMLQuantizationType.F32
    attention = neighbour[f"blk.{block - 1}.attn_q.weight"].tensor_type
    quantised = attention not in (exact, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    matrix = GGMLQuantizationType.Q8_0 if quantised else exact
    zeros = GGMLQuantizationType.Q4_0 if quantised else exact
    for hf_name, gguf_name in _ATTENTION.items():
        for kind in ("weight", "bias"):
            values = adapter.tensors.get(f"self_attn.{hf_name}.{kind}")
            if values is None:
                continue
            if architecture == "llama" and hf_name in ("q_proj", "k_proj"):
                values = interleave_heads(values, num_heads if hf_name == "q_proj" else num_kv_heads)
            yield _Added(f"{prefix}.{gguf_name}.{kind}", values, matrix if values.ndim == 2 else exact)
    yield _Added(f"{prefix}.attn_norm.weight", adapter.tensors["input_layernorm.weight"], exact)
    yield _Added("output_norm.weight", adapter.tensors["norm.weight"], exact)
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        shape = tuple(int(n) for n in reversed(neighbour[f"blk.{block - 1}.{name}.weight"].shape))
        yield _Added(f"{prefix}.{name}.weight", np.zeros(shape, np.float32), zeros)
    yield _Added(f"{prefix}.ffn_norm.weight", np.ones_like(adapter.tensors["norm.weight"]), exact)


def interleave_heads(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The rows of a query or key projection in the order that GGUF has for the llama family.

    There a rotary pair stands in neighbouring rows of a head; in Hugging Face's, half a head apart.

    Args:
        values: [num_heads * head_dim, ...].
    """
    shape = values.shape
    halves = values.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def _write(
    path: Path,
    reader: GGUFReader,
    architecture: str,
    depth: int,
    num_layers: int,
    target_sha256: str,
    kept: list[ReaderTensor],
    added: list[_Added],
) -> None:
    from gguf import GGUFWriter
    from gguf.quants import quantize

    name = reader.get_field("general.name")
    changed = {
        "general.name": f"{name.contents() if name else 'target'} cut at {num_layers}",
        f"{architecture}.block_count": depth,
    }
    writer = GGUFWriter(path, architecture)
    for field in reader.fields.values():
        # The writer says these itself.
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = changed.get(field.name, field.contents())
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], inner)
    if name is None:
        writer.add_name(changed["general.name"])
    writer.add_string("duet.draft.target_sha256", target_sha256)
    writer.add_uint32("duet.draft.num_layers", num_layers)
    writer.add_bool("duet.draft.adapter", bool(added))
    for tensor in kept:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for new in added:
        writer.add_tensor(new.name, quantize(new.values, new.type), raw_dtype=new.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
