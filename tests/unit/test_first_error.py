"""Where a wrong answer goes wrong first, and the labelled answers that are made of runs."""

from __future__ import annotations

import pytest

from edge_agent.evaluation.answers import answers_of_runs, labelled, write_answers
from edge_agent.evaluation.first_error import FoundBy, calculations, first_error
from edge_agent.evaluation.items import Item, Kind
from shared.errors import InvalidSetting
from shared.labelled_answers import LabelledAnswer, from_lines, to_lines
from tests.eval_runs import write_run

EGGS = Item(
    id="eggs",
    kind=Kind.NUMBER,
    turns=("I buy 7 boxes of 8 eggs and break 6. How many are whole?",),
    answer="50",
    reference="7*8=<<7*8=56>>56\n56-6=<<56-6=50>>50\n#### 50",
)
CAPITAL = Item(
    id="capital", kind=Kind.CHOICE, turns=("Capital of France?",), choices=("Lyon", "Paris"), answer="B"
)


@pytest.mark.parametrize(
    ("text", "result", "is_wrong"),
    [
        ("7 x 8 = 56", "56", False),
        ("7 * 8 = 54", "54", True),
        (r"\[ 7 \times 8 = 54 \]", "54", True),
        (r"\( \frac{9}{3} = 4 \)", "4", True),
        (r"\frac{10}{3} = 3.33", "3.33", False),
        ("10 / 3 = 3", "3", False),
        ("$1,200 + $300 = $1,500", "1500", False),
        ("(2 + 3) * 4 = 14", "14", True),
        ("2 + 3 × 4 = 14", "14", False),
        ("5 eggs + 3 eggs = 9 eggs", "9", True),
        ("Total = 12", "12", False),
        ("half of 10 = 6", "6", False),
        ("10% of 50 = 6", "6", False),
        (r"5 \text{ feet} - 2 \text{ feet} = 4 \text{ feet}", "4", True),
    ],
)
def test_a_calculation_is_read_as_people_and_models_write_it(text, result, is_wrong):
    [found] = calculations(text)
    assert (found.result, found.is_wrong, found.at) == (
        result,
        is_wrong,
        text.index(result[0], text.index("=")),
    )


@pytest.mark.parametrize("text", ["no sums here", "x = y", "= 4 x 5 boxes", "that is = 50% more", ""])
def test_what_is_no_calculation_is_passed_over(text):
    assert list(calculations(text)) == []


@pytest.mark.parametrize(
    ("text", "wrong_from", "by"),
    [
        pytest.param("7 x 8 = 54, 54 - 6 = 48", "54, 54", FoundBy.CALCULATION, id="a sum that is wrong"),
        pytest.param("7 + 8 = 15, 15 - 6 = 9", "7 + 8", FoundBy.RESULT, id="a right sum of a wrong idea"),
        pytest.param("7 x 8 = 56, 56 + 6 = 62", "56 + 6", FoundBy.RESULT, id="behind a right step"),
        pytest.param("There are 48 whole eggs.", "48", FoundBy.FINAL, id="nothing but the number"),
        pytest.param("7 x 8 = 56. Of 48 eggs 48 are whole", "48 are", FoundBy.FINAL, id="its last mention"),
    ],
)
def test_the_first_error_of_a_number(text, wrong_from, by):
    error = first_error(EGGS, text)
    assert error is not None
    assert (text[error.at :].startswith(wrong_from), error.by) == (True, by)


def test_a_result_of_another_right_answer_is_none():
    text = "8 - 6 = 2, 6 x 8 = 48, 48 + 3 = 51"
    assert first_error(EGGS, text).at == 0
    assert text[first_error(EGGS, text, ["8 - 6 = 2, and 6 x 8 = 48"]).at :].startswith("48 + 3")


def test_of_a_choice_the_letter_is_wrong():
    text = "The answer is A, of course. A"
    assert text[first_error(CAPITAL, text).at :] == "A, of course. A"
    assert first_error(CAPITAL, "I cannot say.") is None


def test_answers_are_graded_and_right_ones_have_no_error():
    answers = list(labelled(EGGS, [("small", "7 x 8 = 54"), ("large", "7 x 8 = 56, 56 - 6 = 50")]))
    assert [(a.model, a.right, a.error_at) for a in answers] == [("small", False, 8), ("large", True, None)]


def test_the_answers_of_runs_are_taken_once_and_whole(tmp_path):
    def answer(text, *, censored=False):
        return {"text": text, "censored": censored}

    run = write_run(
        tmp_path / "run",
        "routing",
        [
            {"id": "eggs", "edge": answer("7 x 8 = 54"), "cloud": answer("7 x 8 = 56, 56 - 6 = 50")},
            {"id": "capital", "edge": answer("B"), "cloud": answer("A because", censored=True)},
            {"id": "unknown", "edge": answer("1"), "cloud": None},
        ],
    )
    found = answers_of_runs([run, run], [EGGS, CAPITAL])
    assert [(a.id, a.model, a.right) for a in found] == [
        ("eggs", "edge-0.5b", False),
        ("eggs", "cloud-1.5b", True),
        ("capital", "edge-0.5b", True),
    ]
    assert found[2].question.endswith("B. Paris")


def test_runs_without_these_questions_are_refused(tmp_path):
    run = write_run(tmp_path / "run", "routing", [{"id": "x", "edge": {"text": "1", "censored": False}}])
    with pytest.raises(InvalidSetting, match="no graded answer"):
        answers_of_runs([run], [EGGS])


def test_a_file_with_hand_labels_is_not_overwritten(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = list(labelled(EGGS, [("small", "7 x 8 = 54 été")]))
    write_answers(answers, path)
    with pytest.raises(InvalidSetting, match="hand labels"):
        write_answers(answers, path)
    assert from_lines(path.read_text("utf-8"), "answers.jsonl") == answers


ANSWER = LabelledAnswer(
    id="a", model="m", question="q", answer="abc", right=False, error_at=1, found_by="hand"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("not JSON", "line 2: the line", id="no JSON"),
        pytest.param(to_lines([ANSWER]).replace("abc", ""), "has 0 characters", id="an error behind the end"),
        pytest.param(
            to_lines([ANSWER]).replace("false", "true"), "no error_at", id="a right one with an error"
        ),
        pytest.param(to_lines([ANSWER]).replace("error_at", "eror_at"), "eror_at", id="a misspelt field"),
        pytest.param(to_lines([ANSWER]).replace('1,"', '-1,"'), "error_at", id="an error before the start"),
    ],
)
def test_a_line_that_is_no_labelled_answer_is_named(line, message):
    with pytest.raises(InvalidSetting, match=message) as caught:
        from_lines(to_lines([ANSWER]) + line, "file")
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_refused():
    with pytest.raises(InvalidSetting, match="no answer"):
        from_lines("\n", "file")
