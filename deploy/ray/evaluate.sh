#!/usr/bin/env bash
# One evaluation run over the Ray cluster whose head this is; arguments are those of `duet eval routing`.
set -euo pipefail
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
exec "${DUET:-$HOME/duet-venv/bin/duet}" eval routing --ray "$@"
