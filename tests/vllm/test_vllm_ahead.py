"""The scheduler that runs a step ahead, with a runner that keeps to the rules of vLLM's V2 runner.

That runner needs a GPU. The one here is a fake, which computes no model but keeps what that one keeps (texts,
how much of each is computed, a slot for each request) and stops at what would be an error there.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cloud_service.targets import vllm_resident as resident
from cloud_service.targets.resident_rounds import PendingRound
from cloud_service.targets.vllm import engine_config
from cloud_service.targets.vllm_scheduler import DRAFT, DRAFTS, NUM_GROUPS, AheadScheduler
from cloud_service.targets.vllm_worker import put
from tests.service import eventually
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.vllm

BLOCK_TOKENS = 32
NUM_SLOTS = 24
PARKED_S = 1e9


def next_token(text: Sequence[int]) -> int:
    """The target's."""
    return (7 * text[-1] + 3 * text[-2] + len(text)) % 11


def greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(next_token(text))
    return text[len(prompt) :]


@dataclass
class Slot:
    text: list[int]
    num_prefill: int
    num_computed: int


class FakeRunner:
    """Computes steps in the order in which they were scheduled, from what they say and what it has kept."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.step_sizes: list[int] = []

    def run(self, step: Any) -> ModelRunnerOutput:
        for name in {*step.finished_req_ids, *(step.preempted_req_ids or ())}:
            self.slots.pop(name, None)
        for new in step.scheduled_new_reqs:
            text = list(new.prefill_token_ids)
            self.slots[new.req_id] = Slot(text, len(text), new.num_computed_tokens)
        assert len(self.slots) <= NUM_SLOTS, "the runner has no slot left"
        names = list(step.num_scheduled_tokens)
        if names:
            self.step_sizes.append(len(names))
        made = [self._compute(name, step) for name in names]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=made,
        )

    def _compute(self, name: str, step: Any) -> list[int]:
        slot = self.slots[name]
        draft = step.scheduled_spec_decode_tokens.get(name, [])
        slot.num_computed += step.num_scheduled_tokens[name]
        if slot.num_computed < slot.num_prefill:
            return []
        assert slot.num_computed == len(slot.text) + len(draft), "it computes neither more nor less"
        assert -1 not in draft, "a placeholder is nobody's draft"
        made: list[int] = []
        for token in [*draft, None]:
            made.append(next_token(slot.text))
            slot.text.append(made[-1])
            if made[-1] != token:
                break
        slot.num_computed = len(slot.text) - 1
        return list(made)


@dataclass
class Client:
    """A stream with drafts, as `vllm_resident.Session` follows it; None as its round: a plain one."""

    name: str
    prompt: list[int]
    round: PendingRound | None
    text: list[int] = field(default_factory=list)
    failed: bool = False

    def receive(self, output: Any) -> None:
        if self.round is None:
            self.text += output.new_token_ids
            return
        assert not self.round.done, "nobody asked for more"
        self.round.receive(output.new_token_ids)
        if self.round.done:
            self.text += self.round.made


class Engine:
    """vLLM's loop with two steps in flight."""

    def __init__(self, config: Any, num_blocks: int) -> None:
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = num_blocks
        self.scheduler = AheadScheduler(
            config, cache, StructuredOutputManager(config), block_size=BLOCK_TOKENS, log_stats=True
        )
        self.runner = FakeRunner()
        self.clients: dict[str, Client] = {}
        self._flying: deque[tuple[Any, ModelRunnerOutput]] = deque()
        hash_of = get_hash_fn_by_name("sha256")
        init_none_hash(hash_of)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, hash_of)
        self.num_evicted = 0

    def _request(self, name: str, prompt: Sequence[int], max_tokens: int, extra: dict[str, Any]) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        return Request(name, list(prompt), params, None, block_hasher=self._hasher)

    def open(self, name: str, prompt: Sequence[int], draft: Sequence[int] | None) -> Client:
        extra = {} if draft is None else {DRAFT: list(draft)}
        max_tokens = 12 if draft is None else 512 - len(prompt)
        self.scheduler.add_request(self._request(name, prompt, max_tokens, extra))
        round_ = None if draft is None else PendingRound(len(prompt), draft)
        client = self.clients[name] = Client(name, list(prompt), round_)
        return client

    def send(self, client: Client, draft: Sequence[int], misplaced: int = 0) -> None:
        start = len(client.prompt) + len(client.text)
        client.round = PendingRound(start, draft)
        extra = {DRAFTS: [[client.name, start + misplaced, list(draft)]]}
        self.scheduler.add_request(self._request("drafts", [0], 1, extra))

    def close(self, client: Client) -> None:
        self.scheduler.finish_requests(client.name, RequestStatus.FINISHED_ABORTED)
        del self.clients[client.name]

    def step(self) -> None:
        if self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self._flying.append((step, self.runner.run(step)))
            if len(self._flying) < 2 and self.scheduler.has_requests():
                return
        if not self._flying:
            return
        step, output = self._flying.popleft()
        for outputs in self.scheduler.update_from_output(step, output).values():
            for made in outputs.outputs:
                self.num_evicted += sum("PREEMPTED" in event.type.name for event in made.events or ())
                if (client := self.clients.get(made.request_id)) is not None:
                    client.failed = str(made.finish_reason) == "error"
                    client.receive(made)

    def run_until(self, done: Any) -> None:
        for _ in range(10_000):
            if done():
                return
            self.step()
        raise AssertionError("the engine makes no progress")

    def answered(self, client: Client) -> bool:
        return client.failed or client.round is None or client.round.done

    @property
    def num_blocks_held(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


@pytest.fixture(scope="module")
def config(tiny_pair: TinyPair) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resident, "current_platform", SimpleNamespace(is_cuda=lambda: True))  # there is none
        patched.setattr(resident, "TESTED_AHEAD", {Version(vllm.__version__).public})
        patched.setattr("vllm.config.vllm.HAS_TRITON", True)
        options = {
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": NUM_SLOTS,
            "max_num_batched_tokens": 256,
            **resident.engine_options(parked_s=PARKED_S),
        }
        yield engine_config(str(tiny_pair.target_hf), options)


