"""Ways of drafting on Spec-Bench: how much of each draft the target accepts, and what drafting costs.

Under greedy lossless verification the target's text is the same whoever drafts. So the target answers each
question once, and every drafter is held against that text, round by round, without the target:

- A draft model reads the text in one pass. A draft counts up to its first disagreement, and up to there it
  stands on the target's own text, so that its likeliest token at each position decides every round.
- Prompt lookup and retrieval copy, from the text as it stands in that round. Retrieval has the target's
  answers to the other questions, as `remember_answers` would keep them.
- Prompt lookup before a draft model is `--drafter lookup --drafter model`, with duet's choice of the two.
- Lookahead (`benchmarks.lookahead`) drafts for real, since its passes depend on those before. As in its paper
  it also runs on the target itself, at the server and without an edge.

Times are taken apart from that, all in turn in one process. Everything is appended to a folder: a run that
was stopped goes on, and without --data the tables are made from the folder alone. Unless --limit is given
they are saved for `benchmarks.report`; `benchmarks.server_methods` has what vLLM has at the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.coupling import interval
from benchmarks.harness import machine, save, seconds, show
from benchmarks.lookahead import LookaheadDrafter, Shape, TreeContext
from edge_agent.drafting.base import Proposal, Source
from edge_agent.drafting.combined import CombinedDrafter, Trust
from edge_agent.drafting.copying import Copier
from edge_agent.drafting.lookup import LookupCopier
from edge_agent.drafting.retrieval import SuffixIndex
from edge_agent.evaluation.batch import Answered, Job, answer_all, load_batch_edge
from edge_agent.evaluation.runs import Run, read_run
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET, EdgeConfig
from shared.errors import VocabularyMismatch
from shared.json_lines import numbered_lines
from shared.llama import LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import Registry, ResolvedModel, file_sha256, resolve
from shared.sampling import Sampling
from shared.stopping import Never

DRAFT_TOKENS = (3, 6, 16)
POSITIONS = {3: (1, 2, 3), 6: (1, 2, 4, 6), 16: (1, 4, 8, 16)}
"""Of which the acceptance is shown."""
MIDDLE = 6
"""Draft tokens of Lookahead, whose acceptance at other lengths is its model's, and of the table by task."""
PAPERS_SHAPE = Shape(window=15, ngram=5, guesses=15)
"""For a 7B on an A100."""
SHAPES = (Shape(window=5, ngram=3, guesses=5), PAPERS_SHAPE)
CONTEXT_TOKENS = 2048
TIMES = "times.json"
TIMED_QUESTIONS = 3
TIMED_ROUNDS = 30
"""So many that most of Lookahead's passes have a full pool."""
TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Of Spec-Bench; what is none of them is MT-Bench's, its multi-turn conversation."""

Key = TypeVar("Key", int, str)

AT_TARGET = f"Lookahead, {PAPERS_SHAPE}, by the target itself"


def lookahead_name(shape: Shape) -> str:
    return f"Lookahead, {shape}"


class Round(NamedTuple):
    """A draft, and what became of it; the target's own token closes the round."""

    drafted: int
    accepted: int
    passes: int
    """Of the draft model."""


@dataclass(frozen=True, slots=True)
class Text:
    """A question and the target's greedy answer."""

    id: str
    task: str
    prompt_ids: list[int]
    token_ids: list[int]
    """At least one; the end of the text included, where it came."""


Work = Callable[[Text], "dict[str, list[Round]] | list[Round]"]


@dataclass(frozen=True)
class Method:
    """One way of drafting, in figures."""

    name: str
    rounds: dict[int, list[list[Round]]]
    """By draft length, for each text."""
    seconds_per_pass: float = 0.0
    seconds_per_draft: float = 0.0
    """Of a drafter without a model."""
    target_pass_s: float | None = None
    """Of the target, where no draft is verified."""


