"""What one GPU was measured to do: the facts that a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import InvalidSetting

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ServerTable(BaseModel):
    """One GPU with one target model, measured back to back: no edge thinks between its rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    gpu: str
    scheme: str
    """How rounds run in the engine: `request` (each its own request) or `resident`."""
    max_draft_tokens: Annotated[int, Field(ge=1)]
    """Draft tokens of each measured round."""
    source: str
    """The benchmark's result that the figures come from."""
    edges: tuple[Positive, ...]
    """[num_points], edges at once, ascending."""
    rounds_per_s: tuple[Positive, ...]
    """[num_points], of all edges together."""
    streams: tuple[Positive, ...]
    """[num_plain], plain streams at once, ascending."""
    plain_tokens_per_s: tuple[Positive, ...]
    """[num_plain], of all plain streams together."""

    @model_validator(mode="after")
    def _check(self) -> ServerTable:
        for name, xs, ys in (
            ("edges", self.edges, self.rounds_per_s),
            ("streams", self.streams, self.plain_tokens_per_s),
        ):
            if not xs or len(xs) != len(ys) or any(b <= a for a, b in pairwise(xs)):
                raise ValueError(f"{name} must ascend, with one rate each")
        return self

    def pass_seconds(self, num_rounds: int) -> float:
        """Time of a pass over `num_rounds` waiting rounds, >= 1; beyond `most_edges` the rate stays."""
        return _between(*self._passes, num_rounds)

    @cached_property
    def _passes(self) -> tuple[list[float], list[float]]:
        """Rounds of a pass, ascending, and its time.

        Edges that do not think are served in two groups by turns: a round that comes while a pass is under
        way waits for the next. However n edges are split, both passes together take n / rounds_per_s: two
        over n / 2, or one over a single round and one over the others, which tells of the largest passes.
        An edge alone waits for its pass and the overhead.
        """
        both = [(n, n / rate) for n, rate in zip(self.edges, self.rounds_per_s, strict=True)]
        halves = [(n / 2, seconds / 2) for n, seconds in both if n >= 2] or both
        if both[0][0] == 1 and halves[0][0] > 1:
            halves.insert(0, (1, min(both[0][1], halves[0][1])))
        counts, times = (list(column) for column in zip(*halves, strict=True))
        most, seconds = both[-1]
        if most > 2:
            times.append(seconds - _between(counts, times, 1))
            counts.append(most - 1)
        return counts, times

    @property
    def overhead_s(self) -> float:
        """What an edge alone waits for beside its pass: service, network and the engine's intake."""
        return max(0.0, 1.0 / self.rounds_per_s[0] - self.pass_seconds(1)) if self.edges[0] == 1 else 0.0

    def step_seconds(self, num_streams: int) -> float:
        """Time of one token of each of `num_streams` plain streams."""
        times = [n / rate for n, rate in zip(self.streams, self.plain_tokens_per_s, strict=True)]
        return _between(self.streams, times, num_streams)

    @property
    def most_edges(self) -> int:
        """Edges at once that were measured; beyond them nothing is known."""
        return int(self.edges[-1])


def _between(counts: Sequence[float], times: Sequence[float], count: int) -> float:
    """Linear between points; below the first the time stays what it is there, beyond the last the rate."""
    if count >= counts[-1]:
        return count / counts[-1] * times[-1]
    return float(np.interp(count, counts, times))


@dataclass(frozen=True, slots=True)
class Tables:
    rows: tuple[ServerTable, ...]

    def find(self, model: str, gpu: str, scheme: str | None) -> ServerTable:
        """The table of a model on a GPU; of several schemes the one with the highest rate.

        Raises:
            InvalidSetting: none was measured; the message names those that were.
        """
        found = [t for t in self.rows if (t.model, t.gpu) == (model, gpu) and scheme in (None, t.scheme)]
        if not found:
            there = "; ".join(
                sorted({f"--model {t.model} --gpu {t.gpu} --scheme {t.scheme}" for t in self.rows})
            )
            raise InvalidSetting(
                f"no measurement of {model} on {gpu}{f' with scheme {scheme}' if scheme else ''};"
                f" there are: {there}; or measure yours and give the file with --table"
            )
        return max(found, key=lambda table: max(table.rounds_per_s))


def load_tables(file: Path | None = None) -> Tables:
    """The tables of a YAML file, or those that come with the package.

    Raises:
        InvalidSetting: the file cannot be read, or is no such table.
    """
    where = str(file) if file else "the package's tables"
    try:
        text = file.read_text() if file else files(__package__).joinpath("tables.yaml").read_text()
        raw = yaml.safe_load(text)
        if not isinstance(raw, list):
            raise InvalidSetting(f"{where} holds no list of measurements")
        return Tables(tuple(ServerTable.model_validate(row) for row in raw))
    except OSError as error:
        raise InvalidSetting(f"cannot read {where}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InvalidSetting(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidSetting(f"{where}: {field + ': ' if field else ''}{first['msg'].lower()}") from None
