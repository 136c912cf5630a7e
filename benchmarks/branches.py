"""Would drafts for likely corrections pay, made while the verdict travels?

Past a window the edge drafts no further on its main path but after its own second choice, where that is the
likeliest to be the correction: the product of what it is sure of before, times the second choice's
probability. A rejection there finds the first draft made. Recorded is, for each position of the target's
answers, whether its token is the edge's first or second choice, and both probabilities. A branch that follows
the right correction is on the target's text, so what is recorded there is what it is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import save
from benchmarks.link import h100_pass
from benchmarks.record_pair import greedy, load, prompts
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET
from shared.messages import Message

RECORDING = Path(__file__).with_name("recordings") / "second_choices.json"
MAX_PROMPT_TOKENS = 160
ANSWER_TOKENS = 64
T_DRAFT = 5e-3
TARGET_STEPS = (1, 5, 30)
RTT = 0.050
DRAFT_LENGTHS = (1, 2, 3, 4, 6)
WINDOWS = (6, 8, 12, 16, 24)
BRANCH_TOKENS = (2, 4, 6)
STEPS = {"in idle time": None, "in the same batch, at 1.05 steps": 1.05, "at 1.35 steps": 1.35}
"""What a step costs that drafts on the main path and on a branch at once: on a GPU perhaps next to nothing
more, a third more on 2 CPU threads (0.5B: 52 ms for 1 token, 106 for 4).
"""


@dataclass(frozen=True, slots=True)
class Position:
    """One token of the target's answer."""

    rank: int
    """Of the target's token at the edge: 0, 1, or 2 for any later one."""
    first: float
    second: float
    """Probability of the edge's likeliest tokens."""


Answer = Sequence[Position]


@dataclass(frozen=True, slots=True)
class Drafting:
    draft_tokens: int
    window: int
    branch_tokens: int = 0
    shared_step: float | None = None


@dataclass(slots=True)
class Run:
    """From one correction to the next: the edge drafts, the cloud checks, all accepted up to `wrong`."""

    answer: Answer
    how: Drafting
    verify: Callable[[int], float]
    now: float
    start: int
    drafted: int
    """Tokens after `start`, at first those of a branch."""
    sent: int = 0
    judged: int = 0
    scored: int = 0
    cloud_free: float = 0.0
    on_their_way: list[tuple[float, int]] = field(default_factory=list)
    verdicts: list[tuple[float, int]] = field(default_factory=list)
    branches: dict[int, int] = field(default_factory=dict)
    """Position of the correction -> tokens drafted after it."""

    @property
    def room(self) -> int:
        """Tokens to draft at most: the last of an answer is the target's own."""
        return len(self.answer) - 1 - self.start

    def until_verdict(self) -> int | None:
        """Returns the position of the rejected token once the edge knows of it, None at the answer's end."""
        wrong = next((i for i, each in enumerate(self.answer[self.start :]) if each.rank), None)
        if self.room <= 0:
            self.now += RTT + self.verify(0)
            return None
        begun = self.drafted > 0
        while True:
            full = self.drafted - self.sent >= self.how.draft_tokens or self.drafted == self.room
            if self.drafted > self.sent and (full or (begun and not self.sent)):
                self.on_their_way.append((self.now + RTT / 2, self.drafted))
                self.sent = self.drafted
            self._check()
            while self.verdicts and self.verdicts[0][0] <= self.now:
                self.judged = self.verdicts.pop(0)[1]
                if wrong is not None and wrong < self.judged:
                    return self.start + wrong
                if self.judged == self.room:
                    return None
            self._draft()

    def _check(self) -> None:
        """Passes that have begun by now; each takes all that has arrived."""
        while self.on_their_way:
            begins = max(self.cloud_free, self.on_their_way[0][0])
            if begins > self.now:
                return
            end = [upto for arrives, upto in self.on_their_way if arrives <= begins][-1]
            self.cloud_free = begins + self.verify(end - self.scored)
            self.verdicts.append((self.cloud_free + RTT / 2, end))
            self.scored = end
            self.on_their_way = [each for each in self.on_their_way if each[1] > end]

    def _draft(self) -> None:
        branch = self._branch()
        if self.drafted < self.room and self.drafted - self.judged < self.how.window:
            together = self.how.shared_step if branch is not None and self.sent else None
            if together is not None and branch is not None:
                self.branches[branch] = self.branches.get(branch, 0) + 1
            self.drafted += 1
            self.now += T_DRAFT * (together or 1.0)
        elif branch is not None:
            self.branches[branch] = self.branches.get(branch, 0) + 1
            self.now += T_DRAFT
        else:
            passes = (max(self.cloud_free, arrives) for arrives, _ in self.on_their_way[:1])
            self.now = min(
                time
                for time in itertools.chain(passes, (back for back, _ in self.verdicts[:1]))
                if time > self.now
            )

    def _branch(self) -> int | None:
        """Where the second choice is likeliest to be the correction, of branches that may still grow."""
        found, best, reached = None, 0.0, 1.0
        for i in range(self.judged, self.drafted if self.how.branch_tokens else 0):
            here = self.answer[self.start + i]
            likely = reached * here.second
            if likely > best and self.branches.get(self.start + i, 0) < self.how.branch_tokens:
                found, best = self.start + i, likely
            reached *= here.first
        return found


