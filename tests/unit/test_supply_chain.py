"""What the sources may not do: run what they load. Read from the sources themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shared", "protos", "edge_agent", "cloud_service", "benchmarks", "examples", "tests")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
THAT_RUN_WHAT_THEY_LOAD = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
}


def unsafe(source: str) -> Iterator[str]:
    """Uses of pickle, whatever it is called, and of loaders that use it unless told otherwise."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in THAT_RUN_WHAT_THEY_LOAD)
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in THAT_RUN_WHAT_THEY_LOAD
        ):
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _unsafe_call(node)


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if said.get("allow_pickle", "False") != "False":
        yield f"{name}(allow_pickle=...)"
    if name in ("torch.load",) and said.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("pd.read_pickle", "pandas.read_pickle"):
        yield name
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
        yield name
    if said.get("trust_remote_code") == "True":
        yield f"{name}(trust_remote_code=True)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_loaded_is_run(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as cp",
        "import joblib.numpy_pickle",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "yaml.load(text, Loader=L)",
        "AutoModel.from_pretrained(m, trust_remote_code=True)",
    ],
)
def test_what_would_run_it_is_seen(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize("source", ["np.load(f)", "np.load(f, allow_pickle=False)", "yaml.safe_load(text)"])
def test_what_does_not_is_left_alone(source: str) -> None:
    assert list(unsafe(source)) == []
