"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.unit.test_architecture import PURE, ROOT

SOURCES = [path for path in (*PURE, ROOT / "edge_agent" / "agent.py") if ">>> " in path.read_text("utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
