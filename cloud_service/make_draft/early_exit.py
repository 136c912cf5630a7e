"""Target and early exit in PyTorch: the draft runs the target's first blocks, an adapter and its head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cloud_service.make_draft.adapter import Adapter, check_family, check_layers
from shared.errors import InvalidSetting, ModelUnsupported


@dataclass(frozen=True, slots=True)
class Target:
    """A frozen target model and its tokenizer."""

    model: Any
    """Of transformers: a LlamaForCausalLM or Qwen2ForCausalLM."""
    tokenizer: PreTrainedTokenizerBase
    sha256: str

    @property
    def num_blocks(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def end_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] after the final norm -> logits, [..., vocab]."""
        head = self.model.lm_head
        return head(hidden_states.to(head.weight.dtype))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which specials are meant as such, as in a rendered chat."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_target(gguf: Path, sha256: str, device: str) -> Target:
    """Unpack a GGUF file in float32 on the CPU, in bfloat16 elsewhere.

    Raises:
        ModelUnsupported: another family, or transformers cannot read the file.
    """
    source = {"pretrained_model_name_or_path": str(gguf.absolute().parent), "gguf_file": gguf.name}
    transformers_logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelUnsupported(f"transformers cannot read {gguf}: {reason[:300]}") from None
    check_family(model.config.model_type)
    model.requires_grad_(False).eval().to(device)
    return Target(model, tokenizer, sha256)


class AdapterBlock(nn.Module):  # type: ignore[misc]
    """A block without a feed-forward layer; begins as the attention of the target's block above the exit."""

    def __init__(self, target: Target, num_layers: int) -> None:
        super().__init__()
        check_layers(num_layers, target.num_blocks)
        above = target.model.model.layers[num_layers]
        self.self_attn = copy.deepcopy(above.self_attn).float()
        self.input_layernorm = copy.deepcopy(above.input_layernorm).float()
        self.requires_grad_(True)

    def forward(self, hidden_states: torch.Tensor, **context: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **context)
        return hidden_states + attended


class EarlyExit(nn.Module):  # type: ignore[misc]
    """The target's head after its first blocks; shares the target's weights.

    Without a trained adapter the target's own final norm follows the last block that is kept.
    """

    def __init__(self, target: Target, num_layers: int, *, adapter: bool) -> None:
        super().__init__()
        check_layers(num_layers, target.num_blocks)
        self._target = [target]  # in a list: its weights are not this module's
        self._num_layers = num_layers
        self._rotary = target.model.model.rotary_emb
        self.block = AdapterBlock(target, num_layers) if adapter else None
        self.norm = copy.deepcopy(target.model.model.norm).float().requires_grad_(adapter)
        self.to(target.device)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the target's head makes the draft's logits of, for whole sequences.

        Args:
            hidden_states: [batch, tokens, hidden], what the target's last kept block gives, before any norm.
        Returns:
            [batch, tokens, hidden]
        """
        hidden = hidden_states.float()
        if self.block is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            above = torch.full((hidden.shape[1], hidden.shape[1]), float("-inf"), device=hidden.device)
            hidden = self.block(
                hidden,
                attention_mask=torch.triu(above, 1)[None, None],
                position_embeddings=self._rotary(hidden, positions),
            )
        return self.norm(hidden)

    @property
    def cost(self) -> float:
        """Weights that it reads for a token in llama.cpp, as a share of the target's.

        There the adapter stands in a whole block, whose feed-forward layer is zeros but read all the same.
        """
        model = self._target[0].model
        blocks, head = model.model.layers, _num_weights(model.lm_head)
        kept = blocks[: self._num_layers + (self.block is not None)]
        return (_num_weights(kept) + head) / (_num_weights(blocks) + head)

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Continue a text by the likeliest tokens, all of it read anew for each."""
        text = list(token_ids)
        [target] = self._target
        with torch.no_grad():
            for _ in range(num_tokens):
                ids = torch.tensor([text], device=target.device)
                hidden = self(hidden_after(target, ids, self._num_layers)[0])
                text.append(int(target.head(hidden[0, -1]).argmax()))
        return text[len(token_ids) :]

    def load(self, adapter: Adapter) -> None:
        """
        Raises:
            InvalidSetting: the adapter's tensors are not those of this target.
        """
        assert self.block is not None, "made with adapter=True"
        state = {name: torch.from_numpy(np.array(values)) for name, values in adapter.tensors.items()}
        norm = state.pop("norm.weight", None)
        try:
            if norm is None:
                raise RuntimeError("norm.weight is missing")
            self.block.load_state_dict(state)
            self.norm.load_state_dict({"weight": norm})
        except RuntimeError as error:
            raise InvalidSetting(f"the adapter does not fit: {' '.join(str(error).split())[:200]}") from None

    def adapter(self, target: Target) -> Adapter:
        """What was trained, for a file."""
        assert self.block is not None, "made with adapter=True"
        tensors = {name: values.cpu().numpy() for name, values in self.block.state_dict().items()}
        return Adapter(
            target.sha256,
            self._num_layers,
            tensors | {"norm.weight": self.norm.weight.detach().cpu().numpy()},
        )


def _num_weights(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def hidden_after(
    target: Target, token_ids: torch.Tensor, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read whole sequences with the target.

    Args:
        token_ids: [batch, tokens].
    Returns:
        What block `num_layers` gives and what the final norm gives, [batch, tokens, hidden] each.
    """
    with torch.no_grad():
        read = target.model.model(token_ids, output_hidden_states=True, use_cache=False)
    return read.hidden_states[num_layers], read.last_hidden_state
