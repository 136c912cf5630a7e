"""Medusa heads (Cai et al., arXiv:2401.10774) for a target, as a folder that vLLM's `medusa` method loads:

    python -m benchmarks.medusa_heads TARGET A.safetensors.answers.jsonl HEADS

TARGET is a Hugging Face folder (`duet-cloud convert`), the answers are the target's own, which `duet-cloud
make-draft train --answers` left. As the paper's Medusa-1: the target is frozen, head k is a residual block
that begins as the identity and learns the token k + 1 places behind the target's next one. Unlike there, all
share the target's own head, as vLLM's `original_lm_head` has it, so that only the blocks are learnt.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.json_lines import numbered_lines

NUM_HEADS = 5
LEARNING_RATE = 1e-3
WARM_UP = 0.05
VALIDATION_SHARE = 0.1
_READ_TOKENS = 1 << 14
"""That the target reads at once."""
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a token of an answer is next, in all answers."""

    hidden: torch.Tensor
    """[positions, hidden] of the target, after its final norm."""
    wanted: torch.Tensor
    """[positions, heads]: head k's token, or `_IGNORED` behind the answer's end."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    by_head: list[float]
    """Share of positions where the head's likeliest token is the answer's."""
    together: list[float]
    """Share where those before it are right, too: what a draft of so many tokens would have accepted."""


class Heads(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_heads))
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)

    def forward(self, hidden: torch.Tensor, head: int) -> torch.Tensor:
        """[positions, hidden] -> [positions, hidden], for the target's own head."""
        hidden = hidden.float()
        return hidden + functional.silu(self.blocks[head](hidden))


def read(model: Any, texts: list[tuple[list[int], list[int]]], num_heads: int) -> Positions:
    """What the target's last layer says of each answer, and what follows it.

    Args:
        texts: token ids of each question, as a rendered chat, and of its answer.
    """
    device = next(model.parameters()).device
    hidden, wanted = [], []
    for batch in _batches(sorted(texts, key=lambda text: len(text[0]) + len(text[1]))):
        joined = [question + answer for question, answer in batch]
        longest = max(map(len, joined))
        # Filled at the right, where no position that is read can see it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in joined], device=device)
        with torch.no_grad():
            states = model.model(ids, use_cache=False).last_hidden_state
        for (question, answer), row in zip(batch, states, strict=True):
            hidden.append(row[len(question) - 1 : len(question) + len(answer) - 1].clone())
            behind = [*answer, *[_IGNORED] * num_heads]
            wanted.append(torch.tensor(behind).unfold(0, num_heads, 1)[1:])
    return Positions(torch.cat(hidden), torch.cat(wanted).to(device))


