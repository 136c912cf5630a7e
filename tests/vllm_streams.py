"""Requests and targets that the tests of vLLM share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloud_service.targets.base import TextSide
from shared.messages import Message, Open
from shared.sampling import Sampling

SAMPLINGS = (
    Sampling(temperature=1.0),
    Sampling(),
    Sampling(temperature=1.0, top_k=40),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.02, top_k=40, top_p=0.9),
)
WORDS = ("the", "a", "river", "counts", "nine", "stones", "while\nprint(x)", "3.14", "Ärger", "你好", "🦀")


def random_requests(num: int, seed: int, samplings: Sequence[Sampling] = SAMPLINGS) -> list[Open]:
    rng = np.random.default_rng(seed)
    return [
        Open(
            prompt=(Message("user", " ".join(rng.choice(WORDS, rng.integers(1, 13)))),),
            sampling=samplings[i % len(samplings)],
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            max_tokens=24,
        )
        for i in range(num)
    ]


def rendered(target: TextSide, request: Open) -> list[int]:
    return target.render_chat([part for part in request.prompt if isinstance(part, Message)])
