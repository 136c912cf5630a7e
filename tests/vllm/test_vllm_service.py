"""`duet-cloud serve --target vllm` as an operator runs it, and what it does when its engine dies."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud_service.targets.hf_text import HfText
from cloud_service.targets.vllm import engine_config, load_target
from edge_agent.remote import Cloud, Meter
from shared.errors import CloudUnavailable, InvalidSetting, ModelUnsupported
from shared.llama import LlamaModel
from shared.messages import Message, Open, Tokens
from shared.sampling import Sampling
from shared.vocab import ids_to_mask
from tests.service import RunningServer, connection, generate, run_duet, running_cloud
from tests.tiny_pair import PADDED_VOCAB_SIZE, TinyPair, write_tiny_model

pytestmark = pytest.mark.vllm

SERVICE = "duet.v1.SpeculationService"
STATUS = health_pb2.HealthCheckResponse
QUESTION = "Tell me a story."


# The text side of a Hugging Face folder is that of the GGUF file of the same model


@pytest.fixture(scope="module")
def in_gguf(tiny_pair: TinyPair) -> Iterator[LlamaModel]:
    model = LlamaModel(tiny_pair.target_gguf, "target")
    yield model
    model.close()


@pytest.fixture(scope="module")
def in_hf(tiny_pair: TinyPair) -> HfText:
    return HfText.load(str(tiny_pair.target_hf), "target", vocab_size=PADDED_VOCAB_SIZE)


def test_both_formats_have_one_vocabulary(in_gguf: LlamaModel, in_hf: HfText) -> None:
    assert in_hf.vocabulary.sha256 == in_gguf.vocabulary.sha256
    assert list(in_hf.vocabulary.kinds) == list(in_gguf.vocabulary.kinds)
    assert ids_to_mask(in_gguf.vocabulary, in_hf.vocabulary) == frozenset()


def test_both_formats_show_every_token_alike(in_gguf: LlamaModel, in_hf: HfText) -> None:
    ids = sorted(in_gguf.vocabulary.legal_ids)
    assert [in_hf.piece(i) for i in ids] == [in_gguf.piece(i) for i in ids]


def test_both_formats_end_with_the_same_tokens(in_gguf: LlamaModel, in_hf: HfText) -> None:
    assert in_hf.end_token_ids == in_gguf.end_token_ids


@pytest.mark.parametrize("content", ["Hi", "<|im_end|> in the text", "  éà 你好\n\n🦀 "])
def test_both_formats_read_a_chat_alike(in_gguf: LlamaModel, in_hf: HfText, content: str) -> None:
    chat = [Message("system", "Be short."), Message("user", content)]
    assert in_hf.render_chat(chat) == in_gguf.render_chat(chat)


def test_more_padding_at_the_target_masks_nothing(in_gguf: LlamaModel, tmp_path: Path) -> None:
    padded = write_tiny_model(tmp_path, name="padded", seed=2, padded_vocab_size=320)
    text = HfText.load(str(padded.hf), "padded", vocab_size=320)
    assert text.vocabulary.sha256 == in_gguf.vocabulary.sha256


# What cannot be served


def test_an_unknown_engine_option_is_refused_with_the_nearest_one(tiny_pair: TinyPair) -> None:
    with pytest.raises(InvalidSetting, match="'tensor_paralel_size'; did you mean 'tensor_parallel_size'"):
        engine_config(str(tiny_pair.target_hf), {"tensor_paralel_size": 2})


def test_an_option_that_vllm_refuses_is_reported_in_one_line(tiny_pair: TinyPair) -> None:
    with pytest.raises(ModelUnsupported, match=r"vLLM cannot serve .*dtype") as caught:
        engine_config(str(tiny_pair.target_hf), {"dtype": "float33"})
    assert "\n" not in str(caught.value)


def test_a_model_of_an_unknown_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Nothing"], "model_type": "nothing"}))
    with pytest.raises(ModelUnsupported, match="vLLM cannot serve") as caught:
        engine_config(str(tmp_path), {})
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_refused_with_the_way_to_convert_it(tiny_pair: TinyPair, tmp_path: Path) -> None:
    ended = run_duet(
        "serve", "--target=vllm", f"--model={tiny_pair.target_gguf}", folder=tmp_path, program="duet-cloud"
    )
    assert ended.returncode == 3
    assert b"duet-cloud convert" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_a_context_that_does_not_fit_the_cache_is_refused_with_what_to_change(tiny_pair: TinyPair) -> None:
    options = {"dtype": "float32", "max_model_len": 2048, "num_gpu_blocks_override": 4}
    with pytest.raises(ModelUnsupported, match=r"its log says why.*--engine\.max-model-len"):
        load_target(str(tiny_pair.target_hf), "target", options)


# The whole service


@pytest.fixture(scope="module")
def service(tiny_pair: TinyPair) -> Iterator[RunningServer]:
    options = {"engine.dtype": "float32", "engine.max_model_len": 512}
    with running_cloud(tiny_pair.target_hf, target="vllm", **options) as cloud:
        yield cloud


def test_duet_asks_a_vllm_service_in_both_modes(
    service: RunningServer, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    texts = []
    for mode in ("cloud", "speculate"):
        ended = run_duet(
            *("ask", QUESTION, f"--mode={mode}", f"--cloud={service.address}", "--max-tokens=24"),
            f"--model={tiny_pair.draft_gguf}",
            env={"DUET_CONTEXT_TOKENS": "512"},
            folder=tmp_path,
        )
        assert ended.returncode == 0, ended.stderr
        texts.append(ended.stdout)
    assert texts[0] == texts[1] != b""


class HealthWatch:
    """Follows the service's health in a thread."""

    def __init__(self, address: str) -> None:
        self.statuses: queue.Queue[Any] = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        watched = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
        try:
            for response in watched:
                self.statuses.put(response.status)
        except grpc.RpcError:
            pass  # the service has gone, as it should

    def close(self) -> None:
        self._channel.close()
        self._thread.join()


async def test_a_dead_engine_ends_streams_health_and_the_process(service: RunningServer) -> None:
    health = HealthWatch(service.address)
    assert health.statuses.get(timeout=10) == STATUS.SERVING
    request = Open(prompt=(Message("user", QUESTION),), sampling=Sampling(), seed=0, max_tokens=480)
    async with connection(service.address) as cloud:
        assert (await generate(cloud, request)).token_ids
        with pytest.raises(CloudUnavailable):
            await generate_on_a_dying_engine(cloud, request, service)
    assert health.statuses.get(timeout=10) == STATUS.NOT_SERVING
    health.close()
    assert service.wait() == 5
    assert any("engine has died" in line for line in service.log_lines)


async def generate_on_a_dying_engine(cloud: Cloud, request: Open, service: RunningServer) -> None:
    async for message in cloud.generate(request, Meter()):
        if isinstance(message, Tokens):
            kill_engine(service)


def kill_engine(service: RunningServer) -> None:
    for child in psutil.Process(service.process.pid).children(recursive=True):
        # Tokens that were under way come after the first kill, when the engine is gone or waits to be reaped.
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
