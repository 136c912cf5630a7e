"""Distils an adapter from its target: cross-entropy against the target's own distribution (Kangaroo, 3.1)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from cloud_service.make_draft.acceptance import Agreement
from cloud_service.make_draft.adapter import Adapter
from cloud_service.make_draft.early_exit import EarlyExit, Target, hidden_after
from cloud_service.make_draft.texts import Corpus
from cloud_service.tensor_file import read_tensors
from shared.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast an adapter learns."""

    num_layers: int
    num_steps: int
    batch: int
    """Sequences a step."""
    learning_rate: float = 3e-4
    """At its highest, after a tenth of the steps; it falls to 0 along a cosine."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    loss: float
    """Nats a token that the draft's distribution is away from the target's (KL), on the step's sequences."""
    agreement: float | None
    """Share of validation tokens on which draft and target agree, where it was measured: on
    `MEASURED_SEQUENCES` of them while it learns, on all at the end."""


SAVE_EVERY = 50
"""Steps between two states on disk, and two validations."""
MEASURED_SEQUENCES = 256
"""At most, while it learns: a large corpus has a tenth of itself to validate with, and reading that every
`SAVE_EVERY` steps can take longer than they do."""
CHUNK_ROWS = 1024
"""Rows of logits in memory at once: 0.6 GB each in float32 with a vocabulary of 151,936, some 3 GB in all."""
_MEASURED_TOGETHER = 8
"""Sequences."""


