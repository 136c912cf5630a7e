"""The page, the dashboard and the code name the same metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from cloud_service.guards import Guards
from cloud_service.metrics import CloudMetrics
from edge_agent.metrics import EdgeMetrics
from edge_agent.remote import Cloud
from shared.config import CloudConfig
from tests.scripted_target import ScriptedTarget

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "observability.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "duet.json"
ADAPTER = ROOT / "deploy" / "kubernetes" / "prometheus-adapter.yaml"


def registries() -> list[CollectorRegistry]:
    cloud = Cloud("127.0.0.1:1", connect_timeout_s=1.0, silence_timeout_s=1.0)
    guards = Guards.of(CloudConfig(), ScriptedTarget(lambda text: 1))
    return [CloudMetrics(guards).registry, EdgeMetrics(cloud).registry]


def table() -> str:
    """As it stands in the page."""
    lines = ["| metric | type | what |", "|---|---|---|"]
    for registry in registries():
        for family in registry.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(lines)


def sample_names() -> set[str]:
    """Everything that a query may ask for."""
    names = set()
    for registry in registries():
        for family in registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    return names


def test_the_page_lists_every_metric():
    assert table() in PAGE.read_text(encoding="utf-8"), "paste what table() gives"


def test_every_metric_of_the_dashboard_exists():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"duet_\w+", query)}
    assert asked <= sample_names()


def test_what_the_autoscalers_adapter_reads_exists():
    asked = set(re.findall(r"duet_cloud_\w+(?=\{)", ADAPTER.read_text(encoding="utf-8")))
    assert asked
    assert asked <= sample_names()


def test_the_dashboard_shows_every_metric():
    text = DASHBOARD.read_text(encoding="utf-8")
    families = {family.name for registry in registries() for family in registry.collect()}
    assert {name for name in families if name not in text} == set()
