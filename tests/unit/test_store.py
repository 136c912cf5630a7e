"""The store of documents: what it keeps, and that a damaged one says so."""

from __future__ import annotations

import sqlite3
import stat

import pytest

from edge_agent.drafting import store as store_module
from edge_agent.drafting.store import Document, DocumentStore
from edge_agent.store_cli import MAX_FILE_BYTES, _read
from shared.errors import InvalidRequest, InvalidSetting

SHA = "ab" * 32


@pytest.fixture
def store(tmp_path) -> DocumentStore:
    return DocumentStore(tmp_path / "store", SHA)


def test_a_document_comes_back_token_by_token(store):
    assert store.add("a.txt", [1, 2, 151_935])
    assert [ids.tolist() for ids in store.token_ids()] == [[1, 2, 151_935]]
    assert store.documents() == [Document("a.txt", 3, False)]


def test_a_newer_version_of_a_file_replaces_the_older_and_an_equal_one_changes_nothing(store):
    store.add("a.txt", [1, 2])
    assert not store.add("a.txt", [1, 2])
    store.add("a.txt", [3, 4, 5])
    assert [ids.tolist() for ids in store.token_ids()] == [[3, 4, 5]]


def test_only_the_latest_answers_are_kept_and_no_file_makes_way_for_one(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_ANSWERS", 2)
    store.add("file", [9])
    for i in range(4):
        store.add("question", [i], is_answer=True)
    assert [ids.tolist() for ids in store.token_ids()] == [[9], [2], [3]]


def test_another_vocabulary_has_a_store_of_its_own(store, tmp_path):
    store.add("a.txt", [1])
    assert DocumentStore(tmp_path / "store", "cd" * 32).token_ids() == []


def test_what_does_not_fit_is_refused_and_the_store_stays_as_it_was(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_TOKENS", 4)
    store.add("a.txt", [1, 2, 3])
    with pytest.raises(InvalidSetting, match="duet store clear"):
        store.add("b.txt", [4, 5])
    assert [d.name for d in store.documents()] == ["a.txt"]


def test_nobody_else_may_read_it(store):
    store.add("a.txt", [1])
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_clearing_works_on_a_damaged_store_too(store):
    assert not store.clear()
    store.add("a.txt", [1])
    store.path.write_bytes(b"garbage" * 1000)
    assert store.clear()
    assert store.token_ids() == []


@pytest.mark.parametrize("use", ["documents", "token_ids"])
def test_a_file_that_is_no_store_is_one_line_that_says_what_to_do(store, use):
    store.add("a.txt", [1])
    store.path.write_bytes(b"garbage" * 1000)
    with pytest.raises(InvalidSetting, match="duet store clear") as caught:
        getattr(store, use)()
    assert "\n" not in str(caught.value)


def test_tokens_that_changed_on_disk_are_not_used(store):
    store.add("a.txt", [1, 2, 3])
    with sqlite3.connect(store.path) as database:
        database.execute("UPDATE documents SET tokens = ?", (b"\x01\x02\x03",))
    with pytest.raises(InvalidSetting, match="duet store clear"):
        store.token_ids()


def test_a_store_of_a_later_format_is_refused(store):
    store.add("a.txt", [1])
    with sqlite3.connect(store.path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidSetting, match="format 99"):
        store.documents()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "empty", id="an empty file"),
        pytest.param(b" \n\t ", "empty", id="nothing but blanks"),
        pytest.param(b"\xff\xfe\x00", "UTF-8", id="binary"),
        pytest.param(b"text\0more", "null", id="null bytes"),
        pytest.param(b"x" * (MAX_FILE_BYTES + 1), "larger", id="too large"),
    ],
)
def test_a_file_that_cannot_be_drafted_from_is_refused(tmp_path, content, why):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=why):
        _read(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot read"):
            _read(path)
