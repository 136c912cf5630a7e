"""Where settings are read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import EdgeConfig
from shared.errors import InvalidSetting, UnknownSetting
from shared.settings import load


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, and an empty user's config folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "config" / name)
    return folder


def read(*, flags=None, file=None, environ=None):
    return load(
        EdgeConfig,
        flags=flags or {},
        file=file,
        file_name="duet.yaml",
        env_prefix="DUET_",
        environ=environ or {},
    )


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_environment_over_the_file_over_defaults(here):
    file = written(here / "mine.yaml", "top_k: 1\nmax_tokens: 2\nmode: local\n")
    config, origin = read(
        flags={"top_k": 3, "max_tokens": None},
        file=file,
        environ={"DUET_TOP_K": "4", "DUET_MAX_TOKENS": "5", "TOP_P": "0.5"},
    )
    assert (config.top_k, config.max_tokens, config.mode, config.top_p) == (3, 5, "local", 1.0)
    assert [origin[name] for name in ("top_k", "max_tokens", "mode", "top_p")] == [
        "flags",
        "environment",
        str(file),
        "default",
    ]


def test_a_flag_of_zero_is_a_flag(here):
    written(here / "duet.yaml", "temperature: 1.0")
    assert read(flags={"temperature": 0.0})[0].temperature == 0.0


def test_a_file_in_this_folder_wins_over_the_users_own(here, tmp_path):
    written(tmp_path / "config" / "duet" / "duet.yaml", "top_k: 1")
    assert read()[0].top_k == 1
    written(here / "duet.yaml", "top_k: 2")
    assert read()[0].top_k == 2


def test_no_file_is_needed():
    assert read()[0] == EdgeConfig()


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_sets_nothing(here, text):
    assert read(file=written(here / "duet.yaml", text))[0] == EdgeConfig()


def test_one_stop_text_needs_no_list(here):
    assert read(file=written(here / "duet.yaml", "stop: END"))[0].stop == ("END",)
    assert read(environ={"DUET_STOP": "\n\n"})[0].stop == ("\n\n",)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("top_k: [1", "is not valid YAML: ", id="broken"),
        pytest.param("top_k: 1\n\tmode: local", "is not valid YAML: ", id="tabs"),
        pytest.param("- top_k", "must hold 'name: value' lines, not a list", id="a list"),
        pytest.param("just words", "must hold 'name: value' lines, not a str", id="words"),
        pytest.param("!!python/object:os.system {}", "is not valid YAML: ", id="code"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named_in_one_line(here, text, complaint):
    file = written(here / "duet.yaml", text)
    with pytest.raises(InvalidSetting) as caught:
        read(file=file)
    assert str(caught.value).startswith(f"{file} {complaint}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(here):
    (here / "duet.yaml").write_bytes(b"top_k: \xff\xfe")
    with pytest.raises(InvalidSetting, match=r"duet\.yaml is not valid YAML"):
        read()


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(here, name):
    with pytest.raises(InvalidSetting, match=r"^cannot read the settings file "):
        read(file=here / name)


def test_a_typo_names_the_file_and_the_nearest_setting(here):
    file = written(here / "duet.yaml", "temprature: 1")
    with pytest.raises(UnknownSetting) as caught:
        read(file=file)
    assert str(caught.value) == f"unknown setting 'temprature' in {file}; did you mean 'temperature'?"


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        pytest.param({"flags": {"top_k": 0}}, "top_k = 0 in flags", id="flags"),
        pytest.param({"environ": {"DUET_TOP_K": "x"}}, "top_k = 'x' in environment", id="environment"),
    ],
)
def test_a_bad_value_names_setting_and_source(sources, named):
    with pytest.raises(InvalidSetting, match=f"^{named} cannot be used"):
        read(**sources)


def test_a_bad_value_in_a_file_names_the_file(here):
    file = written(here / "duet.yaml", "top_k: many")
    with pytest.raises(InvalidSetting) as caught:
        read(file=file)
    assert str(caught.value).startswith(f"top_k = 'many' in {file} cannot be used")