@dataclass(frozen=True, slots=True)
class Times:
    """Medians, in seconds, taken in turn on one machine."""

    verify: dict[int, float]
    """Tokens in a pass of the target, whose rows are all read -> seconds; 1 is a plain step."""
    passes: dict[str, float]
    """A pass of each drafter that has a model."""
    copies: dict[str, float]
    """A draft of each that has none."""
    machine: dict[str, str] = field(default_factory=dict)

    def verify_s(self, num_drafted: int) -> float:
        """Between lengths that were timed, on a straight line."""
        sizes = sorted(self.verify)
        return float(np.interp(1 + num_drafted, sizes, [self.verify[size] for size in sizes]))


# Rounds, from what was recorded. Pure.


def replay(text: Text, draft_tokens: int, propose: Callable[[int, int], tuple[int, int, int]]) -> list[Round]:
    """The rounds in which a text comes about.

    The last token needs no draft: the target closes the last round as it does every other.

    Args:
        propose: from the tokens that stand and the most to draft, to a `Round`.
    """
    rounds = []
    position = 0
    while position < len(text.token_ids):
        room = min(draft_tokens, len(text.token_ids) - position - 1)
        rounds.append(Round(*propose(position, room)) if room else Round(0, 0, 0))
        position += rounds[-1].accepted + 1
    return rounds


def num_agreeing(drafted: Sequence[int], wanted: Sequence[int]) -> int:
    """
    >>> num_agreeing([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(drafted, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafted), len(wanted)))


def model_rounds(text: Text, agrees: Sequence[int], draft_tokens: int) -> list[Round]:
    """
    Args:
        agrees: for each token of the text whether it is the draft model's likeliest there.

    >>> model_rounds(Text("", "", [], [5, 6, 7, 8, 9]), [1, 0, 1, 1, 1], draft_tokens=2)
    [Round(drafted=2, accepted=1, passes=2), Round(drafted=2, accepted=2, passes=2)]
    """

    def propose(position: int, room: int) -> tuple[int, int, int]:
        return room, [*agrees[position : position + room], 0].index(0), room

    return replay(text, draft_tokens, propose)


def copied_rounds(text: Text, copier: Copier, draft_tokens: int) -> list[Round]:
    def propose(position: int, room: int) -> tuple[int, int, int]:
        drafted = copier.copy([*text.prompt_ids, *text.token_ids[:position]], room).token_ids
        return len(drafted), num_agreeing(drafted, text.token_ids[position:]), 0

    return replay(text, draft_tokens, propose)


def lookahead_rounds(text: Text, drafter: LookaheadDrafter, draft_tokens: int) -> list[Round]:
    def propose(position: int, room: int) -> tuple[int, int, int]:
        before = drafter.num_passes
        # No end of text cuts a draft short here, as none does for the model that reads the text.
        drafted = drafter.propose([*text.prompt_ids, *text.token_ids[:position]], room, ())
        return room, num_agreeing(drafted, text.token_ids[position:]), drafter.num_passes - before

    return replay(text, draft_tokens, propose)


def combined_rounds(text: Text, agrees: Sequence[int], trust: Trust, draft_tokens: int) -> list[Round]:
    """Copies from the text where they are trusted, else the draft model; `trust` is what they learn."""
    drafter = CombinedDrafter([(Source.LOOKUP, LookupCopier())], _ReadAlong(text, agrees), trust=trust)

    def propose(position: int, room: int) -> tuple[int, int, int]:
        proposals = asyncio.run(
            drafter.propose(
                [*text.prompt_ids, *text.token_ids[:position]],
                room,
                sampling=Sampling(),
                seed=0,
                start=position,
                end_token_ids=(),
                stop=Never(),
            )
        )
        accepted = num_agreeing([each.token_id for each in proposals], text.token_ids[position:])
        drafter.verified(position, text.token_ids[position : position + accepted + 1])
        return len(proposals), accepted, sum(each.source is Source.MODEL for each in proposals)

    return replay(text, draft_tokens, propose)


class _ReadAlong:
    """A draft model of which is only known where it agrees with a text. No text has its other tokens."""

    def __init__(self, text: Text, agrees: Sequence[int]) -> None:
        self._text, self._agrees = text, agrees

    async def propose(
        self, text_ids: Sequence[int], num_tokens: int, *, start: int, **_: object
    ) -> list[Proposal]:
        known = zip(self._text.token_ids[start:], self._agrees[start:], strict=True)
        return [Proposal(token if same else -1, None, Source.MODEL) for token, same in known][:num_tokens]


def lookahead_alone(text: Text, drafter: LookaheadDrafter) -> list[Round]:
    """The passes in which a model writes as much of its own text as `text` has."""
    own: list[int] = []
    rounds = []
    while len(own) < len(text.token_ids):
        said = drafter.advance([*text.prompt_ids, *own])[: len(text.token_ids) - len(own)]
        own += said
        rounds.append(Round(0, len(said) - 1, 0))
    return rounds


def other_answers(texts: Sequence[Text], text: Text) -> SuffixIndex:
    return SuffixIndex([other.token_ids for other in texts if other is not text])


# Recording, with models.


def questions(path: Path, limit: int | None) -> list[tuple[str, str, str]]:
    """Id, task and first turn of each, in a fixed random order."""
    lines = [line for _, line in numbered_lines(path.read_text(encoding="utf-8"))]
    rows = [json.loads(line) for line in random.Random(0).sample(lines, len(lines))]
    task = {name: name.replace("_", " ") for name in TASKS}
    return [(row["id"], task.get(row["category"], "conversation"), row["turns"][0]) for row in rows][:limit]


def record_target(arguments: argparse.Namespace, target: ResolvedModel) -> None:
    """The target's greedy text of each question, many at once."""
    identity = {
        "target": target.sha256,
        "data": file_sha256(arguments.data),
        "tokens": arguments.tokens,
        "context_tokens": CONTEXT_TOKENS,
    }
    asked = questions(arguments.data, arguments.limit)
    with Run.open(arguments.out / "target", identity, {"target": target.name, "machine": machine()}) as run:
        missing = [each for each in asked if each[0] not in run.done]
        if not missing:
            return
        config = EdgeConfig(
            context_tokens=CONTEXT_TOKENS, gpu_layers=arguments.gpu_layers, threads=arguments.threads
        )
        edge = load_batch_edge(target, config, arguments.parallel)
        tasks = {id_: task for id_, task, _ in missing}
        prompts = {id_: edge.model.render_chat([Message("user", turn)]) for id_, _, turn in missing}
        jobs = [
            Job(id_, tuple(prompt), arguments.tokens)
            for id_, prompt in prompts.items()
            if len(prompt) + arguments.tokens <= CONTEXT_TOKENS
        ]

        def write(job: Job, answered: Answered) -> None:
            run.append(
                {
                    "id": job.key,
                    "task": tasks[job.key],
                    "prompt_ids": list(job.prompt_ids),
                    "token_ids": list(answered.token_ids),
                }
            )

        answer_all(edge, jobs, write)
        asyncio.run(edge.close())


