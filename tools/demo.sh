#!/usr/bin/env bash
# One command from a fresh checkout to a node killed in mid-sentence and the same sentence finished. Arguments go to `kvguard demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh engine
exec .venv/bin/kvguard demo "$@"
