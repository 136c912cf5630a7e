"""Ask the advisory service about the locked versions, with pip-audit; says what was checked and what was not.

Where the service cannot be reached, or does not know a package, nothing is known of it, and that is no
failure of the build. A known vulnerability is one.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    """Exit code: 1 where a vulnerability is known, else 0."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", sys.argv[1], "--format", "json"),
            *("--no-deps", "--disable-pip", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"nothing was checked: the advisory service cannot be asked from here ({reason})")
        return 0
    skipped = [package for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        known = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
        print(f"{package['name']} {package['version']}: {known}")
    print(
        f"{len(packages) - len(skipped)} of {len(packages)} locked packages checked,"
        f" {len(vulnerable)} with a known vulnerability; of {len(skipped)} nothing is known here"
    )
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
