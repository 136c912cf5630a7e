"""vLLM's own speculation at the server, on Spec-Bench: none, n-grams, a draft model, Medusa heads.

    python -m benchmarks.server_methods TARGET --data spec_bench.jsonl --draft DRAFT --heads HEADS

TARGET and DRAFT are Hugging Face folders (`duet-cloud convert`), HEADS is what `benchmarks.medusa_heads`
wrote. Each method has an engine, all on one GPU: plain decoding is started alone, then the others at once.
They are measured in turn when all are up, so that nothing else runs there meanwhile. --budget fits a machine
that has compiled nothing yet; an engine that is still starting a minute before its end is left out, and said
so. What is measured is kept in a folder as it comes, beside the run's own plain
decoding: a later run with other --methods adds to the tables. `benchmarks.spec_bench` has what drafts at the
edge.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Container, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from shared.json_lines import numbered_lines

METHODS = ("none", "n-grams", "draft-model", "medusa")
CONTEXT = 4096
STREAMS = 16
ALONE_TOKENS = 128
"""Of each answer that is written alone."""
WARM_UP_TOKENS = 32
MEASURING_S = 60.0
"""Left for it when engines that are not up are left out."""


@dataclass(frozen=True, slots=True)
class Job:
    """Questions that an engine answers, so many at once."""

    questions: list[int]
    streams: int
    max_tokens: int


@dataclass(slots=True)
class Answer:
    token_ids: list[int] = field(default_factory=list)
    passes: int = 0
    """That yielded tokens of it, the one that read its prompt included."""
    first: int = 0
    """Tokens of that one."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    answers: dict[int, Answer]
    seconds: float
    drafts: int
    """vLLM's counters: drafts that were verified, and what became of their tokens."""
    accepted: int
    accepted_by_position: list[int]

    @property
    def tokens_s(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers.values()) / self.seconds


