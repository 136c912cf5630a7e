"""The tools that read what lies in deploy/: real ones, installed by `make deploy-tools`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_BESIDE_PYTHON = str(Path(sys.executable).parent)


def tool(name: str) -> str:
    """Path of a tool; the error says how to get it."""
    found = shutil.which(name, path=os.pathsep.join([_BESIDE_PYTHON, os.environ["PATH"], "/usr/sbin"]))
    assert found, f"{name} is missing: run `make deploy-tools`"
    return found


def run(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; what it printed is in the result."""
    command = [tool(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def output(name: str, *arguments: object, **options: object) -> str:
    """What a tool printed; the test fails with its errors where it failed."""
    done = run(name, *arguments, **options)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout
