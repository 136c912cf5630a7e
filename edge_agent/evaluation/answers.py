"""Labelled answers from runs of `duet eval`: graded, each wrong one with its first error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edge_agent.evaluation.first_error import first_error
from edge_agent.evaluation.grading import is_right
from edge_agent.evaluation.items import Item
from edge_agent.evaluation.runs import Row, read_run
from shared.errors import InvalidSetting
from shared.labelled_answers import LabelledAnswer, to_lines


def answers_of_runs(folders: Sequence[Path], items: Sequence[Item]) -> list[LabelledAnswer]:
    """The graded answers of routing runs, each text once, question by question.

    Answers that were cut off are left out: what they would have come to is not known.

    Raises:
        InvalidRequest: a folder holds no run.
        InvalidSetting: no answer belongs to these questions.
    """
    by_id = {item.id: item for item in items}
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for folder in folders:
        manifest, rows = read_run(folder)
        for model, row in _answers(manifest, rows):
            if row["item"] in by_id:
                texts[row["item"]].setdefault(row["text"], model)
    found = [
        answer
        for item in items
        if item.id in texts
        for answer in labelled(item, [(model, text) for text, model in texts[item.id].items()])
    ]
    if not found:
        raise InvalidSetting(
            f"{', '.join(map(str, folders))} hold no graded answer to these questions:"
            " name the runs of `duet eval routing`, and the --data that they were made with"
        )
    return found


def labelled(item: Item, answers: Sequence[tuple[str, str]]) -> Iterator[LabelledAnswer]:
    """Grade answers to one question and find the first errors of the wrong ones.

    Args:
        answers: model and text of each.
    """
    graded = [(model, text, is_right(item, text)) for model, text in answers]
    right_texts = [text for _, text, right in graded if right]
    for model, text, right in graded:
        if right is None:
            continue
        error = None if right else first_error(item, text, right_texts)
        yield LabelledAnswer(
            id=item.id,
            model=model,
            question=item.question,
            answer=text,
            right=right,
            error_at=error.at if error else None,
            found_by=error.by.value if error else None,
        )


def write_answers(answers: Iterable[LabelledAnswer], path: Path) -> None:
    """Raises InvalidSetting where the file is there, perhaps with hand labels, or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_lines(answers))
    except FileExistsError:
        raise InvalidSetting(f"{path} is there, and may hold hand labels: choose another file") from None
    except OSError as error:
        raise InvalidSetting(f"cannot write {path}: {error.strerror}; choose another file") from None


def _answers(manifest: Mapping[str, object], rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Model, and question and text, of each whole answer of a run."""
    identity = manifest["identity"]
    assert isinstance(identity, dict)
    models = {"edge": identity["edge"]["model"], "cloud": identity.get("cloud")}
    for row in rows:
        for side, model in models.items():
            answer = row.get(side)
            if answer and "text" in answer and not answer["censored"]:
                yield str(model), {"item": row["id"], "text": answer["text"]}
