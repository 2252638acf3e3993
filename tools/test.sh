#!/usr/bin/env bash
# The tests. Arguments go to pytest; without any, everything that runs in under 30 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh test
exec .venv/bin/python -m pytest "$@"
