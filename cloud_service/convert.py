"""A GGUF model as the Hugging Face folder that vLLM reads, so that one named model serves either target."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shared.errors import InvalidSetting, ModelUnsupported

DTYPES = ("bfloat16", "float16", "float32")


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Write weights, tokenizer and ends of a GGUF file as a Hugging Face folder.

    Takes about 90 s for 0.5B, and memory for the weights in float32. Quantised weights stay what their
    quantisation made of them.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        dtype: one of `DTYPES`.
    Raises:
        InvalidSetting: the folder is in use, or another dtype.
        ModelUnsupported: transformers is missing, or cannot read this file.
    """
    if dtype not in DTYPES:
        raise InvalidSetting(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidSetting(f"{folder} is there already; name a new folder")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelUnsupported(
            f"converting needs {error.name}; run: pip install 'duet-llm[convert]'"
        ) from None
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.absolute().parent),
        "gguf_file": gguf.name,
    }
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, dtype))
        _forget_quantisation(model)
        vocabulary = _Vocabulary(gguf)
        model.generation_config.eos_token_id = vocabulary.end_token_ids
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        _drop_padding(work / "tokenizer.json", vocabulary.padding)
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelUnsupported(f"transformers cannot convert {gguf}: {reason[:300]}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _forget_quantisation(model: Any) -> None:
    """The weights have been unpacked, but transformers would still save them as what they were."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


class _Vocabulary:
    """What the file says about its tokens and transformers does not take over."""

    def __init__(self, gguf: Path) -> None:
        from gguf import GGUFReader, TokenType

        self._reader = GGUFReader(gguf)
        self._tokens: list[str] = self._value("tokens")
        types = self._value("token_type")
        self.padding = {t for t, kind in zip(self._tokens, types, strict=True) if kind == TokenType.UNUSED}

    @property
    def end_token_ids(self) -> list[int]:
        """What ends an answer, as `LlamaModel.end_token_ids` has it."""
        ends = {self._value("eos_token_id"), self._value("eot_token_id")} - {None}
        ends.update(i for i, token in enumerate(self._tokens) if token == "<|endoftext|>")
        return sorted(ends)

    def _value(self, name: str) -> Any:
        field = self._reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()


def _drop_padding(tokenizer_json: Path, padding: set[str]) -> None:
    """Rows without a text have names in GGUF, which transformers takes for words."""
    content = json.loads(tokenizer_json.read_text("utf-8"))
    vocab = content["model"]["vocab"]
    for token in padding:
        vocab.pop(token, None)
    tokenizer_json.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