def _batches(texts: list[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """In their order, of lengths that rise."""
    batch: list[tuple[list[int], list[int]]] = []
    for text in texts:
        if batch and (len(batch) + 1) * sum(map(len, text)) > _READ_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def train(
    head: torch.Tensor, positions: Positions, num_heads: int, batch: int, seconds: float
) -> tuple[Heads, int]:
    """Train for so long.

    Args:
        head: [vocab, hidden], the target's.
        batch: positions an update.
    Returns:
        The heads, and how many positions they have seen, repeats counted.
    """
    device = positions.hidden.device
    heads = Heads(head.shape[1], num_heads).to(device)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    torch.manual_seed(0)
    began, seen, spent, told = time.perf_counter(), 0, 0.0, 0
    losses = torch.zeros(num_heads)
    while spent < 1.0:
        for rows in torch.randperm(len(positions.hidden), device=device).split(batch):
            spent = (time.perf_counter() - began) / seconds
            if spent >= 1.0:
                break
            pace = min(spent / WARM_UP, 0.5 * (1 + math.cos(math.pi * spent)))
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * pace
            optimiser.zero_grad()
            hidden, wanted = positions.hidden[rows], positions.wanted[rows]
            for k in range(num_heads):  # each in turn: one holds [batch, vocab] logits
                logits = heads(hidden, k).to(head.dtype) @ head.T
                # A sum over all rows: where an answer has ended, there is nothing to learn, and no mean.
                loss = functional.cross_entropy(
                    logits.float(), wanted[:, k], ignore_index=_IGNORED, reduction="sum"
                ) / len(rows)
                loss.backward()
                losses[k] = loss.detach()
            optimiser.step()
            seen += len(rows)
            if spent >= told / 10:
                print(f"{spent:.0%}, {seen:,} positions, loss {_show(losses.tolist())}", flush=True)
                told += 1
    return heads, seen


@torch.no_grad()  # type: ignore[untyped-decorator]
def measure(head: torch.Tensor, heads: Heads, positions: Positions, batch: int) -> Accuracy:
    """On answers that were not learnt from, in the places that all heads have a token for."""
    whole = (positions.wanted != _IGNORED).all(1)
    right = []
    pairs = zip(positions.hidden[whole].split(batch), positions.wanted[whole].split(batch), strict=True)
    for hidden, wanted in pairs:
        found = [
            (heads(hidden, k).to(head.dtype) @ head.T).argmax(-1) == wanted[:, k]
            for k in range(wanted.shape[1])
        ]
        right.append(torch.stack(found, 1))
    agrees = torch.cat(right).float()
    return Accuracy(agrees.mean(0).tolist(), agrees.cumprod(1).mean(0).tolist())


def write(folder: Path, head: torch.Tensor, heads: Heads, facts: dict[str, Any]) -> None:
    """A folder that vLLM takes for the `model` of its `medusa` method.

    Args:
        facts: how they were made, kept beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"lm_head.weight": head.detach()}
    for k, block in enumerate(heads.blocks):
        for name, values in block.state_dict().items():
            tensors[f"blocks.{k}.layers.0.{name}"] = values.to(head.dtype)
    save_file(
        {name: values.cpu().contiguous() for name, values in tensors.items()}, folder / "model.safetensors"
    )
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": head.shape[1],
        "vocab_size": head.shape[0],
        "num_heads": len(heads.blocks),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
        "torch_dtype": str(head.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "training.json").write_text(json.dumps(facts, indent=1))


def answers(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of questions and answers, apart, as they are when the target writes."""
    pairs = []
    for _, line in numbered_lines(path.read_text("utf-8")):
        row = json.loads(line)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        question, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (chat, row["text"].removeprefix(chat))
        )
        if answer:
            pairs.append((question, answer))
    return pairs


def _show(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="Hugging Face folder")
    parser.add_argument("answers", type=Path, help="JSON lines with a question and a text")
    parser.add_argument("out", type=Path, help="folder for the heads")
    parser.add_argument("--heads", type=int, default=NUM_HEADS)
    parser.add_argument("--seconds", type=float, default=75.0, help="of training, reading not counted")
    parser.add_argument("--batch", type=int, default=4096, help="positions an update")
    arguments = parser.parse_args()
    began = time.perf_counter()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=dtype).to(device).eval()
    model.requires_grad_(False)
    texts = answers(arguments.answers, tokenizer)
    num_validation = max(1, round(VALIDATION_SHARE * len(texts)))
    head = model.lm_head.weight
    kept = read(model, texts[:num_validation], arguments.heads)
    positions = read(model, texts[num_validation:], arguments.heads)
    print(f"{len(positions.hidden):,} positions after {time.perf_counter() - began:.0f} s", flush=True)
    heads, seen = train(head, positions, arguments.heads, arguments.batch, arguments.seconds)
    accuracy = measure(head, heads, kept, arguments.batch)
    print(f"validation, {len(kept.hidden):,} positions: right by head {_show(accuracy.by_head)},")
    print(f"with all before it {_show(accuracy.together)}, tokens a pass {1 + sum(accuracy.together):.2f}")
    facts = {
        "heads": arguments.heads,
        "answers": len(texts) - num_validation,
        "positions": len(positions.hidden),
        "seen": seen,
        "seconds": arguments.seconds,
        "right_by_head": accuracy.by_head,
        "right_together": accuracy.together,
    }
    write(arguments.out, head, heads, facts)
    print(f"wrote {arguments.out} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