def record_model(
    arguments: argparse.Namespace, texts: Sequence[Text], name: str, draft: ResolvedModel
) -> None:
    """Where the likeliest token of a draft model, reading along, is the target's."""
    with Run.open(arguments.out / "drafts" / name, {"draft": draft.sha256}, {"machine": machine()}) as run:
        missing = [text for text in texts if text.id not in run.done]
        if not missing:
            return
        with (
            closing(load(draft, arguments.gpu_layers)) as model,
            context_of(model, arguments.threads, max_rows=arguments.tokens) as context,
        ):
            for text in missing:
                context.rewind(0, 0)
                rows = context.extend(0, [*text.prompt_ids, *text.token_ids[:-1]], len(text.token_ids))
                tops = [int(np.argmax(row)) for row in rows]
                agrees = [int(a == b) for a, b in zip(tops, text.token_ids, strict=True)]
                run.append({"id": text.id, "agrees": agrees})


def record_lookahead(
    arguments: argparse.Namespace, texts: Sequence[Text], name: str, resolved: ResolvedModel, work: Work
) -> None:
    """The rounds of one of the functions below, each question in one of several processes."""
    identity = {"model": resolved.sha256, "shapes": [str(shape) for shape in SHAPES], "draft_tokens": MIDDLE}
    with Run.open(arguments.out / name, identity, {"machine": machine()}) as run:
        missing = [text for text in texts if text.id not in run.done]
        if not missing:
            return
        with ProcessPoolExecutor(
            arguments.processes,
            multiprocessing.get_context("spawn"),  # CUDA and llama.cpp's threads do not survive a fork
            _open_lookahead,
            (resolved, arguments.gpu_layers, arguments.threads),
        ) as pool:
            for text, rounds in zip(missing, pool.map(work, missing), strict=True):
                run.append({"id": text.id, "rounds": rounds})


