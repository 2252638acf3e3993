#!/usr/bin/env bash
# Every drill with several seeds against the bundled reference engine; one JUnit file. Usage: tools/drills.sh [SEEDS] [MODEL_DIR]
# Without a model directory the default model. Exit code 1 where one failed. Reports stay in KVGUARD_DRILL_DIR, a new directory by default.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="${1:-5}"
tools/setup.sh test
out="${KVGUARD_DRILL_DIR:-$(mktemp -d)}"
mkdir -p "$out"
echo "reports go to $out" >&2
.venv/bin/kvguard drill run all --repeat "$seeds" --reports "$out" ${2:+--model "$2"} -o junit > "$out/drills.xml"
