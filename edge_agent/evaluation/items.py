"""Questions to evaluate on: from a JSONL file, from the Hugging Face Hub, or the set that comes along.

A row of a file has an `id`, the words (`question`, or `turns` for a conversation), and what is right. Its
fields say its kind: `choices` with a letter as `answer`; `answers`, any of which will do; a number as
`answer`; and `turns` alone, where nothing is graded. `subject` or `category`, `level`, `solution` and
`routellm_*_correct` are optional.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_agent.evaluation.numerals import canonical_number
from edge_agent.routing.probes import multiple_choice
from shared.errors import DownloadFailed, InvalidSetting
from shared.json_lines import numbered_lines

LETTERS = "ABCDEF"
"""Of options, as `multiple_choice` writes them."""

BUILT_IN = "builtin"


class Kind(str, Enum):
    """What is asked for, and so how an answer is graded."""

    CHOICE = "choice"
    NUMBER = "number"
    TEXT = "text"
    OPEN = "open"
    """Nothing is graded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question of a data set."""

    id: str
    kind: Kind
    turns: tuple[str, ...]
    """What the user says, first turn first."""
    choices: tuple[str, ...] = ()
    """2 to 6 options of a CHOICE; empty for any other."""
    answer: str | None = None
    """The letter of a CHOICE, or the number of a NUMBER."""
    answers: tuple[str, ...] = ()
    """Of a TEXT: any of these is right."""
    reference: str | None = None
    """A worked solution, where the set has one."""
    group: str = ""
    """Subject or category."""
    level: int | None = None
    """1 (a child knows) to 5 (an expert thinks), where the set has levels."""
    labels: Mapping[str, bool] = field(default_factory=dict)
    """Whether other models were right: "routellm_weak", "routellm_strong"."""

    @property
    def question(self) -> str:
        """The first turn, with its options if it has any."""
        return multiple_choice(self.turns[0], self.choices) if self.choices else self.turns[0]


def load_items(name_or_path: str, *, limit: int | None = None) -> list[Item]:
    """Read a data set: `builtin`, one of the Hub's by name, or a JSONL file by path.

    Args:
        limit: take the first so many rows, >= 1; None takes all.
    Raises:
        InvalidSetting: no such name or file, a row that cannot be used, or the Hub's library is missing.
        DownloadFailed: the Hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise InvalidSetting(f"limit is {limit}: take 1 question or more")
    if name_or_path in HUB:
        rows = _hub_rows(name_or_path)
        unit = "row"
    else:
        rows = _json_rows(_read(name_or_path), name_or_path)
        unit = "line"
    items: list[Item] = []
    seen: dict[str, int] = {}
    for number, row in islice(rows, limit):
        where = f"{name_or_path}, {unit} {number}"
        item = _item(row, where)
        if item.id in seen:
            raise InvalidSetting(
                f"{where}: the id {item.id!r} is that of {unit} {seen[item.id]}: make ids unique"
            )
        seen[item.id] = number
        items.append(item)
    if not items:
        raise InvalidSetting(f"{name_or_path} has no rows: give a file with one question a line")
    return items


def items_sha256(items: Iterable[Item]) -> str:
    """Hash of everything that the items hold, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# Files


class _Row(BaseModel):
    """A row as its file has it; fields that nobody reads are let through."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)] | None = None
    turns: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    choices: Annotated[list[str], Field(min_length=2, max_length=len(LETTERS))] | None = None
    answer: str | None = None
    answers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    solution: str | None = None
    subject: str = ""
    category: str = ""
    level: Annotated[int, Field(ge=1, le=5)] | None = None
    routellm_weak_correct: bool | None = None
    routellm_strong_correct: bool | None = None

    @property
    def kind(self) -> Kind:
        if self.choices is not None:
            return Kind.CHOICE
        if self.answers is not None:
            return Kind.TEXT
        return Kind.OPEN if self.answer is None else Kind.NUMBER

    @model_validator(mode="after")
    def _check(self) -> _Row:
        if (self.question is None) == (self.turns is None):
            raise ValueError("give either a question or turns")
        if self.answer is None and (self.choices or (self.kind is Kind.OPEN and self.turns is None)):
            raise ValueError("a row without an answer: give answer or answers")
        if self.answer is not None and self.answers is not None:
            raise ValueError("give either answer or answers")
        letters = LETTERS[: len(self.choices or ())]
        if self.kind is Kind.CHOICE and self.answer not in [*letters]:
            raise ValueError(f"the answer {self.answer!r} is none of the letters {', '.join(letters)}")
        if self.kind is Kind.NUMBER and canonical_number(self.answer or "") is None:
            raise ValueError(f"the answer {self.answer!r} is not a number: give texts as answers")
        return self

    def item(self) -> Item:
        labels = {
            "routellm_weak": self.routellm_weak_correct,
            "routellm_strong": self.routellm_strong_correct,
        }
        return Item(
            id=self.id,
            kind=self.kind,
            turns=tuple(self.turns or [self.question or ""]),
            choices=tuple(self.choices or ()),
            answer=self.answer,
            answers=tuple(self.answers or ()),
            reference=self.solution,
            group=self.subject or self.category,
            level=self.level,
            labels={name: was_right for name, was_right in labels.items() if was_right is not None},
        )