_LOOKAHEAD: dict[Shape, TreeContext] = {}
"""Of this process of the pool."""


def _open_lookahead(resolved: ResolvedModel, gpu_layers: int, threads: int | None) -> None:
    model = load(resolved, gpu_layers)
    for shape in SHAPES:
        _LOOKAHEAD[shape] = TreeContext(model, shape, context_tokens=CONTEXT_TOKENS, threads=threads)


def as_drafter(text: Text) -> dict[str, list[Round]]:
    return {
        str(shape): lookahead_rounds(text, LookaheadDrafter(context, shape), MIDDLE)
        for shape, context in _LOOKAHEAD.items()
    }


def as_target(text: Text) -> list[Round]:
    return lookahead_alone(text, LookaheadDrafter(_LOOKAHEAD[PAPERS_SHAPE], PAPERS_SHAPE))


def load(resolved: ResolvedModel, gpu_layers: int) -> LlamaModel:
    return LlamaModel(resolved.path, resolved.name, gpu_layers=gpu_layers)


def context_of(model: LlamaModel, threads: int | None, max_rows: int) -> LlamaContext:
    return LlamaContext(
        model,
        num_sequences=1,
        context_tokens=CONTEXT_TOKENS,
        rollback_tokens=0,
        max_rows=max_rows,
        threads=threads,
    )


def pass_s(context: LlamaContext, token_ids: Sequence[int]) -> float:
    """Seconds of one pass whose rows are all read; the text is as before."""
    before = len(context.cached[0])
    took = seconds(lambda: [np.argmax(row) for row in context.extend(0, token_ids, len(token_ids))])
    context.rewind(0, before)
    return took


def take_times(
    arguments: argparse.Namespace,
    texts: Sequence[Text],
    target: ResolvedModel,
    drafts: Mapping[str, ResolvedModel],
) -> Times:
    """Every cost in turn, round after round, on the texts of a few questions."""
    verify: dict[int, list[float]] = {size: [] for size in (1, 2, *(1 + each for each in DRAFT_TOKENS))}
    passes: dict[str, list[float]] = {name: [] for name in drafts}
    copies: dict[str, list[float]] = {"lookup": [], "retrieval": []}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(closing(load(draft, arguments.gpu_layers)))
            for name, draft in {"": target, **drafts}.items()
        }
        for name in drafts:
            if models[name].vocabulary.sha256 != models[""].vocabulary.sha256:
                raise VocabularyMismatch(
                    f"{name} has other tokens than {target.name}; cut it from that target"
                )
        contexts = {
            name: stack.enter_context(context_of(model, arguments.threads, max(verify)))
            for name, model in models.items()
        }
        independent = models[next(iter(drafts))]
        trees: dict[str, tuple[Shape, TreeContext]] = {}
        for name, shape, model in [
            *((lookahead_name(shape), shape, independent) for shape in SHAPES),
            (AT_TARGET, PAPERS_SHAPE, models[""]),
        ]:
            tree = TreeContext(model, shape, context_tokens=CONTEXT_TOKENS, threads=arguments.threads)
            trees[name] = shape, stack.enter_context(closing(tree))
            passes[name] = []
        for text in random.Random(0).sample(texts, min(TIMED_QUESTIONS, len(texts))):
            whole = [*text.prompt_ids, *text.token_ids]
            for context in contexts.values():
                context.rewind(0, 0)
                context.extend(0, text.prompt_ids, 0)
            copiers: dict[str, Copier] = {"lookup": LookupCopier(), "retrieval": other_answers(texts, text)}
            for copier in copiers.values():
                copier.copy(text.prompt_ids, 1)
            drafters = {name: LookaheadDrafter(tree, shape) for name, (shape, tree) in trees.items()}
            # The first pass reads the prompt.
            written = {name: drafter.advance(text.prompt_ids) for name, drafter in drafters.items()}
            for turn in range(TIMED_ROUNDS):
                for size, seen in verify.items():
                    seen.append(pass_s(contexts[""], whole[-size:]))
                for name in drafts:
                    passes[name].append(pass_s(contexts[name], whole[-1:]))
                for name, drafter in drafters.items():
                    began = time.perf_counter()
                    said = drafter.advance([*text.prompt_ids, *written[name]])
                    passes[name].append(time.perf_counter() - began)
                    written[name] += said
                position = len(text.prompt_ids) + turn % len(text.token_ids)
                for name, copier in copiers.items():
                    copies[name].append(seconds(partial(copier.copy, whole[:position], max(DRAFT_TOKENS))))

    return Times(_medians(verify), _medians(passes), _medians(copies), machine())


