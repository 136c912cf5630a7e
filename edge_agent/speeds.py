"""What was measured of a pair and its link: kept between requests, and in a small file between processes.

One file for each edge model, address, set of drafters and policy, in the user's cache folder. It holds
numbers and the target's name, nothing of any prompt or answer. Where it cannot be read or written, speeds
are measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.config import EdgeConfig
from shared.controller import NOTHING_LEARNED, Choices, Chosen, SpeedController, SpeedState
from shared.events import SpeedReport


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")

    cloud_model: str | None = None
    state: SpeedState = NOTHING_LEARNED


class Speeds:
    """Hands out the controller to one answer at a time."""

    def __init__(self, file: Path | None = None) -> None:
        """
        Args:
            file: to begin from and to keep up to date; None keeps nothing between processes.
        """
        self._file = file
        saved = self._read()
        self._cloud_model = saved.cloud_model
        self._controller = SpeedController(saved.state)
        self._taken = False

    @contextmanager
    def answer(self, choices: Choices, predicted_tokens: int | None = None) -> Iterator[SpeedController]:
        """A controller for one answer. One beside another plans by a copy, and what it sees is forgotten:
        two at once are each slower than one alone.
        """
        alone = not self._taken
        controller = self._controller if alone else SpeedController(self._controller.state())
        controller.begin_stream(predicted_tokens, choices)
        self._taken = True
        try:
            yield controller
        finally:
            if alone:
                self._taken = False
                controller.end_stream()
                self._save()

    def meet(self, cloud_model: str) -> None:
        """The target's name is known: what was measured of another one is worth nothing."""
        if self._cloud_model not in (None, cloud_model):
            self._controller.forget()
        self._cloud_model = cloud_model

    def report(self, ways: Sequence[Chosen]) -> SpeedReport:
        """Of an answer that was made in these ways."""
        return SpeedReport(tuple(ways), self._controller.measured(), tuple(self._controller.explain()))

    def _read(self) -> _Saved:
        if self._file is not None:
            with suppress(OSError, ValidationError):
                return _Saved.model_validate_json(self._file.read_bytes())
        return _Saved()

    def _save(self) -> None:
        if self._file is None:
            return
        saved = _Saved(cloud_model=self._cloud_model, state=self._controller.state())
        beside = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(saved.model_dump_json(), encoding="utf-8")
            beside.replace(self._file)


def speeds_file(config: EdgeConfig) -> Path:
    """Where the speeds of these settings are kept."""
    measured = [config.model, config.cloud, sorted(config.drafters), config.policy.value]
    digest = hashlib.sha256(json.dumps(measured).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("duet") / "speeds" / f"{digest}.json"
