"""The edge: routes a prompt, drafts or answers with a small model, talks to the cloud.

The Python API: `Agent` for asyncio, `SyncAgent` without, and the events that they yield (docs/python.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.agent import Agent
    from edge_agent.blocking import SyncAgent
    from shared.events import Answer, Notice, Provisional, Round, Routed, Text, Token, Waiting
    from shared.messages import Message
    from shared.shaping import Shaping

_HOMES = {
    "Agent": "edge_agent.agent",
    "SyncAgent": "edge_agent.blocking",
    "Message": "shared.messages",
    "Shaping": "shared.shaping",
} | dict.fromkeys(
    ("Answer", "Notice", "Provisional", "Round", "Routed", "Text", "Token", "Waiting"), "shared.events"
)
__all__ = [
    "Agent", "Answer", "Message", "Notice", "Provisional", "Round", "Routed", "Shaping", "SyncAgent", "Text",
    "Token", "Waiting",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: `import edge_agent` alone loads neither llama.cpp nor gRPC."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
