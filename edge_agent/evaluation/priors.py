"""The prior of a probe's options, taken from the questions themselves instead of from one without content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from edge_agent.evaluation.runs import Row
from edge_agent.routing.probes import guess_features

_LEAST = 1e-6
"""Of a probability that a row's rounding may have made 0."""


def with_prior_of_questions(rows: Sequence[Row], probes: Sequence[str]) -> list[Row]:
    """Rows whose guesses have lost what the model says on average over all these questions.

    Batch calibration (Zhou et al. 2024, arXiv:2309.17249): no label is used. A question without content shows
    less well what a model likes to say, above all after examples.

    Args:
        probes: those of which the guess is read, such as "letters"; others stay as they are.
    """
    made = [
        {**row, "features": dict(row["features"]), "distributions": dict(row["distributions"])}
        for row in rows
    ]
    alike: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in made:
        for probe in probes:
            if probe in row["distributions"]:
                alike[probe, len(row["distributions"][probe])].append(row)
    for (probe, _), having in alike.items():
        options = list(having[0]["distributions"][probe])
        probs = np.array([[row["distributions"][probe][option] for option in options] for row in having])
        logprobs = np.log(np.maximum(probs, _LEAST))
        logprobs -= logprobs.mean(axis=0)
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        for row, said in zip(having, logprobs, strict=True):
            row["distributions"][probe] = dict(zip(options, np.exp(said).tolist(), strict=True))
            row["features"] |= guess_features(probe, said)
    return made
