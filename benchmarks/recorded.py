"""A recorded pair (`benchmarks.record_pair`) as drafter and target: what the models would say, without them.

Token ids are made up: the target's token at a position is `target_id`, and a wrong draft token is another
one. What a drafter writes after a wrong token of its own is not recorded; under lossless it is void whatever
it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.drafts import Proposal, Source
from shared.stopping import StopRule

RECORDING = Path(__file__).with_name("recordings") / "greedy_pair.json"
_FIRST_ID = 1_000
_WRONG_ID = 100_000
VOCABULARY_SIZE = 1 << 17


@dataclass(frozen=True, slots=True)
class Position:
    """One token of the target's answer, as the drafter sees it."""

    agrees: bool
    """Whether the drafter's likeliest token is the target's."""
    prob: float | None = None
    """Of the drafter's likeliest token."""


Answer = Sequence[Position]


@dataclass(frozen=True, slots=True)
class Recording:
    draft: str
    target: str
    data: str
    answers: list[Answer]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def agreement(self) -> float:
        return sum(each.agrees for answer in self.answers for each in answer) / self.num_tokens


def load(path: Path = RECORDING) -> Recording:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    answers = [[Position(bool(same), prob) for same, prob, *_ in answer] for answer in recorded["answers"]]
    return Recording(recorded["draft"], recorded["target"], recorded["data"], answers)


def target_id(position: int) -> int:
    """Ids that take as many bytes as real ones."""
    return _FIRST_ID + position


def propose(answer: Answer, text: Sequence[int], num_tokens: int, stop: StopRule) -> list[Proposal]:
    """What the drafter proposes after a completion; up to `num_tokens`, and none past the answer's end."""
    on_its_way = list(text) == list(range(_FIRST_ID, target_id(len(text))))
    proposals: list[Proposal] = []
    for position in range(len(text), min(len(text) + num_tokens, len(answer))):
        here = answer[position]
        if stop.ends_before([*(each.prob for each in proposals), here.prob], here.prob):
            break
        on_its_way = on_its_way and here.agrees
        token = target_id(position) if on_its_way else _WRONG_ID + position
        proposals.append(Proposal(token, here.prob, Source.MODEL))
    return proposals
