"""Memory of each side beside model and KV cache, and the time from `duet ask` to its first local token."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.harness import save, summarise
from benchmarks.services import duet_cloud
from edge_agent.edge_model import EdgeModel
from edge_agent.remote import Cloud, Meter
from shared.config import DEFAULT_DRAFT, DEFAULT_TARGET, CloudConfig, EdgeConfig
from shared.messages import Message, Open
from shared.models import Registry, resolve
from shared.sampling import Sampling

KV_BYTES_PER_TOKEN = {DEFAULT_DRAFT: 24 * 2 * 128 * 2, DEFAULT_TARGET: 28 * 2 * 256 * 2}
"""Layers x (key, value) x width of the KV heads x f16: Qwen2.5 0.5B and 1.5B."""


EDGE_SIDE = "import asyncio, benchmarks.footprint as f; print(asyncio.run(f.edge_memory()))"
"""The edge is measured in a process of its own: this one holds other things too."""


def beside_model_mb(process: psutil.Process, model: str, context_tokens: int) -> float:
    """Resident memory without the model's size and the KV cache, in MB."""
    model_bytes = resolve(model, Registry.load()).path.stat().st_size
    kv_bytes = KV_BYTES_PER_TOKEN[model] * context_tokens
    return (process.memory_info().rss - model_bytes - kv_bytes) / 1e6


async def cloud_memory(address: str, pid: int, context_tokens: int) -> float:
    async with Cloud(address, connect_timeout_s=5, silence_timeout_s=120) as cloud:
        request = Open(prompt=(Message("user", "river " * 300),), sampling=Sampling(), seed=1, max_tokens=8)
        async for _ in cloud.generate(request, Meter()):
            pass
    return beside_model_mb(psutil.Process(pid), DEFAULT_TARGET, context_tokens)


async def edge_memory() -> float:
    config = EdgeConfig(mode="speculate")
    resolved = resolve(DEFAULT_DRAFT, Registry.load())
    edge = await EdgeModel.load(resolved.path, resolved.name, config)
    edge.model.vocabulary.sha256  # noqa: B018  (what speculation computes)
    prompt = edge.model.render_chat([Message("user", "river " * 300)])
    await edge.run(lambda: edge.context.extend(0, prompt, 1))
    used = beside_model_mb(psutil.Process(), DEFAULT_DRAFT, config.context_tokens)
    await edge.close()
    return used


def first_token_s() -> dict[str, float]:
    """Seconds of a fresh `duet ask --mode local --max-tokens 1`, whole and by stage."""
    script = (
        "import time; t=[time.perf_counter()]\n"
        "import edge_agent.opening, edge_agent.agent, edge_agent.edge_model, edge_agent.remote\n"
        "t.append(time.perf_counter())\n"
        "import asyncio\n"
        "from shared.config import EdgeConfig\n"
        "from shared.models import Registry, resolve\n"
        "from shared.events import Text\n"
        "config = EdgeConfig(mode='local', max_tokens=1)\n"
        "async def main():\n"
        "    async with edge_agent.opening.open_agent(config) as agent:\n"
        "        t.append(time.perf_counter())\n"
        "        async for event in agent.ask('Name a river.'):\n"
        "            if isinstance(event, Text): t.append(time.perf_counter()); break\n"
        "asyncio.run(main())\n"
        "print(*(b - a for a, b in zip(t, t[1:])))\n"
    )
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - began
    imports, load, answer = map(float, result.stdout.split()[-3:])
    return {"whole": whole, "imports": imports, "model load": load, "prompt and token": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = CloudConfig()
    with duet_cloud() as (address, pid):
        cloud_mb = asyncio.run(cloud_memory(address, pid, config.slots * config.context_tokens))
    edge_mb = float(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import asyncio, benchmarks.footprint as f; print(asyncio.run(f.edge_memory()))",
            ],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout
    )
    save(
        "memory",
        command="python -m benchmarks.footprint",
        title="Memory beside model and KV cache",
        notes="Resident memory after a prompt of about 300 tokens, less the model file's size and the KV"
        f" cache. Cloud: {config.slots} slots x {config.context_tokens} tokens. Aim: <= 300 MB.",
        columns=["side", "model", "MB"],
        rows=[
            ["duet-cloud serve", DEFAULT_TARGET, f"{cloud_mb:.0f}"],
            ["edge", DEFAULT_DRAFT, f"{edge_mb:.0f}"],
        ],
    )
    first_token_s()
    runs = [first_token_s() for _ in range(arguments.repeats)]
    save(
        "first_token",
        command="python -m benchmarks.footprint",
        title="Start of `duet ask --mode local` to its first token",
        notes=f"{DEFAULT_DRAFT}, model in the page cache, a fresh process each time,"
        f" {arguments.repeats} runs.",
        columns=["stage", "seconds"],
        rows=[[stage, summarise([run[stage] for run in runs]).show()] for stage in runs[0]],
    )


if __name__ == "__main__":
    main()
