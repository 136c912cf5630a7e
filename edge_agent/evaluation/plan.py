"""What an experiment is: units of work, and something that turns units into rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from edge_agent.evaluation.items import Item
from edge_agent.evaluation.runs import Row


@dataclass(frozen=True, slots=True)
class Unit:
    """One row's worth of work."""

    id: str
    item: Item
    condition: Mapping[str, object] = field(default_factory=dict)
    """What is varied, where an experiment varies something."""


Examine = Callable[[Sequence[Unit]], AsyncGenerator[Row, None]]
"""Makes one row a unit, each yielded as soon as it is there, in any order."""


class Plan(Protocol):
    """An experiment's settings. Picklable, so that workers in other processes can open it."""

    experiment: str

    @property
    def num_parallel(self) -> int:
        """Units whose answers share passes over the edge model's weights."""

    def identity(self) -> dict[str, object]:
        """Settings that make two runs the same."""

    def units(self, items: Sequence[Item]) -> list[Unit]: ...

    def open(self) -> AbstractAsyncContextManager[Examine]:
        """Load the models and connect; closed on leaving."""