def train(
    target: Target, corpus: Corpus, schedule: Schedule, state: Path, report: Callable[[Progress], None]
) -> Adapter:
    """Train, or go on from the state on disk; the same adapter either way.

    Args:
        state: a file that a killed run is resumed from; it is written every `SAVE_EVERY` steps.
    Raises:
        InvalidSetting: the state is of another training.
    """
    draft = EarlyExit(target, schedule.num_layers, adapter=True)
    weights = {name: each for name, each in draft.named_parameters() if each.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=schedule.learning_rate, weight_decay=0.01)
    plan = json.dumps(
        {**asdict(schedule), "target": target.sha256, "corpus": _digest(corpus)}, sort_keys=True
    )
    first = _resume(state, plan, weights, optimiser)
    for step in range(first, schedule.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * _pace(step, schedule.num_steps)
        optimiser.zero_grad()
        loss = learn(target, draft, schedule.num_layers, corpus.training[_batch(corpus, schedule, step)])
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimiser.step()
        agreement = None
        is_last = step + 1 == schedule.num_steps
        if (step + 1) % SAVE_EVERY == 0 or is_last:
            kept_apart = corpus.validation if is_last else _some(corpus.validation)
            agreement = float(measure(target, draft, schedule.num_layers, kept_apart).agrees.mean())
            _save(state, plan, step + 1, weights, optimiser)
        report(Progress(step + 1, loss, agreement))
    return draft.adapter(target)


def measure(target: Target, draft: EarlyExit, num_layers: int, sequences: NDArray[np.int64]) -> Agreement:
    """Where draft and target agree, at each position of each sequence.

    Args:
        sequences: [sequences, tokens].
    """
    agrees, top_probs = [], []
    for batch in np.split(sequences, range(_MEASURED_TOGETHER, len(sequences), _MEASURED_TOGETHER)):
        hidden, last = hidden_after(target, _on(target, batch), num_layers)
        with torch.no_grad():
            for wanted, found in _chunks(last, draft(hidden)):
                top = target.head(found).float().softmax(-1).max(-1)
                agrees.append(top.indices == target.head(wanted).argmax(-1))
                top_probs.append(top.values)
    return Agreement(
        torch.cat(agrees).reshape(sequences.shape).cpu().numpy(),
        torch.cat(top_probs).reshape(sequences.shape).cpu().numpy(),
    )


def learn(target: Target, draft: EarlyExit, num_layers: int, sequences: NDArray[np.int64]) -> float:
    """Add the gradient of the loss, `Progress.loss`, to the draft's weights; the loss.

    Rows of logits are made a chunk at a time, so that few are in memory. The gradient of each chunk is
    written out while its logits are there: autograd would have to make them again.

    Args:
        sequences: [sequences, tokens].
    """
    hidden, last = hidden_after(target, _on(target, sequences), num_layers)
    drafted = draft(hidden)
    by_drafted = torch.empty_like(drafted)
    parts = []
    for wanted, found, by_found in _chunks(last, drafted.detach(), by_drafted):
        found.requires_grad_()
        logits = target.head(found)
        part, by_logits = divergence(target.head(wanted), logits.detach())
        by_found.copy_(torch.autograd.grad(logits, found, by_logits)[0])
        parts.append(part)
    drafted.backward(by_drafted / sequences.size)
    return float(torch.stack(parts).sum()) / sequences.size


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of the draft's distribution from the target's: cross-entropy less the target's own entropy, which
    is constant, so that 0 is the best there is.

    Args:
        wanted, found: logits of target and draft, [rows, vocab].
    Returns:
        Its sum over rows, and its gradient by the draft's logits: the difference of the probabilities.
    """
    log_wanted = wanted.float().log_softmax(-1)
    log_found = found.float().log_softmax(-1)
    probs = log_wanted.exp()
    return (probs * (log_wanted - log_found)).sum(), (log_found.exp() - probs).to(found.dtype)


def _chunks(*hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of each, [batch, tokens, hidden] -> [at most `CHUNK_ROWS`, hidden]."""
    return zip(*(each.flatten(0, 1).split(CHUNK_ROWS) for each in hidden), strict=True)


def _some(sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `MEASURED_SEQUENCES`, from all over."""
    return sequences[:: math.ceil(len(sequences) / MEASURED_SEQUENCES)]


def _on(target: Target, sequences: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(sequences).to(target.device)


def _pace(step: int, num_steps: int) -> float:
    """Share of the learning rate: a tenth of the steps up, the rest down along a cosine."""
    warm_up = max(1, num_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm_up) / max(1, num_steps - warm_up))))


def _batch(corpus: Corpus, schedule: Schedule, step: int) -> NDArray[np.int64]:
    """The step's sequences: a function of seed and step, so that a resumed run sees the same ones."""
    num_sequences = len(corpus.training)
    taken = np.arange(step * schedule.batch, (step + 1) * schedule.batch)
    orders = {
        epoch: np.random.default_rng((schedule.seed, epoch)).permutation(num_sequences)
        for epoch in {int(e) for e in taken // num_sequences}
    }
    return np.array([orders[int(n // num_sequences)][n % num_sequences] for n in taken])


def _digest(corpus: Corpus) -> str:
    every = np.concatenate([corpus.training, corpus.validation])
    return hashlib.sha256(every.tobytes()).hexdigest()


def _save(
    state: Path, plan: str, step: int, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.AdamW
) -> None:
    tensors = {f"weight.{name}": each.detach().contiguous() for name, each in weights.items()}
    for name, each in weights.items():
        moments = optimiser.state[each]
        tensors |= {f"{key}.{name}": moments[key].contiguous() for key in ("exp_avg", "exp_avg_sq")}
    partial = state.with_name(f".{state.name}.partial")
    save_file(tensors, partial, {"plan": plan, "step": str(step)})
    os.replace(partial, state)


def _resume(
    state: Path, plan: str, weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.AdamW
) -> int:
    """Take up the state on disk; the step to go on with."""
    if not state.is_file():
        return 0
    metadata, tensors = read_tensors(state, f"the state {state}", "remove it to begin anew")
    if metadata.get("plan") != plan:
        raise InvalidSetting(
            f"{state} belongs to another training (target, text or settings): remove it or write elsewhere"
        )
    step = int(metadata["step"])
    for name, each in weights.items():
        with torch.no_grad():
            each.copy_(torch.from_numpy(tensors[f"weight.{name}"]))
        optimiser.state[each] = {
            "step": torch.tensor(float(step)),
            **{
                key: torch.from_numpy(tensors[f"{key}.{name}"]).to(each.device)
                for key in ("exp_avg", "exp_avg_sq")
            },
        }
    return step
