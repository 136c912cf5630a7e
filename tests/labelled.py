"""Labelled answers from which a judge head is made in the tests."""

from __future__ import annotations

from shared.labelled_answers import LabelledAnswer

TEXT = "Once there were nine stones. "
CURSE = "#%&! "


def answers(num_questions: int = 24) -> list[LabelledAnswer]:
    """To each question a right answer, and a wrong one that curses from its middle on."""
    found = []
    for number in range(num_questions):
        start = TEXT * (1 + number % 3)
        question = {"id": f"q{number}", "question": f"Story {number}?"}
        found += [
            LabelledAnswer(**question, model="a", answer=start + TEXT, right=True),
            LabelledAnswer(
                **question,
                model="b",
                answer=start + CURSE * 4,
                right=False,
                error_at=len(start),
                found_by="hand",
            ),
        ]
    return found
