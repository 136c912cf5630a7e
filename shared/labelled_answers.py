"""Labelled answers, the material of a judge head: `duet eval answers` writes them, people correct them.

One JSON object a line:

    {"id": "gsm8k/7", "model": "qwen2.5-coder-0.5b", "question": "...", "answer": "...",
     "right": false, "error_at": 41, "found_by": "calculation"}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import InvalidSetting
from shared.json_lines import numbered_lines


class LabelledAnswer(BaseModel):
    """One answer to a question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(min_length=1)]
    """Of the question."""
    model: str
    """Who answered."""
    question: Annotated[str, Field(min_length=1)]
    """As the model was asked, options included."""
    answer: str
    right: bool
    error_at: Annotated[int, Field(ge=0)] | None = None
    """Characters of the answer before its first error; None where that is not known."""
    found_by: str | None = None
    """How it was found: "calculation", "result", "final" or "hand"."""

    @model_validator(mode="after")
    def _check(self) -> LabelledAnswer:
        if self.right and self.error_at is not None:
            raise ValueError("a right answer has no error_at: set right to false, or error_at to null")
        if self.error_at is not None and self.error_at >= max(1, len(self.answer)):
            raise ValueError(f"error_at is {self.error_at}, but the answer has {len(self.answer)} characters")
        return self


def to_lines(answers: Iterable[LabelledAnswer]) -> str:
    return "".join(f"{answer.model_dump_json()}\n" for answer in answers)


def from_lines(text: str, name: str) -> list[LabelledAnswer]:
    """Read what `to_lines` wrote.

    Args:
        name: of the file, for errors.
    Raises:
        InvalidSetting: there is no answer, or a line is none.
    """
    answers = []
    for number, line in numbered_lines(text):
        try:
            answers.append(LabelledAnswer.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            message = first["msg"].removeprefix("Value error, ")
            raise InvalidSetting(f"{name}, line {number}: {where}: {message}") from None
    if not answers:
        raise InvalidSetting(f"{name} holds no answer: make it with `duet eval answers`")
    return answers