@pytest.fixture
def engine(config: Any) -> Engine:
    return Engine(config, num_blocks=200)


def test_an_engine_on_a_gpu_runs_a_step_ahead_with_the_v2_runner(config: Any) -> None:
    config.__post_init__()  # as the engine's process does
    assert config.use_v2_model_runner
    assert config.scheduler_config.get_scheduler_cls() is AheadScheduler
    assert config.max_concurrent_batches == 2
    assert config.parallel_config.worker_cls.endswith("RemoteDraftWorker")


@pytest.mark.parametrize("right", [0, 3, 8, 40])
def test_a_draft_is_answered_with_the_targets_own_tokens(engine: Engine, right: int) -> None:
    prompt = [3, 1, 4, 1, 5]
    expected = greedy(prompt, 60)
    client = engine.open("a", prompt, expected[:right])
    engine.run_until(lambda: engine.answered(client))
    assert client.text == expected[: right + 1]
    rest = expected[right + 1 :]
    engine.send(client, [*rest[:4], 99, 99])
    engine.run_until(lambda: engine.answered(client))
    assert client.text == expected[: right + 6]


def test_a_session_in_a_step_waits_for_its_outcome_and_a_plain_stream_does_not(engine: Engine) -> None:
    client = engine.open("a", [1, 2, 3], [])
    engine.run_until(lambda: engine.answered(client))
    engine.open("b", [1, 2, 3], None)
    engine.send(client, [99] * 4)
    first, second = (engine.scheduler.schedule() for _ in range(2))
    assert set(first.num_scheduled_tokens) == {"a", "b"}
    assert set(second.num_scheduled_tokens) == {"b"}


