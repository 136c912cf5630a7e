"""Cloud services for the tests: in a process of their own, or in the test's, where its slots can be counted.

Beside them what the tests compare with (`TargetAlone`) and the command `duet` as a user runs it.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from numpy.typing import NDArray
from opentelemetry.trace import INVALID_SPAN

from cloud_service.guards import Guards
from cloud_service.malformed import MalformedRequests
from cloud_service.observing import CallIdentity
from cloud_service.server import OPTIONS
from cloud_service.servicer import SpeculationServicer
from cloud_service.targets.base import Target
from cloud_service.targets.llama_cpp import LlamaCppTarget
from cloud_service.tls import server_credentials
from edge_agent import modes, speculation
from edge_agent.drafting.drafters import Drafters
from edge_agent.edge_model import EdgeModel
from edge_agent.metrics import EdgeMetrics
from edge_agent.observing import Observed
from edge_agent.pacing import Pacing
from edge_agent.remote import Cloud, Meter
from edge_agent.steps import Round, Step
from protos.duet.v1 import speculation_pb2_grpc as pb2_grpc
from shared.config import CloudConfig, EdgeConfig
from shared.draft_ahead import Pace
from shared.drafts import Source
from shared.events import Token
from shared.judge import JudgeHead
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.messages import FinishReason, Open
from shared.sampling import draw, logprobs_from_logits, rows_from_logits
from shared.session import Origin

CONTEXT_TOKENS = 512
_PLAIN_SERVICE = CloudConfig()
_START_WITHIN_S = 120.0
_STOP_WITHIN_S = 20.0


@dataclass
class RunningServer:
    """A `duet serve` or `duet-cloud serve` process."""

    address: str
    """What it says it listens on: a URL, or HOST:PORT."""
    process: subprocess.Popen[str]
    log_lines: list[str]
    """What it wrote on standard error so far."""

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, once it has ended by itself."""
        return self.process.wait(_STOP_WITHIN_S)

    def stop(self) -> int:
        self.terminate()
        return self.wait()


def command(name: str) -> str:
    """Path of an installed command of this Python."""
    return str(Path(sys.executable).with_name(name))


def clean_environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without this user's settings; `folder` stands for the home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DUET_", "GRPC_"))}
    return kept | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")} | dict(extra or {})