def _item(row: object, where: str) -> Item:
    if not isinstance(row, dict):
        raise InvalidSetting(f"{where}: not a JSON object: give one with id, question and answer")
    try:
        return _Row.model_validate(row).item()
    except ValidationError as error:
        first = error.errors()[0]
        fields = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidSetting(f"{where}: {fields + ': ' if fields else ''}{message}") from None


def _read(name_or_path: str) -> str:
    try:
        if name_or_path == BUILT_IN:
            return files("edge_agent.evaluation").joinpath("questions.jsonl").read_text("utf-8")
        return Path(name_or_path).read_text("utf-8-sig")
    except FileNotFoundError:
        names = ", ".join(sorted([BUILT_IN, *HUB]))
        raise InvalidSetting(
            f"no data set and no file is called {name_or_path!r}: the names are {names}; or give a JSONL file"
        ) from None
    except OSError as error:
        raise InvalidSetting(f"{name_or_path} cannot be read: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError:
        raise InvalidSetting(f"{name_or_path} is not UTF-8 text: give a JSONL file") from None


def _json_rows(text: str, name: str) -> Iterator[tuple[int, object]]:
    """Each line's number and content."""
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # half of a surrogate pair is a ValueError too
            raise InvalidSetting(f"{name}, line {number}: not JSON: {' '.join(str(error).split())}") from None
        yield number, row


# The Hub: its rows become rows of a file, so that one place checks both.


def mmlu_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `cais/mmlu`: `question`, `subject`, `choices` (4) and the right one's index as `answer`."""
    seen: Counter[str] = Counter()
    for row in rows:
        subject = row["subject"]
        yield {
            "id": f"mmlu/{subject}/{seen[subject]}",
            "subject": subject,
            "question": row["question"],
            "choices": list(row["choices"]),
            "answer": LETTERS[row["answer"]],
        }
        seen[subject] += 1


def gsm8k_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `openai/gsm8k`: `question`, and as `answer` a worked solution whose last line is `#### 72`."""
    for index, row in enumerate(rows):
        yield {
            "id": f"gsm8k/{index}",
            "subject": "gsm8k",
            "question": row["question"],
            "solution": row["answer"],
            "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
        }


def truthfulqa_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `truthfulqa/truthful_qa`, MC1: `question` and `mc1_targets`, whose `labels` are 1 for the one
    right text of `choices`, which comes first there, and 0 for the others.

    Options are put in an order drawn from the row's id; of more than 5 wrong ones, 5 are drawn.
    """
    for index, row in enumerate(rows):
        row_id = f"truthfulqa/{index}"
        targets = row["mc1_targets"]
        right = targets["choices"][targets["labels"].index(1)]
        wrong = sorted(
            (text for text, label in zip(targets["choices"], targets["labels"], strict=True) if not label),
            key=lambda text: _drawn(row_id, text),
        )[: len(LETTERS) - 1]
        place = _drawn(row_id) % (len(wrong) + 1)
        yield {
            "id": row_id,
            "subject": "truthfulqa",
            "question": row["question"],
            "choices": [*wrong[:place], right, *wrong[place:]],
            "answer": LETTERS[place],
        }


def _drawn(*texts: str) -> int:
    """A number that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:8], "big")


class _HubSet(NamedTuple):
    repo: str
    config: str
    split: str
    convert: Callable[[Iterable[Mapping[str, Any]]], Iterator[dict[str, Any]]]


HUB = {
    "mmlu": _HubSet("cais/mmlu", "all", "test", mmlu_rows),
    "gsm8k": _HubSet("openai/gsm8k", "main", "test", gsm8k_rows),
    "truthfulqa": _HubSet("truthfulqa/truthful_qa", "multiple_choice", "validation", truthfulqa_rows),
}
"""Data sets of the Hugging Face Hub, by the name that `duet eval` knows them by."""


def _hub_rows(name: str) -> Iterator[tuple[int, object]]:
    source = HUB[name]
    try:
        import datasets
    except ImportError:
        raise InvalidSetting(
            f"{name} comes from the Hugging Face Hub, which takes pip install 'duet-llm[hub]';"
            " or give a JSONL file by its path"
        ) from None
    try:
        rows = datasets.load_dataset(source.repo, source.config, split=source.split)
    except Exception as error:  # whatever its HTTP client, its cache and its readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadFailed(
            f"{name} ({source.repo}) cannot be fetched from the Hugging Face Hub: {reason[:200]};"
            " give a JSONL file by its path instead"
        ) from None
    try:
        yield from enumerate(source.convert(rows), 1)
    except (LookupError, TypeError, ValueError) as error:
        raise InvalidSetting(
            f"{name} ({source.repo}) holds a row of another shape ({error!r}); give a JSONL file by its path"
        ) from None