def seconds(answer: Answer, how: Drafting, verify: Callable[[int], float]) -> tuple[float, int, int]:
    """Of an answer, with how many rejections, and for how many of them a branch was there."""
    now, start, drafted = RTT, 0, 0
    num_rejected = num_found = 0
    while start < len(answer):
        run = Run(answer, how, verify, now, start, drafted)
        rejected = run.until_verdict()
        now = run.now
        if rejected is None:
            break
        num_rejected += 1
        drafted = run.branches.get(rejected, 0) if answer[rejected].rank == 1 else 0
        num_found += drafted > 0
        start = rejected + 1
        drafted = max(0, min(drafted, len(answer) - 1 - start))
    return now, num_rejected, num_found


def best(answers: Sequence[Answer], verify: Callable[[int], float], hows: Sequence[Drafting]) -> list[str]:
    """Tokens per second of the best way to draft, how many rejections found a branch, and which way it is."""
    num_tokens = sum(map(len, answers))
    rows = []
    for how in hows:
        found = [seconds(answer, how, verify) for answer in answers]
        total, rejected, branched = (sum(each) for each in zip(*found, strict=True))
        name = f"{how.draft_tokens}/{how.window}" + (f"/{how.branch_tokens}" if how.branch_tokens else "")
        rows.append((num_tokens / total, f"{branched / rejected:.2f}", name))
    rate, share, name = max(rows)
    return [f"{rate:.2f}", share, name]


def record(data: Path, num_prompts: int) -> None:
    """Let the target answer and the edge read along, as `benchmarks.record_pair` does."""
    edge, target = (load(name, threads=2) for name in (DEFAULT_DRAFT, DEFAULT_TARGET))
    chats = (target.model.render_chat([Message("user", question)]) for question in prompts(data))
    short = (chat for chat in chats if len(chat) <= MAX_PROMPT_TOKENS)
    answers = []
    for prompt in itertools.islice(short, num_prompts):
        text = greedy(target, prompt, ANSWER_TOKENS)
        edge.rewind(0, 0)
        rows = edge.extend(0, [*prompt, *text[:-1]], len(text))
        answers.append([_position(row, token) for row, token in zip(rows, text, strict=True)])
    recorded = {"draft": DEFAULT_DRAFT, "target": DEFAULT_TARGET, "data": data.name, "answers": answers}
    RECORDING.write_text(json.dumps(recorded).replace("]], [[", "]],\n[[") + "\n", encoding="utf-8")


def _position(row: NDArray[np.float32], token: int) -> tuple[int, float, float]:
    ids = np.argsort(row)[:-3:-1]
    probs = np.exp(row[ids] - row[ids[0]]) / np.exp(row - row[ids[0]]).sum(dtype=np.float64)
    rank = next((i for i, each in enumerate(ids) if each == token), 2)
    return rank, round(float(probs[0]), 3), round(float(probs[1]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="prompts to record anew (JSON lines)")
    parser.add_argument("--prompts", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record, arguments.prompts)
    recorded = json.loads(RECORDING.read_text(encoding="utf-8"))
    answers = [[Position(*each) for each in answer] for answer in recorded["answers"]]
    wrong = [each for answer in answers for each in answer if each.rank]
    second = sum(each.rank == 1 for each in wrong) / len(wrong)
    rows = []
    for step in TARGET_STEPS:
        t_step = step * T_DRAFT

        def verify(num_tokens: int, t_step: float = t_step) -> float:
            return h100_pass(t_step, num_tokens)

        pairs = list(itertools.product(DRAFT_LENGTHS, WINDOWS))
        plain = best(answers, verify, [Drafting(g, w) for g, w in pairs])
        rows.append([str(step), "no branches", plain[0], "", "1.000", plain[2]])
        for name, shared in STEPS.items():
            hows = [Drafting(g, w, b, shared) for (g, w), b in itertools.product(pairs, BRANCH_TOKENS)]
            rate, share, how = best(answers, verify, hows)
            rows.append([str(step), name, rate, share, f"{float(rate) / float(plain[0]):.3f}", how])
        print(*rows[-4:], sep="\n", flush=True)
    save(
        "branches",
        command="python -m benchmarks.branches",
        title="Drafts for likely corrections, made while the verdict travels (simulated)",
        notes=f"**Simulated**: {recorded['draft']} and {recorded['target']} as recorded on {len(answers)}"
        f" prompts of {recorded['data']} ({sum(map(len, answers))} tokens, greedy); the edge's second choice"
        f" is the correction in {second:.2f} of {len(wrong)} rejections. A draft step of"
        f" {1e3 * T_DRAFT:g} ms, a round trip of {1e3 * RTT:g} ms, passes by the H100's curve. Best draft"
        " length, window and branch length with hindsight. Not built: see docs/speed.md.",
        columns=[
            "target step",
            "branches",
            "tokens/s",
            "rejections that found one",
            "over no branches",
            "drafts/window/branch",
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