def _medians(seen: Mapping[Key, list[float]]) -> dict[Key, float]:
    return {key: statistics.median(values) for key, values in seen.items()}


def record_times(
    arguments: argparse.Namespace,
    texts: Sequence[Text],
    target: ResolvedModel,
    drafts: Mapping[str, ResolvedModel],
) -> None:
    """Unless the same drafts were timed before."""
    path = arguments.out / TIMES
    wanted = {name: draft.sha256 for name, draft in drafts.items()}
    if path.exists() and json.loads(path.read_text())["drafts"] == wanted:
        return
    times = take_times(arguments, texts, target, drafts)
    part = path.with_suffix(".part")  # so that a kill leaves no half of it
    part.write_text(json.dumps({"drafts": wanted, **asdict(times)}, indent=1))
    part.replace(path)


def record(arguments: argparse.Namespace, named: Mapping[str, str]) -> None:
    """
    Args:
        named: further draft models, names to files.
    """
    registry = Registry.load()
    target = resolve(arguments.target, registry)
    independent = resolve(arguments.independent, registry)
    drafts = {
        independent.name: independent,
        **{name: resolve(file, registry) for name, file in named.items()},
    }
    record_target(arguments, target)
    texts = read_texts(arguments.out)
    record_times(arguments, texts, target, drafts)
    for name, draft in drafts.items():
        record_model(arguments, texts, name, draft)
    record_lookahead(arguments, texts, "lookahead", independent, as_drafter)
    record_lookahead(arguments, texts, "lookahead-target", target, as_target)


# Tables, from what was recorded.


def read_texts(folder: Path) -> list[Text]:
    rows = read_run(folder / "target")[1]
    return [Text(*(row[name] for name in ("id", "task", "prompt_ids", "token_ids"))) for row in rows]


def read_times(folder: Path) -> tuple[Times, list[str]]:
    """Times, and the names of the draft models, the independent one first."""
    stored = json.loads((folder / TIMES).read_text())
    names = list(stored.pop("drafts"))
    return Times(**{**stored, "verify": {int(size): s for size, s in stored["verify"].items()}}), names


