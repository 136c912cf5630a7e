"""Services that a test kills and starts again on the same port.

Each runs `cloud_service.server.serve` in a process of its own. They are forked from a process that has
imported everything already, so that the next one is there about a tenth of a second after the last one died.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from cloud_service import server
from cloud_service.targets.base import Target
from shared.config import CloudConfig
from shared.logs import configure_logging
from shared.messages import Message, Open
from tests.ports import free_port
from tests.scripted_target import Passes, ScriptedTarget
from tests.service import float32_target

_START_WITHIN_S = 60.0

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["__main__", __name__])


class MortalCloud:
    """A service on a port that stays the same whoever listens on it."""

    def __init__(self, load: Callable[[], Target], **settings: object) -> None:
        """
        Args:
            load: makes the target, in the service's process; must be picklable.
            settings: of `CloudConfig`.
        """
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._load = load
        self._config = CloudConfig.model_validate(
            {"listen": self.address, "log_level": "error", "drain_s": 0.0, **settings}
        )
        self._process: multiprocessing.process.BaseProcess | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def start(self) -> None:
        """Returns once requests are answered."""
        ours, theirs = _processes.Pipe(duplex=False)
        process = _processes.Process(target=_serve, args=(self._config, self._load, theirs), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        assert ours.poll(_START_WITHIN_S), "the service did not start"
        ours.recv()
        ours.close()

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody."""
        os.kill(self.pid, signal.SIGKILL)
        self._end()

    def terminate(self) -> None:
        """SIGTERM: streams are handed back at once."""
        os.kill(self.pid, signal.SIGTERM)
        self._end()

    def freeze(self) -> None:
        """Connections stay open, and nothing answers on them."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def usage(self) -> tuple[int, int]:
        """Resident bytes and open file descriptors."""
        process = psutil.Process(self.pid)
        return process.memory_info().rss, process.num_fds()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.join()
        process.close()


@contextmanager
def mortal_clouds(num: int, load: Callable[[], Target], **settings: object) -> Iterator[list[MortalCloud]]:
    """Replicas that run; the test ends with none."""
    clouds = [MortalCloud(load, **settings) for _ in range(num)]
    try:
        for cloud in clouds:
            cloud.start()
        yield clouds
    finally:
        for cloud in clouds:
            cloud.close()


def tiny_target(model_path: Path, *, step_s: float, slots: int = 8) -> Callable[[], Target]:
    """A tiny model in float32; each of its passes takes `step_s` at least."""
    return partial(_load_tiny, model_path, step_s, slots)


def _load_tiny(model_path: Path, step_s: float, slots: int) -> Target:
    target, _ = float32_target(model_path, step_s=step_s, slots=slots)
    return target


class ForgetfulTarget(ScriptedTarget):
    """Counts up and keeps no record, so that a long run shows the service's memory and not its own."""

    def __init__(self, passes: Passes | None = None) -> None:
        super().__init__(count_up, passes=passes)
        self.scored = _Nothing()

    def answer(self, request: Open) -> list[int]:
        """What it answers, `max_tokens` long."""
        assert request.max_tokens is not None
        text = self.render_chat([part for part in request.prompt if isinstance(part, Message)])
        first = len(text)
        while len(text) < first + request.max_tokens:
            text.append(count_up(text))
        return text[first:]


class _Nothing(list[tuple[int, ...]]):
    def append(self, item: tuple[int, ...]) -> None:
        pass


def count_up(text: object) -> int:
    return 1 + len(text) % 250  # type: ignore[arg-type]


def _serve(config: CloudConfig, load: Callable[[], Target], ready: Connection) -> None:
    configure_logging(config.log_format, config.log_level)
    asyncio.run(server.serve(config, load, on_ready=ready.send))
