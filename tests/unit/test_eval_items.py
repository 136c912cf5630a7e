"""Data sets: files, the Hub's rows (written by hand here, in its documented shapes), and the built-in set."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from edge_agent.evaluation.grading import extract, is_right
from edge_agent.evaluation.items import (
    HUB,
    Kind,
    gsm8k_rows,
    items_sha256,
    load_items,
    mmlu_rows,
    truthfulqa_rows,
)
from shared.errors import DownloadFailed, InvalidSetting

CHOICE = {
    "id": "c/1",
    "subject": "birds",
    "question": "Which flies?",
    "choices": ["Swan", "Emu"],
    "answer": "A",
}
NUMBER = {"id": "n/1", "question": "1 + 1?", "solution": "1 + 1 = 2\n#### 2", "answer": "2"}
TEXT = {"id": "t/1", "question": "Capital of Peru?", "answers": ["Lima"], "level": 3}
OPEN = {"id": "o/1", "category": "writing", "turns": ["Write a poem.", "Shorter."]}


@pytest.fixture
def write(tmp_path):
    """Writes lines, each a row or raw text, to a file and returns its path."""

    def write(*lines):
        path = tmp_path / "rows.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("\n".join(texts) + "\n", "utf-8")
        return str(path)

    return write


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Files


def test_the_kind_of_a_row_follows_from_its_fields(write):
    items = load_items(write(CHOICE, NUMBER, TEXT, OPEN))
    assert [item.kind for item in items] == [Kind.CHOICE, Kind.NUMBER, Kind.TEXT, Kind.OPEN]


def test_a_row_keeps_its_answer_solution_group_and_level(write):
    choice, number, text, open_ended = load_items(write(CHOICE, NUMBER, TEXT, OPEN))
    assert (choice.choices, choice.answer, choice.group) == (("Swan", "Emu"), "A", "birds")
    assert (number.answer, number.reference) == ("2", NUMBER["solution"])
    assert (text.answers, text.level) == (("Lima",), 3)
    assert (open_ended.turns, open_ended.group) == (("Write a poem.", "Shorter."), "writing")


def test_options_are_part_of_a_choice_s_question(write):
    choice, number = load_items(write(CHOICE, NUMBER))
    assert choice.question == "Which flies?\nA. Swan\nB. Emu"
    assert choice.turns == ("Which flies?",)
    assert number.question == "1 + 1?"


def test_labels_of_other_models_are_kept_where_a_row_has_them(write):
    labelled = NUMBER | {"routellm_weak_correct": False, "routellm_strong_correct": True}
    first, second = load_items(write(labelled, TEXT))
    assert first.labels == {"routellm_weak": False, "routellm_strong": True}
    assert second.labels == {}


def test_a_conversation_with_answers_is_graded(write):
    (item,) = load_items(write(OPEN | {"answers": ["rose"]}))
    assert item.kind is Kind.TEXT
    assert item.turns == ("Write a poem.", "Shorter.")


def test_a_limit_takes_the_first_rows_only(write):
    path = write(CHOICE, NUMBER, TEXT)
    assert [item.id for item in load_items(path, limit=2)] == ["c/1", "n/1"]
    assert len(load_items(path, limit=9)) == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InvalidSetting, match="1 question or more"):
        load_items("builtin", limit=limit)


def test_blank_lines_a_byte_order_mark_and_line_separators_in_texts_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = NUMBER | {"question": "1\u2028+ 1?"}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\r\n", "utf-8")
    (item,) = load_items(str(path))
    assert item.question == "1\u2028+ 1?"


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        pytest.param(without(NUMBER, "answer"), "without an answer", id="no answer"),
        pytest.param(without(CHOICE, "answer"), "without an answer", id="no letter"),
        pytest.param(TEXT | {"answers": []}, "answers", id="no texts"),
        pytest.param(NUMBER | {"answer": None}, "without an answer", id="null as an answer"),
        pytest.param(CHOICE | {"answer": "C"}, "none of the letters A, B", id="letter outside the choices"),
        pytest.param(CHOICE | {"answer": "a"}, "none of the letters A, B", id="small letter"),
        pytest.param(CHOICE | {"choices": ["Swan"]}, "choices", id="one choice"),
        pytest.param(CHOICE | {"choices": list("1234567")}, "choices", id="more choices than letters"),
        pytest.param(NUMBER | {"answer": "two"}, "not a number", id="words as a number"),
        pytest.param(NUMBER | {"answer": 2}, "answer: ", id="number not as text"),
        pytest.param(NUMBER | {"answers": ["2"]}, "either answer or answers", id="two answers"),
        pytest.param(without(TEXT, "question"), "either a question or turns", id="no question"),
        pytest.param(TEXT | {"turns": ["Hi"]}, "either a question or turns", id="question and turns"),
        pytest.param(TEXT | {"question": ""}, "question: ", id="empty question"),
        pytest.param(without(TEXT, "id"), "id: ", id="no id"),
        pytest.param(TEXT | {"level": 6}, "level: ", id="level out of range"),
        pytest.param(
            TEXT | {"routellm_weak_correct": "yes"}, "routellm_weak_correct: ", id="label not a bool"
        ),
        pytest.param(CHOICE, "the id 'c/1' is that of line 1", id="duplicate id"),
        pytest.param('{"id": "x", ', "not JSON", id="broken JSON"),
        pytest.param("[" * 100_000, "not JSON", id="JSON too deep"),
        pytest.param('{"id": "x", "question": "\\ud800", "answer": "1"}', "not JSON", id="half a surrogate"),
        pytest.param("[1, 2]", "not a JSON object", id="not an object"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(write, bad, said):
    path = write(CHOICE, "", bad)
    with pytest.raises(InvalidSetting) as error:
        load_items(path)
    assert one_line(error).startswith(f"{path}, line 3: ")
    assert said in one_line(error)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidSetting) as error:
        load_items(str(path))
    assert f"{path} has no rows" in one_line(error)


def test_what_is_not_a_text_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(InvalidSetting, match="not UTF-8"):
        load_items(str(tmp_path / "model.gguf"))
    with pytest.raises(InvalidSetting, match="cannot be read"):
        load_items(str(tmp_path))


@pytest.mark.parametrize("name", ["mmul", "./nowhere.jsonl"])
def test_an_unknown_name_is_answered_with_those_that_exist(name):
    with pytest.raises(InvalidSetting) as error:
        load_items(name)
    assert repr(name) in one_line(error)
    assert "builtin, gsm8k, mmlu, truthfulqa" in one_line(error)


# The hash


def test_the_hash_is_the_same_on_every_machine_and_in_every_release(write):
    assert (
        items_sha256(load_items(write(CHOICE, NUMBER)))
        == "c49030044697ea3dee289d0d3d166a077505a2ddbfab2bf262676dd0c8a5a6c2"
    )


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param([CHOICE, NUMBER | {"answer": "3"}], id="another answer"),
        pytest.param([CHOICE | {"choices": ["Emu", "Swan"]}, NUMBER], id="options in another order"),
        pytest.param([CHOICE, NUMBER | {"routellm_weak_correct": True}], id="another label"),
        pytest.param([NUMBER, CHOICE], id="another order"),
        pytest.param([CHOICE], id="fewer"),
    ],
)
def test_the_hash_changes_with_what_is_asked(write, changed):
    before = items_sha256(load_items(write(CHOICE, NUMBER)))
    assert items_sha256(load_items(write(*changed))) != before


def test_the_hash_does_not_depend_on_how_a_file_is_written(write):
    before = items_sha256(load_items(write(CHOICE)))
    turned = json.dumps(dict(reversed(CHOICE.items())), indent=None, separators=(",", ":"))
    assert items_sha256(load_items(write("", turned))) == before


# The Hub

MMLU = [
    {"question": "Which is even?", "subject": "maths", "choices": ["1", "3", "4", "5"], "answer": 2},
    {"question": "Which is odd?", "subject": "maths", "choices": ["1", "2", "4", "6"], "answer": 0},
    {
        "question": "Which is red?",
        "subject": "colours",
        "choices": ["Sky", "Sea", "Hay", "Blood"],
        "answer": 3,
    },
]
GSM8K = [
    {"question": "Two of 600 euros?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"},
    {"question": "5 less than 2?", "answer": "2 - 5 = -3\n#### -3"},
]


def truthful(num_wrong):
    wrong = [f"Wrong {i}" for i in range(num_wrong)]
    targets = {"choices": ["Right", *wrong], "labels": [1] + [0] * num_wrong}
    return {"question": "Is it so?", "mc1_targets": targets, "mc2_targets": targets}


class FakeHub:
    """Stands for the `datasets` module: gives rows, or fails."""

    def __init__(self, monkeypatch, rows=(), error=None):
        self.rows, self.error, self.asked = rows, error, []
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=self.load_dataset))

    def load_dataset(self, repo, config, split):
        self.asked.append((repo, config, split))
        if self.error:
            raise self.error
        return self.rows


def test_mmlu_s_index_becomes_a_letter_and_ids_count_within_subjects():
    rows = list(mmlu_rows(MMLU))
    assert [row["answer"] for row in rows] == ["C", "A", "D"]
    assert [row["id"] for row in rows] == ["mmlu/maths/0", "mmlu/maths/1", "mmlu/colours/0"]


def test_gsm8k_s_answer_is_split_into_solution_and_number():
    rows = list(gsm8k_rows(GSM8K))
    assert [row["answer"] for row in rows] == ["1200", "-3"]
    assert rows[0]["solution"] == GSM8K[0]["answer"]


@pytest.mark.parametrize("num_wrong", [1, 3, 5, 12])
def test_truthfulqa_s_letter_points_at_the_right_text_among_at_most_six(num_wrong):
    for row in truthfulqa_rows([truthful(num_wrong)] * 50):
        assert row["choices"]["ABCDEF".index(row["answer"])] == "Right"
        assert len(set(row["choices"])) == len(row["choices"]) == min(num_wrong + 1, 6)


def test_truthfulqa_s_right_text_stands_anywhere_and_always_at_the_same_place():
    rows = list(truthfulqa_rows([truthful(3)] * 400))
    assert rows == list(truthfulqa_rows([truthful(3)] * 400))
    shares = Counter(row["answer"] for row in rows)
    assert set(shares) == set("ABCD")
    assert min(shares.values()) > 70  # 100 expected, sd 8.7


@pytest.mark.parametrize(
    ("name", "rows", "asked", "kind"),
    [
        ("mmlu", MMLU, ("cais/mmlu", "all", "test"), Kind.CHOICE),
        ("gsm8k", GSM8K, ("openai/gsm8k", "main", "test"), Kind.NUMBER),
        (
            "truthfulqa",
            [truthful(3)] * 2,
            ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
            Kind.CHOICE,
        ),
    ],
)
def test_a_known_name_is_loaded_from_the_hub(monkeypatch, name, rows, asked, kind):
    hub = FakeHub(monkeypatch, rows)
    items = load_items(name, limit=2)
    assert hub.asked == [asked]
    assert [item.kind for item in items] == [kind, kind]
    assert all(item.id.startswith(f"{name}/") for item in items)


@pytest.mark.parametrize("name", HUB)
def test_a_hub_out_of_reach_is_one_line_that_names_the_local_path(monkeypatch, name):
    FakeHub(monkeypatch, error=ConnectionError("Couldn't reach\nthe Hub"))
    with pytest.raises(DownloadFailed) as error:
        load_items(name)
    assert one_line(error).startswith(f"{name} ({HUB[name].repo}) cannot be fetched")
    assert "give a JSONL file by its path" in one_line(error)


def test_without_the_hub_s_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidSetting) as error:
        load_items("mmlu")
    assert "duet-llm[hub]" in one_line(error)
    assert "path" in one_line(error)


@pytest.mark.parametrize("row", [MMLU[0] | {"answer": -1}, MMLU[0] | {"answer": 7}, {"question": "?"}, None])
def test_a_row_of_the_hub_in_another_shape_is_one_line(monkeypatch, row):
    FakeHub(monkeypatch, [MMLU[0], row])
    with pytest.raises(InvalidSetting) as error:
        load_items("mmlu")
    assert "mmlu" in one_line(error)


def test_a_row_of_the_hub_that_cannot_be_used_is_named_by_its_place(monkeypatch):
    FakeHub(monkeypatch, [MMLU[0], MMLU[1] | {"question": ""}])
    with pytest.raises(InvalidSetting) as error:
        load_items("mmlu")
    assert one_line(error).startswith("mmlu, row 2: question: ")


# The built-in set


def test_the_built_in_set_has_two_questions_for_each_of_five_levels_of_six_subjects():
    items = load_items("builtin")
    cells = Counter((item.group, item.level) for item in items)
    assert len(cells) == 6 * 5
    assert set(cells.values()) == {2}
    assert all(item.id.startswith(f"builtin/{item.group}/{item.level}/") for item in items)


def test_the_built_in_set_mixes_kinds_and_favours_no_letter():
    items = load_items("builtin")
    assert min(Counter(item.kind for item in items).values()) >= 15
    choices = [item for item in items if item.kind is Kind.CHOICE]
    assert {len(set(item.choices)) for item in choices} == {4}
    assert Counter(item.answer for item in choices) == dict.fromkeys("ABCD", len(choices) // 4)


def test_no_question_of_the_built_in_set_holds_its_own_answer():
    for item in load_items("builtin"):
        if item.kind is Kind.TEXT:
            assert extract(item, item.turns[0]) is None, item.id


def test_every_right_answer_of_the_built_in_set_is_graded_as_right_and_no_wrong_option_is():
    for item in load_items("builtin"):
        options = dict(zip("ABCD", item.choices, strict=False)) or {
            item.answer: item.answer or item.answers[0]
        }
        for letter, text in options.items():
            assert is_right(item, f"The answer is {text}") is (letter == item.answer), item.id
