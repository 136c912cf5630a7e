"""What stands between a call and the target: who calls, how much it may have, and what is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloud_service.admission import AdmissionQueue
from cloud_service.pressure import MemoryGuard
from cloud_service.quotas import Quotas, UsageFile
from cloud_service.security import Caller, Gatekeeper
from cloud_service.targets.base import Target
from cloud_service.waiting import Order
from shared.config import CloudConfig


@dataclass(frozen=True, slots=True)
class Guards:
    gatekeeper: Gatekeeper
    quotas: Quotas
    places: AdmissionQueue
    memory: MemoryGuard

    @classmethod
    def of(cls, config: CloudConfig, target: Target) -> Guards:
        """Raises InvalidSetting where the file of tokens or of usage cannot be used."""
        return cls(
            gatekeeper=Gatekeeper(config.limits, None if config.tokens is None else Path(config.tokens)),
            quotas=Quotas(None if config.usage is None else UsageFile(Path(config.usage))),
            places=AdmissionQueue(
                target.max_streams,
                max_waiting=config.max_waiting_streams,
                max_wait_s=config.max_wait_s,
                order=Order(config.admission),
            ),
            memory=MemoryGuard(config.min_free_mb * 2**20),
        )

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Count a stream of the caller while it runs.

        Raises:
            CloudOverloaded: memory is short.
            QuotaExceeded: the caller has all that it may have.
        """
        self.memory.check()
        with self.quotas.stream(caller.accounts):
            yield
