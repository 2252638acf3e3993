#!/usr/bin/env bash
# Play seeds of the simulation again and tell what happened: bash tools/simulate_seeds.sh [-v] SEED...
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH="tests:.${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m simulation "$@"
