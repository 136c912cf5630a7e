"""Reads what a service or an edge counts for Prometheus."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


def samples(exposition: str) -> dict[tuple[str, ...], float]:
    """Values by name and label values, labels in the order of their names."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


async def scraped(address: str) -> dict[tuple[str, ...], float]:
    """What stands at HOST:PORT/metrics."""
    async with httpx.AsyncClient() as client:
        return samples((await client.get(f"http://{address}/metrics")).text)


def total(counted: dict[tuple[str, ...], float], name: str, *labels: str) -> float:
    """The sum over all label values, or over those that hold all of some."""
    return sum(value for key, value in counted.items() if key[0] == name and set(labels) <= set(key[1:]))
