"""Which signals a sweep compares: each alone, those of one kind together, and everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edge_agent.evaluation.crossfit import SINGLE, feature_names
from edge_agent.evaluation.runs import Row
from edge_agent.routing.probes import SHAPE_FEATURES

WINDOWS = (16, 32, 64)
"""First tokens of an answer that are looked at; the whole answer besides."""

_PROMPT_FORM = (
    *("who-prompt", "rating-prompt", "letters-prompt"),
    *("who-few-shot", "rating-few-shot", "letters-few-shot"),
)
_COURSE = "answer."


def with_course(rows: Sequence[Row]) -> list[Row]:
    """Rows whose features also say how sure the edge was while it wrote its answer.

    These signals come too late for a decision before the answer; they show what watching it is worth.
    """
    return [{**row, "features": {**row["features"], **_course(row)}} for row in rows]


def _course(row: Row) -> dict[str, float]:
    logprobs = (row["edge"] or {}).get("logprobs")
    if not logprobs:
        return {}
    features = {}
    for window in (*WINDOWS, len(logprobs)):
        seen = np.array(logprobs[:window])
        name = f"first-{window}" if window in WINDOWS and window != len(logprobs) else "whole"
        features[f"{_COURSE}{name}.mean"] = float(seen.mean())
        features[f"{_COURSE}{name}.lowest"] = float(seen.min())
    features[f"{_COURSE}tokens.log"] = float(np.log(len(logprobs)))
    return features


def feature_sets(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Named sets of the features that these rows have.

    Each probe alone; every number known before an answer, of which a sweep takes one; shape (what can be seen
    without the model); probes in the model's own mouth (which share one reading of the question); probes
    that ask about the question in a prompt, with and without examples; everything known before an answer;
    and that with the answer's first tokens or all of it.
    """
    names = feature_names(rows)
    shape = _starting(names, SHAPE_FEATURES)
    course = _starting(names, (_COURSE,))
    probes = [name for name in names if name not in {*shape, *course}]
    asked = [name for name in probes if name.startswith(_PROMPT_FORM)]
    own_mouth = [name for name in probes if name not in asked and not name.startswith("confidence-draft")]
    sets = {"prompt length": _starting(names, ("prompt_tokens.",)), "shape": shape}
    for probe in sorted({name.partition(".")[0] for name in probes}):
        sets[probe] = [name for name in probes if name.partition(".")[0] == probe]
    sets[SINGLE] = probes + shape
    sets["suffix probes"] = own_mouth
    sets["prompt-form probes"] = asked
    sets["suffix probes and shape"] = own_mouth + shape
    sets["all before the answer"] = probes + shape
    for window in WINDOWS:
        seen = _starting(course, (f"{_COURSE}first-{window}.",))
        sets[f"and {window} tokens of the answer"] = probes + shape + seen if seen else []
    sets["and the whole answer"] = probes + shape + course if course else []
    return {name: features for name, features in sets.items() if features}


def _starting(names: Iterable[str], beginnings: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.startswith(beginnings)]