def methods(folder: Path, texts: Sequence[Text], draft_names: Sequence[str], times: Times) -> list[Method]:
    """
    Args:
        draft_names: the independent one first.
    """
    independent = draft_names[0]
    agrees = {
        name: {row["id"]: row["agrees"] for row in read_run(folder / "drafts" / name)[1]}
        for name in draft_names
    }
    lookahead, alone = (
        {row["id"]: row["rounds"] for row in read_run(folder / name)[1]} if (folder / name).exists() else {}
        for name in ("lookahead", "lookahead-target")
    )
    indexes = {text.id: other_answers(texts, text) for text in texts}
    trust = {length: Trust() for length in DRAFT_TOKENS}

    def by_length(rounds_of: Callable[[Text, int], list[Round]]) -> dict[int, list[list[Round]]]:
        return {length: [rounds_of(text, length) for text in texts] for length in DRAFT_TOKENS}

    def copied(name: str, key: str, copier_of: Callable[[Text], Copier]) -> Method:
        rounds = by_length(lambda text, length: copied_rounds(text, copier_of(text), length))
        return Method(name, rounds, seconds_per_draft=times.copies[key])

    def stored(rounds: Mapping[str, list[list[int]]]) -> list[list[Round]]:
        return [[Round(*each) for each in rounds.get(text.id, ())] for text in texts]

    def ahead(shape: Shape) -> Method:
        name = lookahead_name(shape)
        rounds = {id_: rounds[str(shape)] for id_, rounds in lookahead.items()}
        return Method(
            _of_some(name, rounds, texts), {MIDDLE: stored(rounds)}, seconds_per_pass=times.passes[name]
        )

    def read_along(name: str) -> Method:
        rounds = by_length(lambda text, length: model_rounds(text, agrees[name][text.id], length))
        return Method(name, rounds, seconds_per_pass=times.passes[name])

    def combined(text: Text, length: int) -> list[Round]:
        return combined_rounds(text, agrees[independent][text.id], trust[length], length)

    found = [
        copied("prompt lookup", "lookup", lambda _: LookupCopier()),
        copied("retrieval from the other answers", "retrieval", lambda text: indexes[text.id]),
        *map(ahead, SHAPES),
        *map(read_along, draft_names),
        Method(
            f"prompt lookup, else {independent}",
            by_length(combined),
            seconds_per_pass=times.passes[independent],
        ),
        Method(
            _of_some(AT_TARGET, alone, texts),
            {MIDDLE: stored(alone)},
            target_pass_s=times.passes[AT_TARGET],
        ),
    ]
    return [method for method in found if any(map(any, method.rounds.values()))]


def _of_some(name: str, done: Collection[str], texts: Sequence[Text]) -> str:
    """Lookahead takes longest: a run that was stopped in it still has its tables."""
    return name if len(done) == len(texts) else f"{name} ({len(done)} of {len(texts)} questions)"


def row_of(method: Method, draft_tokens: int, times: Times) -> list[str]:
    """One row of the table; sums over texts, intervals by drawing texts."""
    texts = [text for text in method.rounds[draft_tokens] if text]
    rounds = [each for text in texts for each in text]
    step = times.verify[1]
    drafted = sum(each.drafted for each in rounds)
    passes = sum(each.passes for each in rounds)

    def verify_s(each: Round) -> float:
        return method.target_pass_s or times.verify_s(each.drafted)

    def draft_s(each: Round) -> float:
        return each.passes * method.seconds_per_pass + method.seconds_per_draft

    def per_text(value: Callable[[Round], float]) -> NDArray[np.float64]:
        return np.array([sum(map(value, text)) for text in texts], np.float64)

    tokens = per_text(lambda each: each.accepted + 1)
    rng = np.random.default_rng(0)
    positions = []
    for position in POSITIONS[draft_tokens]:
        long_enough = [each for each in rounds if each.drafted >= position]
        kept = sum(each.accepted >= position for each in long_enough)
        positions.append(f"{kept / len(long_enough):.2f}" if long_enough else "-")
    return [
        method.name,
        str(draft_tokens) if method.target_pass_s is None else "-",
        interval(tokens, per_text(lambda each: 1), rng),
        " ".join(positions),
        f"{drafted / len(rounds):.1f}",
        f"{passes / drafted:.2f}" if passes else "0",
        f"{sum(map(draft_s, rounds)) / drafted / step:.3f}" if drafted else "-",
        interval(tokens, per_text(lambda each: 1 + draft_s(each) / step), rng),
        interval(tokens, per_text(lambda each: (verify_s(each) + draft_s(each)) / step), rng),
    ]


def by_task(
    found: Sequence[Method], texts: Sequence[Text], draft_tokens: int
) -> tuple[list[str], list[list[str]]]:
    """Acceptance lengths by Spec-Bench's tasks: columns and rows."""
    tasks = sorted({text.task for text in texts})
    rows = []
    for method in found:
        row = [method.name]
        for task in tasks:
            rounds = [
                each
                for text, mine in zip(texts, method.rounds[draft_tokens], strict=True)
                if text.task == task
                for each in mine
            ]
            tokens = sum(each.accepted + 1 for each in rounds)
            row.append(f"{tokens / len(rounds):.2f}" if rounds else "-")
        rows.append(row)
    counts = Counter(text.task for text in texts)
    return ["method", *(f"{task} ({counts[task]})" for task in tasks)], rows


