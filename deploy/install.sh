#!/usr/bin/env bash
# Install duet as a systemd service: a cloud (GPU or CPU) or an edge (laptop, Jetson).
#   sudo deploy/install.sh --role cloud --engine vllm
#   sudo deploy/install.sh --role edge --dry-run
# Run from a checkout. A second run upgrades; settings that are there are kept.
set -euo pipefail

role="" engine="" dry_run="" start=yes
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_dir=$(dirname "$here")

usage() {
  cat <<'TEXT'
usage: install.sh --role cloud|edge [--engine llama-cpp|vllm] [--dry-run] [--no-start]
  --role      cloud: duet-cloud serve; edge: duet serve
  --engine    of a cloud; vllm needs an NVIDIA GPU (default: vllm where nvidia-smi answers, else llama-cpp)
  --dry-run   print what would be done
  --no-start  install and enable, but do not start
TEXT
}

fail() {
  printf 'install.sh: %s\n' "$1" >&2
  exit "${2:-1}"
}

value() {
  case ${2:---} in
    --*) fail "$1 needs a value; see --help" 2 ;;
    *) printf '%s' "$2" ;;
  esac
}

while [ $# -gt 0 ]; do
  case $1 in
    --role) role=$(value "$@"); shift ;;
    --engine) engine=$(value "$@"); shift ;;
    --dry-run) dry_run=yes ;;
    --no-start) start="" ;;
    --help | -h) usage; exit 0 ;;
    *) fail "unknown option $1; see --help" 2 ;;
  esac
  shift
done

case $role in
  cloud | edge) ;;
  "") fail "say what to install: --role cloud or --role edge" 2 ;;
  *) fail "unknown role $role: cloud or edge" 2 ;;
esac
if [ "$role" = cloud ] && [ -z "$engine" ]; then
  if nvidia-smi >/dev/null 2>&1; then engine=vllm; else engine=llama-cpp; fi
fi
case $role/$engine in
  edge/ | cloud/vllm | cloud/llama-cpp) ;;
  edge/*) fail "--engine is for a cloud; an edge runs llama.cpp" 2 ;;
  *) fail "unknown engine $engine: llama-cpp or vllm" 2 ;;
esac
[ -n "$dry_run" ] || [ "$(id -u)" = 0 ] || fail "needs root: run it with sudo, or look first with --dry-run"

# What is printed is what runs.
run() {
  printf '+ %s\n' "$*"
  [ -n "$dry_run" ] || "$@"
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null ||
  fail "$python is not Python 3.10 to 3.13; name one with PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv; on Debian and Ubuntu: apt-get install python3-venv"

case $role/$engine in
  cloud/vllm) extra=vllm ;;
  cloud/*) extra=cloud ;;
  edge/*) extra=edge ;;
esac
if [ "$extra" != vllm ]; then
  for tool in cc c++; do
    command -v "$tool" >/dev/null || fail "llama.cpp is compiled here and needs a C++ compiler; on Debian and Ubuntu: apt-get install build-essential"
  done
  # AMX kernels fault in llama-cpp-python 0.3.36.
  if [ -z "${CMAKE_ARGS:-}" ] && grep -qw amx_tile /proc/cpuinfo; then
    export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'"
  elif [ -z "${CMAKE_ARGS:-}" ] && [ -e /etc/nv_tegra_release ]; then
    export CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=87 -DLLAVA_BUILD=OFF"
  fi
  [ -z "${CMAKE_ARGS:-}" ] || printf '# CMAKE_ARGS=%s\n' "$CMAKE_ARGS"
fi

unit=duet-$role.service
settings=/etc/duet/$([ "$role" = cloud ] && echo duet-cloud.yaml || echo duet.yaml)

if ! getent passwd duet >/dev/null; then
  run useradd --system --user-group --home-dir /var/lib/duet --shell /usr/sbin/nologin duet
fi
run "$python" -m venv "/opt/duet"
run "/opt/duet/bin/python" -m pip install --quiet --upgrade pip
run "/opt/duet/bin/python" -m pip install --quiet "${source_dir}[$extra]"
run install -d -m 0755 "/etc/duet"
if [ -e "$settings" ]; then
  printf '# %s is kept\n' "$settings"
else
  run install -m 0644 "$here/$(basename "$settings" .yaml)${engine:+-$engine}.yaml" "$settings"
fi
run install -D -m 0644 "$here/systemd/$unit" "/etc/systemd/system/$unit"
run systemctl enable "$unit"
if [ -d /run/systemd/system ]; then  # not in a chroot or an image
  run systemctl daemon-reload
  [ -z "$start" ] || run systemctl restart "$unit"
fi
printf '# done: settings are in %s; watch it with: journalctl -fu %s\n' "$settings" "$unit"