def run_duet(
    *arguments: str,
    folder: Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    program: str = "duet",
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, with `folder` as the working and the home folder."""
    return subprocess.run(
        [command(program), *arguments],
        cwd=folder,
        env=clean_environment(folder, env),
        input=stdin,
        capture_output=True,
        timeout=_START_WITHIN_S,
    )


async def started_ask(
    *arguments: str, folder: Path, env: Mapping[str, str], stdin: bytes = b""
) -> asyncio.subprocess.Process:
    """`duet ask` on its way, to be interrupted. Its outputs are pipes."""
    process = await asyncio.create_subprocess_exec(
        *(command("duet"), "ask", *arguments),
        cwd=folder,
        env=clean_environment(folder, env),
        # A test run in the background inherits an ignored SIGINT, as a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    return process


@contextmanager
def running_cloud(model_path: Path, **flags: object) -> Iterator[RunningServer]:
    """Start `duet-cloud serve` on a free port; ends it afterwards.

    Args:
        flags: settings by name, for example `cache_type="f32"`.
    """
    settings = {"model": model_path, "listen": "127.0.0.1:0", "threads": 1, **flags}
    with _running("duet-cloud", settings, model_path.parent) as server:
        yield server


@contextmanager
def running_serve(
    model_path: Path, *, env: Mapping[str, str] | None = None, **flags: object
) -> Iterator[RunningServer]:
    """Start `duet serve` on a free port; ends it afterwards.

    Args:
        flags: settings by name, for example `cloud="127.0.0.1:50151"`.
    """
    settings = {"model": model_path, "port": 0, "threads": 1, **flags}
    with _running("duet", settings, model_path.parent, env) as server:
        yield server


@contextmanager
def _running(
    program: str, settings: Mapping[str, object], folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    process = subprocess.Popen(
        [command(program), "serve", *arguments],
        cwd=folder,
        env=clean_environment(folder, env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log_lines: list[str] = []
    announced: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    assert process.stderr is not None
    readers = (
        threading.Thread(target=_read, args=(process.stdout, announced.put)),
        threading.Thread(target=_read, args=(process.stderr, log_lines.append)),
    )
    for reader in readers:
        reader.start()
    try:
        line = announced.get(timeout=_START_WITHIN_S)
        assert line.startswith("listening on "), (line, log_lines)
        yield RunningServer(line.removeprefix("listening on ").strip(), process, log_lines)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()


def _read(stream: Iterator[str], take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)
    take("")  # the end, so that nobody waits for a process that is gone


@dataclass
class InProcessCloud:
    """The service inside the test's own process."""

    address: str
    target: LlamaCppTarget
    servicer: SpeculationServicer
    context: LlamaContext
    num_slots: int

    @property
    def is_idle(self) -> bool:
        """Every slot is free and nothing of any stream is left."""
        return (
            self.target.num_free_slots == self.num_slots
            and self.target.num_jobs == 0
            and self.servicer.num_streams == 0
        )


class _SlowContext(LlamaContext):
    """A context whose passes take at least `step_s`, so that a test can act in the middle of a stream."""

    step_s = 0.0

    def decode(self, work: Sequence[Extension]) -> list[list[NDArray]]:
        time.sleep(self.step_s)
        return super().decode(work)


def float32_target(
    model_path: Path,
    *,
    slots: int = 4,
    context_tokens: int = CONTEXT_TOKENS,
    max_draft_tokens: int = 32,
    step_s: float = 0.0,
    judge_head: JudgeHead | None = None,
) -> tuple[LlamaCppTarget, LlamaContext]:
    """A target in float32 throughout; see `in_process_cloud`."""
    model = LlamaModel(model_path, model_path.stem)
    context = _SlowContext(
        model,
        num_sequences=slots,
        context_tokens=context_tokens,
        rollback_tokens=max_draft_tokens + 1,
        threads=1,
        cache_type="f32",
    )
    context.step_s = step_s
    target = LlamaCppTarget(model, context, judge_head)
    return target, context


@asynccontextmanager
async def in_process_cloud(
    model_path: Path,
    *,
    slots: int = 4,
    context_tokens: int = CONTEXT_TOKENS,
    max_draft_tokens: int = 32,
    max_waiting_streams: int = 64,
    max_wait_s: float = 30.0,
    step_s: float = 0.0,
    lossy_policies: bool = True,
    tokens: str | None = None,
    admission: str = "first-come",
    judge_head: JudgeHead | None = None,
) -> AsyncIterator[InProcessCloud]:
    """Serve a model in float32 throughout, on a free port.

    Args:
        step_s: least duration of a pass of the target.
    """
    target, context = float32_target(
        model_path,
        slots=slots,
        context_tokens=context_tokens,
        max_draft_tokens=max_draft_tokens,
        step_s=step_s,
        judge_head=judge_head,
    )
    config = CloudConfig(
        max_draft_tokens=max_draft_tokens,
        lossy_policies=lossy_policies,
        admission=admission,
        max_waiting_streams=max_waiting_streams,
        max_wait_s=max_wait_s,
        tokens=tokens,
    )
    try:
        async with serving(target, config) as (address, servicer):
            yield InProcessCloud(address, target, servicer, context, slots)
    finally:
        await target.close()


@asynccontextmanager
async def serving(
    target: Target, config: CloudConfig = _PLAIN_SERVICE, guards: Guards | None = None
) -> AsyncIterator[tuple[str, SpeculationServicer]]:
    """Serve any target on a free port; gives the address."""
    servicer = SpeculationServicer(
        target,
        guards or Guards.of(config, target),
        max_draft_tokens=config.max_draft_tokens,
        lossy_policies=config.lossy_policies,
        log_texts=config.log_texts,
    )
    server = grpc.aio.server(interceptors=[CallIdentity(), MalformedRequests()], options=OPTIONS)
    pb2_grpc.add_SpeculationServiceServicer_to_server(servicer, server)
    credentials = server_credentials(config)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(None)


@asynccontextmanager
async def loaded_edge(
    model_path: Path, *, num_slots: int = 1, **settings: object
) -> AsyncIterator[EdgeModel]:
    """A small model as `duet` loads it."""
    config = EdgeConfig.model_validate({"threads": 1, "context_tokens": CONTEXT_TOKENS, **settings})
    edge = await EdgeModel.load(model_path, model_path.stem, config, num_slots=num_slots)
    try:
        yield edge
    finally:
        await edge.close()


def connection(address: str) -> Cloud:
    return Cloud(address, connect_timeout_s=5.0, silence_timeout_s=30.0)


async def eventually(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait until the condition holds; fails where it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def together(*work: Coroutine[object, object, object]) -> None:
    """Run them all; where one fails, the others are stopped before anything that they use is closed."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class TargetAlone:
    """The target with no service, no draft and no batch: one token at a time, in float32."""

    def __init__(self, model_path: Path) -> None:
        self.model = LlamaModel(model_path, model_path.stem)
        self._context = LlamaContext(
            self.model,
            num_sequences=1,
            context_tokens=CONTEXT_TOKENS,
            rollback_tokens=0,
            threads=1,
            cache_type="f32",
        )

    def complete(self, request: Open) -> list[int]:
        """What the request must get in every mode that promises the target's own text."""
        chat = request.messages
        pending = self.model.render_chat(chat) if chat else list(request.prompt)
        assert request.max_tokens is not None
        self._context.rewind(0, 0)
        text: list[int] = []
        while len(text) < request.max_tokens and not self.model.end_token_ids.intersection(text[-1:]):
            rows = rows_from_logits(self._context.extend(0, pending, 1), request.sampling.row_width)
            pending = [int(draw(rows, request.sampling, request.seed, len(text))[0])]
            text += pending
        return text

    def judged(self, request: Open, completion: Sequence[int]) -> list[tuple[int, float]]:
        """At each position of a completion the target's own token, and how likely it finds the one there."""
        chat = request.messages
        pending = self.model.render_chat(chat) if chat else list(request.prompt)
        self._context.rewind(0, 0)
        found = []
        for position, token in enumerate(completion):
            logits = self._context.extend(0, pending, 1)
            rows = rows_from_logits(logits, request.sampling.row_width)
            own = int(draw(rows, request.sampling, request.seed, position)[0])
            found.append((own, float(logprobs_from_logits(logits, [token])[0])))
            pending = [token]
        return found

    def shown(self, token_ids: Sequence[int]) -> str:
        """The text as a user sees it."""
        return b"".join(map(self.model.piece, token_ids)).decode("utf-8", "replace")

    def close(self) -> None:
        self._context.close()
        self.model.close()


@dataclass
class Completion:
    """What a mode made of a request, `committed` tokens of the request not included."""

    token_ids: list[int]
    reason: FinishReason
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    origins: list[Origin] = field(default_factory=list)
    sources: tuple[Source | None, ...] = ()


async def speculate(
    edge: EdgeModel | Drafters,
    cloud: Cloud,
    request: Open,
    max_draft_tokens: int,
    *,
    window: int | None = None,
    stop_below: float = 0.0,
) -> Completion:
    drafters = edge if isinstance(edge, Drafters) else Drafters(edge)
    pace = Pace(max_draft_tokens=max_draft_tokens, max_in_flight_tokens=window, fallback_threshold=stop_below)
    return await _collect(speculation.speculate(drafters, cloud, request, Pacing(pace), Meter()))


async def generate(cloud: Cloud, request: Open) -> Completion:
    return await _collect(modes.cloud(cloud, request, Meter()))


async def _collect(steps: AsyncIterator[Step]) -> Completion:
    completion: Completion | None = None
    token_ids: list[int] = []
    origins: list[Origin] = []
    sources: list[Source | None] = []
    num_rounds = num_drafted = num_accepted = 0
    async for step in steps:
        if isinstance(step, Token):
            token_ids.append(step.id)
            origins.append(step.origin)
            sources.append(step.source)
        elif isinstance(step, Round):
            num_rounds += 1
            num_drafted += step.num_drafted
            num_accepted += step.num_accepted
        elif isinstance(step, FinishReason):
            completion = Completion(
                token_ids, step, num_rounds, num_drafted, num_accepted, origins, tuple(sources)
            )
    assert completion is not None, "a mode ends with a reason"
    return completion


def unobserved() -> Observed:
    """For a stream that no agent runs."""
    return Observed("test", INVALID_SPAN, EdgeMetrics())