def speculation(method: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """vLLM's `speculative_config`."""
    from vllm.platforms import current_platform

    of_method: dict[str, dict[str, Any] | None] = {
        "none": None,
        "n-grams": {
            "method": "ngram_gpu" if current_platform.is_cuda() else "ngram",
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
        "draft-model": {"method": "draft_model", "model": str(arguments.draft)},
        "medusa": {"method": "medusa", "model": str(arguments.heads)},
    }
    chosen = of_method[method]
    return chosen and {**chosen, "num_speculative_tokens": arguments.draft_tokens}


class Engine:
    def __init__(self, method: str, arguments: argparse.Namespace, prompts: Sequence[list[int]]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        options = {
            "max_model_len": CONTEXT,
            "max_num_seqs": STREAMS,
            # Every answer reads its prompt, whoever has read it before.
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,  # its counters
            # Engines that start together cannot measure what is free for each.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 4 << 30,
            **json.loads(arguments.engine),
        }
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(arguments.target), speculative_config=speculation(method, arguments), **options
            )
        )
        self._prompts = prompts
        self._ends = end_token_ids(arguments.target)
        self.run(Job(list(range(len(prompts)))[:STREAMS], STREAMS, WARM_UP_TOKENS))
        self.run(Job([0], 1, WARM_UP_TOKENS))

    def run(self, job: Job) -> Measured:
        """Answer the questions greedily; the next one begins when one of `streams` has ended."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        before = self._counters()
        waiting = list(reversed(job.questions))
        answers: dict[int, Answer] = {}
        running: dict[str, int] = {}
        began = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < job.streams:
                question = waiting.pop()
                parameters = SamplingParams(
                    temperature=0.0,
                    max_tokens=job.max_tokens,
                    stop_token_ids=self._ends,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                name = f"{question}"
                answers[question] = Answer(seconds=-time.perf_counter())
                running[name] = question
                self._engine.add_request(name, tokens_input(self._prompts[question]), parameters)
            for output in self._engine.step():
                question = running[output.request_id]
                answer, new = answers[question], output.outputs[0].token_ids
                answer.token_ids += new
                answer.passes += bool(new)
                answer.first = answer.first or len(new)
                if output.finished:
                    answer.seconds += time.perf_counter()
                    del running[output.request_id]
        seconds = time.perf_counter() - began
        after = self._counters()
        drafts, accepted, *by_position = [b - a for a, b in zip(before, after, strict=True)]
        return Measured(answers, seconds, drafts, accepted, by_position)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _counters(self) -> list[int]:
        """Drafts, accepted tokens, and these by position."""
        found = {metric.name: metric for metric in self._engine.get_metrics()}
        names = ("num_drafts", "num_accepted_tokens", "num_accepted_tokens_per_pos")
        if f"vllm:spec_decode_{names[0]}" not in found:
            return [0, 0]
        drafts, accepted, positions = (found[f"vllm:spec_decode_{name}"] for name in names)
        return [drafts.value, accepted.value, *positions.values]


def end_token_ids(folder: Path) -> list[int]:
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def serve(
    connection: Connection, method: str, arguments: argparse.Namespace, prompts: Sequence[list[int]]
) -> None:
    """A process with one engine, which answers jobs until it is told None."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # Engines that start together would take each other's half-written files for compiled ones.
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm"))
    os.environ["VLLM_CACHE_ROOT"] = str(cache / method)
    try:
        engine = Engine(method, arguments, prompts)
        connection.send(None)
        while job := connection.recv():
            connection.send(engine.run(job))
        engine.close()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Served:
    """The engine's process, seen from the one that asks."""

    def __init__(self, method: str, arguments: argparse.Namespace, prompts: Sequence[list[int]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.method = method
        self.connection, there = context.Pipe()
        # Not a daemon: it has the engine's own process for a child.
        self._process = context.Process(target=serve, args=(there, method, arguments, prompts))
        self._process.start()
        there.close()

    def run(self, job: Job, ends: float) -> Measured:
        """
        Raises:
            TimeoutError, EOFError: it is not done in time, or has ended.
        """
        self.connection.send(job)
        if not self.connection.poll(max(0.0, ends - time.perf_counter())):
            raise TimeoutError
        measured: Measured = self.connection.recv()
        return measured

    def ask_to_end(self) -> None:
        with suppress(OSError):  # it has ended by itself
            self.connection.send(None)

    def close(self) -> None:
        self._process.join(15.0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


@contextmanager
def engines(
    methods: Sequence[str], start: Callable[[str], Served], ends: float
) -> Generator[list[Served], None, None]:
    """Plain decoding, and those of the other methods that are up in time; they are ended afterwards.

    Args:
        methods: the others.
        start: makes the engine of a method, without waiting for it.
    Raises:
        SystemExit: plain decoding is not up in time.
    """
    served = []
    try:
        # Alone: nothing is measured without it, and engines that compile at once hold each other up.
        served.append(start("none"))
        if not started(served, ends - MEASURING_S):
            sys.exit("plain decoding did not start, and everything is measured against it")
        served += [start(method) for method in methods]
        yield [served[0], *started(served[1:], ends - MEASURING_S)]
    finally:
        for each in served:
            each.ask_to_end()
        for each in served:
            each.close()


def started(served: Sequence[Served], ends: float) -> list[Served]:
    """Those that are up in time, in their own order; says why others are left out."""
    up: set[str] = set()
    waiting = {each.connection: each for each in served}
    began = time.perf_counter()
    while waiting and (ready := wait(list(waiting), max(0.0, ends - time.perf_counter()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            each = waiting.pop(connection)
            try:
                connection.recv()
            except EOFError:
                print(f"{each.method} is left out: it ended while it started, see above", flush=True)
                continue
            up.add(each.method)
            print(f"{each.method} is up after {time.perf_counter() - began:.0f} s", flush=True)
    for each in waiting.values():
        print(
            f"{each.method} is left out: still starting after {time.perf_counter() - began:.0f} s, and the"
            f" last {MEASURING_S:.0f} s of --budget are for measuring; raise it",
            flush=True,
        )
    return [each for each in served if each.method in up]


# The table, from what was measured. Pure.


def equal_share(found: Sequence[int], expected: Sequence[int]) -> float:
    """How much of a text stands before the first difference.

    >>> equal_share([1, 2, 3, 4], [1, 2, 9, 4])
    0.5
    """
    longest = max(len(found), len(expected))
    pairs = zip(found, expected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    return same / longest if longest else 1.0


def equality(found: dict[int, Answer], expected: dict[int, Answer], max_tokens: int) -> str:
    """Share of texts that are equal, and the share of tokens before the first difference."""
    shares = [
        equal_share(answer.token_ids, expected[question].token_ids[:max_tokens])
        for question, answer in found.items()
    ]
    return f"{np.mean([share == 1.0 for share in shares]):.0%}, {np.mean(shares):.1%}"


def tokens_a_pass(answers: Iterable[Answer]) -> str:
    """Behind the prompt's own pass, those without a draft included."""
    counted = [answer for answer in answers if answer.passes > 1]
    return ratio(
        [[len(answer.token_ids) - answer.first for answer in counted]], [[a.passes - 1 for a in counted]]
    )


def speed_up(found: dict[int, Answer], plain: dict[int, Answer]) -> str:
    """Seconds a token of plain decoding over ours, on the same questions."""
    pairs = [(answer, plain[question]) for question, answer in found.items()]
    return ratio(
        [[p.seconds for _, p in pairs], [len(f.token_ids) for f, _ in pairs]],
        [[f.seconds for f, _ in pairs], [len(p.token_ids) for _, p in pairs]],
    )


def ratio(tops: Sequence[Sequence[float]], bottoms: Sequence[Sequence[float]]) -> str:
    """A product of sums over another, with its 95% bootstrap interval over questions.

    Args:
        tops, bottoms: [factors, questions].
    """
    num = len(tops[0])
    drawn = np.random.default_rng(0).integers(num, size=(2000, num))
    drawn = np.concatenate([np.arange(num)[None], drawn])
    values = np.prod([np.array(factor, float)[drawn].sum(1) for factor in tops], 0) / np.prod(
        [np.array(factor, float)[drawn].sum(1) for factor in bottoms], 0
    )
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:.2f} ({low:.2f} to {high:.2f})"


COLUMNS = [
    *("method", "acceptance length, vLLM's counters", "tokens a pass", "accepted at 1, 2, ..."),
    *("1 stream, tokens/s", "of plain", f"{STREAMS} streams, tokens/s", "of plain"),
    *(f"equal texts and tokens, {STREAMS} streams", "1 stream"),
]
TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Of Spec-Bench; what is none of them is MT-Bench's, its multi-turn conversation."""


@dataclass(slots=True)
class Result:
    """Of one method."""

    many: Measured
    """All questions, `STREAMS` at once."""
    alone: dict[int, Answer] = field(default_factory=dict)
    """Some of them, one at a time."""


def row(method: str, own: Result, plain: Result, max_tokens: int) -> list[str]:
    many, alone = own.many, own.alone
    drafts = many.drafts
    seconds = sum(answer.seconds for answer in alone.values())
    return [
        method,
        f"{1 + many.accepted / drafts:.2f}" if drafts else "",
        tokens_a_pass(many.answers.values()) if drafts else "1",
        " ".join(f"{accepted / drafts:.2f}" for accepted in many.accepted_by_position) if drafts else "",
        f"{sum(len(answer.token_ids) for answer in alone.values()) / seconds:,.0f}" if alone else "",
        speed_up(alone, plain.alone) if alone else "",
        f"{many.tokens_s:,.0f}",
        f"{many.tokens_s / plain.many.tokens_s:.2f}",
        equality(many.answers, plain.many.answers, max_tokens),
        equality(alone, plain.many.answers, min(ALONE_TOKENS, max_tokens)) if alone else "",
    ]


def task_row(method: str, own: Result, tasks: Sequence[str]) -> list[str]:
    """Tokens a pass by task.

    Args:
        tasks: of each question.
    """
    by_task = [
        [answer for question, answer in own.many.answers.items() if tasks[question] == task]
        for task in (*TASKS, "conversation")
    ]
    return [method, *(tokens_a_pass(answers) if answers else "" for answers in by_task)]


class Tables:
    """What was measured, in a folder, by method; written as it comes."""

    def __init__(self, arguments: argparse.Namespace, tasks: Sequence[str], where: str) -> None:
        self._arguments, self._tasks, self._where = arguments, tasks, where
        arguments.kept.mkdir(parents=True, exist_ok=True)

    def keep(self, method: str, own: Result, plain: Result) -> None:
        content = {"own": asdict(own), "plain": asdict(plain)}
        (self._arguments.kept / f"{method}.json").write_text(json.dumps(content))
        print(" | ".join(row(method, own, plain, self._arguments.tokens)), flush=True)

    def save(self) -> None:
        arguments = self._arguments
        name = self._where.replace(" ", "_").lower()
        program = "python -m benchmarks.server_methods"
        command = f"{program} TARGET --data spec_bench.jsonl --draft DRAFT --heads HEADS"
        results = {}
        for method in METHODS:
            if (path := arguments.kept / f"{method}.json").is_file():
                content = json.loads(path.read_text())
                results[method] = result(content["own"]), result(content["plain"])
        save(
            f"spec_bench_server_{name}",
            command=command,
            title="Spec-Bench, drafting at the server: vLLM's own methods",
            notes=f"{self._where}, target {arguments.target.name}; {len(self._tasks)} questions, first turns,"
            f" greedy, at most {arguments.tokens} tokens, drafts of {arguments.draft_tokens}. One stream: a"
            f" few questions of each category, {ALONE_TOKENS} tokens, methods in turn. Speeds include reading"
            " prompts. Acceptance length as vLLM counts it, over the passes that verify a draft; tokens a"
            " pass count those without one, too, and not the prompt's. Accepted at position i: of all drafts."
            f" N-grams: of 3 to 1 tokens. {self._models(results)}Equal: share of texts that are plain"
            f" decoding's (its {STREAMS} streams), and of tokens before the first difference; plain decoding"
            " alone, against the same, shows what near-ties make of it. 95% bootstrap over questions.",
            columns=COLUMNS,
            rows=[row(method, *pair, arguments.tokens) for method, pair in results.items()],
        )
        save(
            f"spec_bench_server_tasks_{name}",
            command=command,
            title="Spec-Bench, drafting at the server, by task",
            notes="The same answers: tokens a pass. Conversation is MT-Bench's.",
            columns=["method", *(f"{task} ({self._tasks.count(task)})" for task in (*TASKS, "conversation"))],
            rows=[
                task_row(method, own, self._tasks) for method, (own, _) in results.items() if own.many.drafts
            ],
        )

    def _models(self, methods: Container[str]) -> str:
        arguments = self._arguments
        said = f"Draft model: {arguments.draft.name}. " if "draft-model" in methods else ""
        if "medusa" in methods:
            trained = json.loads((arguments.heads / "training.json").read_text())
            said += (
                f"Medusa: the likeliest token of each of {trained['heads']} heads, no tree, all on the"
                f" target's own head, trained here for {trained['seconds']:g} s on {trained['positions']:,}"
                f" tokens of the target's own answers ({trained['seen']:,} with repeats). "
            )
        return said


def result(content: dict[str, Any]) -> Result:
    def answers(found: dict[str, dict[str, Any]]) -> dict[int, Answer]:
        return {int(question): Answer(**answer) for question, answer in found.items()}

    many = {**content["many"], "answers": answers(content["many"]["answers"])}
    return Result(Measured(**many), answers(content["alone"]))


def measure(served: Sequence[Served], tables: Tables, job: Job, alone: Sequence[Job], ends: float) -> None:
    """
    Args:
        served: the first one is plain decoding.
    """
    results: dict[str, Result] = {}
    for each, part in [(each, part) for part in (job, *alone) for each in served]:
        if part is not job and each.method not in results:
            continue
        try:
            measured = each.run(part, ends)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            print(f"{each.method} is left out from here on: {type(error).__name__}", flush=True)
            if each.method == "none":
                return
            results.pop(each.method, None)
            continue
        if part is job:
            results[each.method] = Result(measured)
        else:
            results[each.method].alone |= measured.answers
        tables.keep(each.method, results[each.method], results["none"])


def questions(path: Path, limit: int | None) -> list[tuple[str, str]]:
    """Category and first turn."""
    rows = [json.loads(line) for _, line in numbered_lines(path.read_text("utf-8"))]
    return [(row["category"], row["turns"][0]) for row in rows][:limit]


def some_of_each(categories: Sequence[str], number: int) -> list[int]:
    """The first ones of each category.

    >>> some_of_each(["a", "a", "b", "a"], 2)
    [0, 1, 2]
    """
    return [i for i, category in enumerate(categories) if categories[:i].count(category) < number]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="Spec-Bench, JSON lines")
    parser.add_argument("--draft", type=Path, help="Hugging Face folder of the draft model")
    parser.add_argument("--heads", type=Path, help="folder of the Medusa heads")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, by commas")
    parser.add_argument(
        "--kept", type=Path, default=Path("server_methods"), help="folder for what is measured"
    )
    parser.add_argument("--tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--draft-tokens", type=int, default=5, help="of each draft; Medusa: its heads")
    parser.add_argument("--limit", type=int, help="questions")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for all (default: %(default)g)")
    parser.add_argument("--engine", default="{}", help="vLLM's options, as JSON")
    arguments = parser.parse_args()
    ends = time.perf_counter() + arguments.budget
    methods = [method for method in METHODS[1:] if method in arguments.methods.split(",")]

    import torch
    from transformers import AutoTokenizer

    asked = questions(arguments.data, arguments.limit)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    prompts = [chat_ids(tokenizer, question) for _, question in asked]
    chosen = some_of_each([category for category, _ in asked], 2)
    alone = [
        Job(part, 1, min(ALONE_TOKENS, arguments.tokens)) for part in (chosen[::2], chosen[1::2]) if part
    ]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tables = Tables(arguments, [task if task in TASKS else "conversation" for task, _ in asked], where)
    with engines(methods, lambda method: Served(method, arguments, prompts), ends) as up:
        measure(up, tables, Job(list(range(len(asked))), STREAMS, arguments.tokens), alone, ends)
        tables.save()


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
