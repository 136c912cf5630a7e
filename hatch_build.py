"""Makes the protobuf stubs beside their schema when the package is built, in a checkout too.

Not hatch-protobuf: with stubs imported as `protos.duet.v1`, it compiles every schema below the root, and a
virtual environment in the checkout holds some that do not compile.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


class ProtobufStubs(BuildHookInterface):  # type: ignore[type-arg, misc, unused-ignore]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        schemas = [path.relative_to(root).as_posix() for path in sorted(root.glob("protos/**/*.proto"))]
        outputs = ("--python_out=.", "--pyi_out=.", "--grpc_python_out=.")
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", *outputs, *schemas],
            cwd=root,
            check=True,
        )
        build_data["artifacts"] += [
            schema.removesuffix(".proto") + stub for schema in schemas for stub in STUBS
        ]
