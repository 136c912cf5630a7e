#!/usr/bin/env bash
# Make sure that the tests of the web page find a browser: Chromium or Chrome, whichever is there, else Debian's.
set -euo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" > /dev/null; then exit 0; fi
done
if [ -x "${CHROMIUM:-}" ]; then exit 0; fi
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
if command -v apt-get > /dev/null \
    && "${as_root[@]}" apt-get update -qq \
    && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium > /dev/null; then
    exit 0
fi
echo "The tests of the web page need Chromium or Chrome, and it could not be installed from here." >&2
echo "Install it (Debian: apt-get install chromium), or set CHROMIUM to the browser's path." >&2
exit 1
