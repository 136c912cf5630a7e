"""Worlds for the speed controller: real sessions on a virtual clock, drafts that agree by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.recorded import Answer, Position
from benchmarks.virtual_link import World, run_auto
from shared.controller import SpeedController


def world(*, step: float = 5, rtt_ms: float = 50, extra_ms: float = 6, token_ms: float = 0.02) -> World:
    """Drafts of 5 ms a token; a target step of so many draft steps."""
    t_step = 5e-3 * step
    return World(5e-3, t_step, 1e-3 * rtt_ms, lambda k: t_step + 1e-3 * (extra_ms + token_ms * k))


def answers(rate: float, *, num: int = 6, length: int = 128, seed: int = 0) -> list[list[Position]]:
    chance = random.Random(seed)
    return [[Position(chance.random() < rate) for _ in range(length)] for _ in range(num)]


def warm(where: World, texts: Sequence[Answer]) -> SpeedController:
    """A controller that has seen some answers."""
    controller = SpeedController()
    for text in texts:
        run_auto(where, text, controller)
    return controller
