"""What counts as right in a generated answer."""

from __future__ import annotations

import pytest

from edge_agent.evaluation.grading import chosen_letter, extract, final_number, is_right
from edge_agent.evaluation.items import Item, Kind
from edge_agent.evaluation.numerals import canonical_number, numbers

OBSERVERS = ("Active observer", "Participant observer", "Indiscreet observer", "Meddling observer")
VERDICTS = ("Wrong, Wrong", "Wrong, Not wrong", "Not wrong, Wrong", "Not wrong, Not wrong")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # The letter and nothing else
        ("B", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("A", "A"),
        ("A.", "A"),
        # The letter, then more
        ("B. Participant observer", "B"),
        ("B) something else", "B"),
        ("B: it is the one", "B"),
        ("B - the one", "B"),
        ("B\n\nA participant takes part.", "B"),
        ("Option D. Because of this.", "D"),
        ("A. Active observer", "A"),
        ("B. Meddling observer", "B"),
        # Stated in a sentence
        ("The correct answer is **B**.", "B"),
        ("Answer: B) foo", "B"),
        ("The correct answer is:\n\n(C)", "C"),
        ("the best option would be (D)", "D"),
        ("I would choose D.", "D"),
        ("So I'd go with option C, as said.", "C"),
        ("The answer is A", "A"),
        ("The answer is A because it fits", "A"),
        ("Answer: A Active observer", "A"),
        (r"Hence $\boxed{B}$", "B"),
        (r"\boxed{\text{C}}", "C"),
        ("It is (C), I think", "C"),
        # After reasoning
        ("Let us see.\n\nA. no\nB. perhaps\n\nThe correct answer is C.", "C"),
        ("Option B is incorrect. Option C is correct.", "C"),
        ("The answer is not A, it is B", "B"),
        ("We weigh each of them.\n\nB", "B"),
        # An option's text
        ("participant observer.", "B"),
        ("He is an Active Observer.", "A"),
        ("The answer is Participant observer, not Active observer", "B"),
        # "A" as an article
        ("A participant observer is one who takes part", "B"),
        ("The answer is a participant observer.", "B"),
        ("A meddling observer", "D"),
        ("A great question!", None),
        # Several, or none
        ("A or B", None),
        ("The answer is A or B", None),
        ("(A) or (B)", None),
        ("A, B and C", None),
        ("The answer is A. No, the answer is B.", None),
        ("A. Active observer\nB. Participant observer\nC. Indiscreet observer", None),
        ("Participant observer or meddling observer", None),
        ("B is not correct", None),
        ("The answer is E", None),
        ("It is C++", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_a_letter_is_read_from_free_text(text, letter):
    assert chosen_letter(text, OBSERVERS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("Not wrong, Wrong", "C"), ("Wrong, Not wrong.", "B"), ("It is clear: not wrong, not wrong", "D")],
)
def test_an_option_that_stands_inside_another_is_not_read_from_it(text, letter):
    assert chosen_letter(text, VERDICTS) == letter


def test_of_an_option_that_another_begins_with_the_longer_is_read():
    assert chosen_letter("It is New York City.", ("New York", "New York City")) == "B"
    assert chosen_letter("It is New York.", ("New York", "New York City")) == "A"


@pytest.mark.parametrize(
    ("text", "letter"),
    [("It is 5.", "A"), ("It is -5.", "B"), ("It is 5.2", None), ("It is 15", None), ("It is 1,500", None)],
)
def test_options_that_are_numbers_are_compared_whole(text, letter):
    assert chosen_letter(text, ("5", "-5", "500")) == letter


def test_options_of_equal_text_are_told_apart_by_their_letter_only():
    assert chosen_letter("zero", ("zero", "zero", "one")) is None
    assert chosen_letter("B. zero", ("zero", "zero", "one")) == "B"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("72.00", "72"),
        ("072", "72"),
        ("It costs $1,234.50.", "1234.5"),
        ("so 5%", "5"),
        ("12 bags, 3 each: **36**.", "36"),
        ("-5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22127 degrees", "-7"),
        ("-0.0", "0"),
        ("10-3", "3"),
        (".5", "0.5"),
        ("10 + 2 = 12 kg", "12"),
        ("first 3, then 1,2345", "2345"),
        ("x = 3/4", "3/4"),
        (r"$\frac{3}{4}$", "3/4"),
        ("5/day", "5"),
        ("10 litres of CO2", "10"),
        ("1" * 5000, "1" * 5000),
        ("no idea", None),
        ("", None),
        # Marked as the result
        (r"\boxed{72} within 3 days", "72"),
        (r"\boxed{1} and \boxed{\$1{,}000}", "1000"),
        (r"\boxed{x}, so 9", "9"),
        ("#### 72\n\nQuestion 2: 5 apples", "72"),
        ("#### $1,080.", "1080"),
        ("#### 1. Add them\nThat is 9", "9"),
        ("#### Step 2\nThat is 9", "9"),
    ],
)
def test_the_result_is_the_marked_number_or_else_the_last(text, number):
    assert final_number(text) == number


def test_numbers_are_found_in_their_order():
    assert numbers("10-3 is 7, or $1,234.50 and 3/4 of 45%") == ["10", "3", "7", "1234.5", "3/4", "45"]


@pytest.mark.parametrize("text", ["", "five", "5 kg", "5 6", "1.2.3", "-", "$"])
def test_what_is_more_than_a_number_has_no_canonical_form(text):
    assert canonical_number(text) is None


def number(answer):
    return Item(id="1", kind=Kind.NUMBER, turns=("?",), answer=answer)


def text_item(*answers):
    return Item(id="1", kind=Kind.TEXT, turns=("?",), answers=answers)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("72", "That makes 72.00 in all", True),
        ("1,000", "$1000", True),
        ("0.5", "1/2", False),
        ("4", "3/4", False),
        ("5", "-5", False),
        ("5", "five", False),
    ],
)
def test_a_number_is_right_if_its_value_is(answer, text, right):
    assert is_right(number(answer), text) is right


@pytest.mark.parametrize(
    ("answers", "text", "found"),
    [
        (["Paris"], "It is **Paris**.", "Paris"),
        (["Paris"], "PARIS", "Paris"),
        (["Paris"], "Parisian", None),
        (["eight", "8"], "8 legs", "8"),
        (["8"], "18", None),
        (["ORDER BY"], "order\nby", "ORDER BY"),
        (["Asunción"], "Es ASUNCIÓN", "Asunción"),
        (["Grimm"], "Grimm's law", "Grimm"),
        (["=="], "Use `==` here", "=="),
        (["cherry-pick"], "git cherry-pick abc", "cherry-pick"),
        (["Paris"], "", None),
    ],
)
def test_a_text_is_found_as_whole_words_in_any_case(answers, text, found):
    item = text_item(*answers)
    assert extract(item, text) == found
    assert is_right(item, text) is (found is not None)


def test_a_choice_is_right_if_its_letter_is():
    item = Item(id="1", kind=Kind.CHOICE, turns=("?",), choices=OBSERVERS, answer="B")
    assert is_right(item, "Answer: B") is True
    assert is_right(item, "Answer: A") is False
    assert is_right(item, "Hm.") is False


def test_nothing_is_right_or_wrong_where_nothing_is_graded():
    item = Item(id="1", kind=Kind.OPEN, turns=("Write a poem.", "Shorter."))
    assert extract(item, "B 72") is None
    assert is_right(item, "B 72") is None
