"""What may import what, read from the sources: the packages look downwards only, and the core is pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "shared": {"shared"},
    "protos": {"protos", "shared"},
    "edge_agent": {"edge_agent", "protos", "shared"},
    "cloud_service": {"cloud_service", "protos", "shared"},
}
APART = {
    "shared.settings",
    "shared.logs",
    "shared.pem_files",
    "shared.tracing",
    "shared.terminal",
    "shared.llama",
    "shared.models",
}
"""What in `shared` does I/O."""
PURE = [
    *(path for path in sorted((ROOT / "shared").glob("*.py")) if f"shared.{path.stem}" not in APART),
    ROOT / "cloud_service" / "scheduling.py",
    ROOT / "cloud_service" / "fairness.py",
]
IMPURE = {
    *("grpc", "llama_cpp", "vllm", "huggingface_hub", "yaml", "platformdirs", "typer", "rich", "structlog"),
    *("asyncio", "threading", "subprocess", "socket", "time", "datetime", "random", "secrets", "os", "io"),
    *("pathlib", "tempfile", "shutil", "logging", "protos", *APART),
}


def imported(source: str) -> set[str]:
    """Every module that a source names, inside functions too, and each of its parents."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {
        ".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts) + 1)
    }


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_downwards_only(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        ours = imported(path.read_text(encoding="utf-8")) & {*MAY_IMPORT, "tests"}
        assert ours <= MAY_IMPORT[package], relative(path)


@pytest.mark.parametrize("path", PURE, ids=relative)
def test_the_core_knows_no_wire_no_engine_no_clock_and_no_files(path):
    assert imported(path.read_text(encoding="utf-8")) & IMPURE == set()


def test_nothing_that_stands_apart_has_gone():
    for module in APART:
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("import time", id="import"),
        pytest.param("import os.path as p", id="import of a submodule"),
        pytest.param("from shared import settings", id="import from a package"),
        pytest.param("from shared.llama.context import LlamaContext", id="import from a submodule"),
        pytest.param("def f():\n    import grpc", id="import inside a function"),
    ],
)
def test_an_import_is_seen_in_any_form(source):
    assert imported(source) & IMPURE