COLUMNS = [
    "method",
    "draft tokens",
    "acceptance length",
    "accepted at " + "; ".join(" / ".join(map(str, each)) for each in POSITIONS.values()),
    "drafted a round",
    "edge passes a draft token",
    "cost of a draft token, target steps",
    "speed-up, a pass of the target a step",
    "speed-up, passes as timed",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="Spec-Bench's questions, JSON lines; unset makes the tables"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of what is recorded")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="name or GGUF file")
    parser.add_argument("--independent", default=DEFAULT_DRAFT, help="draft model: name or GGUF file")
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a draft cut by `duet-cloud make-draft`; may be repeated",
    )
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--limit", type=int, help="try it out on so many questions")
    parser.add_argument("--parallel", type=int, default=8, help="questions that the target answers at once")
    parser.add_argument("--processes", type=int, default=1, help="for Lookahead, one question each")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    named = dict(each.split("=", 1) for each in arguments.draft if "=" in each)
    if len(named) < len(arguments.draft):
        parser.error("--draft takes NAME=FILE, each name once")
    if arguments.data is not None:
        record(arguments, named)
    tables(arguments.out, saved=arguments.limit is None)


def tables(folder: Path, *, saved: bool) -> None:
    """Show the tables of a folder, or save them, too."""
    texts = read_texts(folder)
    times, draft_names = read_times(folder)
    manifest = read_run(folder / "target")[0]
    num_tokens, target = manifest["identity"]["tokens"], manifest["about"]["target"]
    found = methods(folder, texts, draft_names, times)
    rows = [
        row_of(method, length, times)
        for length in DRAFT_TOKENS
        for method in found
        if length in method.rounds
    ]
    task_columns, task_rows = by_task(found, texts, MIDDLE)
    title = f"Spec-Bench, drafting at the edge for {target}"
    task_title = f"Spec-Bench, drafting at the edge: acceptance length by task, drafts of {MIDDLE}"
    if not saved:
        show(title, COLUMNS, rows)
        show(task_title, task_columns, task_rows)
        return
    command = f"python -m benchmarks.spec_bench --data spec_bench.jsonl --tokens {num_tokens}"
    command += "".join(f" --draft {name}=FILE" for name in draft_names[1:])
    total = sum(len(text.token_ids) for text in texts)
    steps = ", ".join(f"{size}: {1e3 * value:.2f} ms" for size, value in sorted(times.verify.items()))
    save(
        "spec_bench_edge",
        command=command,
        title=title,
        notes=(
            f"{len(texts)} questions, first turns, greedy, {total} tokens of the target's own text in"
            f" answers of at most {num_tokens}, made many at once. Every drafter is held against that"
            " text round by round, a fixed number of draft tokens, no confidence exit. Acceptance length:"
            " tokens a round, the target's own included. Accepted at position i: share of the drafts of at"
            " least i tokens whose first i tokens all stand. Speed-up over the target's plain stream without"
            " a link: tokens a round / (cost of the round's draft + 1) in target steps, which is Leviathan's"
            " formula with the acceptance length as measured; and the same with a verification's cost as"
            f" timed here (tokens in a pass: {steps}). Retrieval's store is the target's answers to the other"
            f" questions, as `remember_answers` keeps them. Lookahead runs on {draft_names[0]}, and its"
            " drafts are that model's own; its last row is the target's own text without a draft model. W, N"
            " and G as in its paper. 95% bootstrap intervals over questions, costs taken as fixed."
        ),
        columns=COLUMNS,
        rows=rows,
        ran_on=times.machine,
    )
    save(
        "spec_bench_edge_tasks",
        command=command,
        title=task_title,
        notes="The same rounds by Spec-Bench's tasks (questions in brackets); conversation is MT-Bench's.",
        columns=task_columns,
        rows=task_rows,
        ran_on=times.machine,
    )


if __name__ == "__main__":
    main()