def test_of_many_sessions_a_third_shares_a_step(
    engine: Engine, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_service.targets.resident_rounds.TOGETHER", 8)
    clients = [engine.open(str(number), [number, 1], []) for number in range(21)]
    engine.run_until(lambda: all(map(engine.answered, clients)))
    engine.runner.step_sizes.clear()
    for client in clients:
        engine.send(client, [99] * 4)
    engine.run_until(lambda: all(map(engine.answered, clients)))
    assert engine.runner.step_sizes == [7, 7, 7]


def test_a_prompt_that_finds_no_slot_takes_that_of_the_session_parked_longest(engine: Engine) -> None:
    clients = [engine.open(str(number), [number, 1], []) for number in range(NUM_SLOTS)]
    engine.run_until(lambda: all(map(engine.answered, clients)))
    late = engine.open("late", [1, 2], None)
    engine.run_until(lambda: len(late.text) == 12)
    assert late.text == greedy([1, 2], 12)
    assert "0" not in engine.runner.slots
    engine.send(clients[0], [])
    engine.run_until(lambda: engine.answered(clients[0]))
    assert clients[0].text == greedy([0, 1], 2)


def test_a_draft_that_does_not_fit_ends_its_own_session_alone(engine: Engine) -> None:
    clients = [engine.open(name, [1, 2], []) for name in "ab"]
    engine.run_until(lambda: all(map(engine.answered, clients)))
    engine.send(clients[0], [3], misplaced=2)
    engine.send(clients[1], [3])
    engine.run_until(lambda: all(map(engine.answered, clients)))
    assert clients[0].failed
    assert clients[1].text == greedy([1, 2], len(clients[1].text))


def test_a_draft_for_a_session_in_a_step_ends_it(engine: Engine) -> None:
    client = engine.open("a", [1, 2], [])
    engine.run_until(lambda: engine.answered(client))
    engine.send(client, [99])
    engine.step()
    engine.send(client, [99])
    engine.run_until(lambda: client.failed)
    engine.run_until(lambda: not engine.scheduler.has_requests())
    assert engine.num_blocks_held == 0


@pytest.mark.parametrize("num_blocks", [200, 24], ids=["with room", "where they preempt each other"])
@pytest.mark.parametrize("seed", range(4))
def test_random_streams_get_the_targets_text_and_leave_nothing_behind(
    config: Any, seed: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_service.targets.resident_rounds.TOGETHER", 4)
    engine = Engine(config, num_blocks)
    choice = random.Random(seed)
    num_rounds = 0

    def use(client: Client) -> None:
        nonlocal num_rounds
        assert client.text == greedy(client.prompt, len(client.text))
        ended = len(client.text) >= (12 if client.round is None else 60)
        if ended or choice.random() < 0.003:
            engine.close(client)
        elif client.round is not None and client.round.done and choice.random() < 0.5:
            num_rounds += 1
            right = greedy([*client.prompt, *client.text], choice.randrange(30))
            engine.send(client, [*right, *choice.choices(range(11), k=choice.randrange(3))])

    for number in range(150):
        while len(engine.clients) >= 40:
            for _ in range(choice.randrange(4)):
                engine.step()
            for client in list(engine.clients.values()):
                use(client)
        prompt = choice.choices(range(11), k=choice.randrange(2, 200))
        draft = choice.choices(range(11), k=choice.randrange(5))
        engine.open(str(number), prompt, draft if choice.random() < 0.7 else None)
    for client in list(engine.clients.values()):
        engine.run_until(lambda client=client: engine.answered(client))
        engine.close(client)
    engine.run_until(lambda: not engine.scheduler.has_requests())
    assert engine.num_blocks_held == 0
    assert engine.runner.slots.keys() <= engine.scheduler.finished_req_ids
    assert num_rounds > 200
    assert engine.num_evicted > 0


class FakeCore:
    """In place of the client of vLLM's engine: keeps what it is sent, and answers what it is told."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def add_request_async(self, request: Any) -> None:
        self.sent.append(request.sampling_params.extra_args)

    async def get_output_async(self) -> Any:
        return await self.answers.get()


async def test_drafts_that_come_while_the_engine_works_go_soon_and_together() -> None:
    core = FakeCore()
    settings = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=100),
        scheduler_config=SimpleNamespace(async_scheduling=True),
        additional_config={NUM_GROUPS: 3},
    )
    llm = SimpleNamespace(engine_core=core, vllm_config=settings, _run_output_handler=lambda: None)
    sessions = resident.ResidentSessions(llm, frozenset())
    first, second, third = (sessions.open([1, number], [], None, None) for number in range(3))
    await eventually(lambda: len(core.sent) == 3)
    answers = [
        SimpleNamespace(
            request_id=each.name, new_token_ids=[5], prefill_stats=None, finished=False, events=()
        )
        for each in (first, second)
    ]
    core.answers.put_nowait(SimpleNamespace(outputs=answers))
    await core.get_output_async()
    sessions.verify(first, [6])
    await asyncio.sleep(0)
    sessions.verify(second, [7])
    assert len(core.sent) == 3, "the third is being verified"
    await eventually(lambda: len(core.sent) == 4)
    assert core.sent[3] == {DRAFTS: [(first.name, 3, [6]), (second.name, 3, [7])]}
    assert not third.settled


def test_drafts_are_put_where_the_runner_reads_them() -> None:
    rows = torch.full((4, 3), 9)
    put(rows, {"a": 2, "b": 0, "c": 1}, {"a": [5], "b": [1, 2, 3]})
    assert rows.tolist() == [[1, 2, 3], [9, 9, 9], [5, 0, 0], [9, 9, 9]]
