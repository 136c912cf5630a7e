"""What TLS and tokens add to a verification round, and to the opening of a stream."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import quantile, save, summarise
from benchmarks.round_overhead import rounds
from benchmarks.services import scripted_cloud
from cloud_service.certificates import make_authority, make_server
from cloud_service.security import new_token
from cloud_service.tenants import opened
from edge_agent.access import Access
from edge_agent.remote import Cloud, Meter
from shared.config import EdgeConfig
from shared.limits import Limits
from shared.messages import Message, Open
from shared.sampling import Sampling

PROMPT_TOKENS = 200


async def opening_s(address: str, access: Access) -> float:
    """Seconds from nothing to an opened stream: connection, handshake, token, Open, Opened."""
    request = Open(prompt=(Message("user", "x" * PROMPT_TOKENS),), sampling=Sampling(), seed=1, max_tokens=8)
    began = time.perf_counter()
    async with (
        Cloud(address, connect_timeout_s=5, silence_timeout_s=30, access=access) as cloud,
        cloud.speculate(request, Meter()),
    ):
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30, help="pairs of runs")
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        authority, server = make_authority(folder), make_server(folder, ["127.0.0.1"])
        token, stored = new_token("bench", limits=Limits(tokens_per_minute=10**9), now_s=0.0, expires_s=None)
        with opened(folder / "tokens.db") as store:
            store.add_token(stored)
        secured: dict[str, Any] = {
            "tls_cert": str(server.cert),
            "tls_key": str(server.key),
            "tokens": str(folder / "tokens.db"),
            "usage": str(folder / "usage.db"),
        }
        plain_address, _ = stack.enter_context(scripted_cloud())
        secure_address, _ = stack.enter_context(scripted_cloud(**secured))
        secure = Access.of(EdgeConfig.model_validate({"tls_ca": str(authority.cert), "token": token}))
        runner = asyncio.new_event_loop()  # one for all: gRPC does not like to change loops
        stack.callback(runner.close)
        plain_ms, secure_ms, ratios = [], [], []
        opening: dict[str, list[float]] = {"plain": [], "secure": []}
        for turn in range(arguments.turns + 1):
            sides = [(plain_address, Access(), plain_ms), (secure_address, secure, secure_ms)]
            for address, access, medians in sides if turn % 2 else reversed(sides):
                times = runner.run_until_complete(
                    rounds(address, arguments.rounds, Sampling(), PROMPT_TOKENS, access)
                )
                medians.append(1e3 * quantile(times, 0.5))
                opening["plain" if access.credentials is None else "secure"].append(
                    1e3 * runner.run_until_complete(opening_s(address, access))
                )
            ratios.append(secure_ms[-1] / plain_ms[-1])
    rows = [
        [what, summarise(a[1:]).show(), summarise(b[1:]).show(), ratio.show("{:.3f}")]
        for what, a, b, ratio in (
            ("a round, p50", plain_ms, secure_ms, summarise(ratios[1:])),
            (
                "opening a stream on a new connection",
                opening["plain"],
                opening["secure"],
                summarise([b / a for a, b in zip(opening["plain"], opening["secure"], strict=True)][1:]),
            ),
        )
    ]
    save(
        "security_overhead",
        command="python -m benchmarks.security_overhead"
        f" --turns {arguments.turns} --rounds {arguments.rounds}",
        title="What TLS and tokens add to a round",
        notes=f"Loopback, scripted target, {PROMPT_TOKENS} prompt tokens, 4 draft tokens a round, stop and"
        f" wait; two services in processes of their own, {arguments.turns} pairs of runs in turn, each of"
        f" {arguments.rounds} rounds. Secure: TLS 1.3, a token, and tokens a minute counted. Ratio pair by"
        " pair. Aim: <= 1.05 for a round.",
        columns=["what", "plain, ms", "TLS and token, ms", "ratio"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
