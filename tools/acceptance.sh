#!/usr/bin/env bash
# What takes longer than the tests: every kill x stages x point of the demo, a hundred seeded kills of the real model, every drill with five seeds,
# more seeds of the simulation.
# Usage: tools/acceptance.sh [KILLS]   (default 100; an hour and more on two cores)
set -euo pipefail
cd "$(dirname "$0")/.."
kills="${1:-100}"
tools/setup.sh test
python=.venv/bin/python
out="${KVGUARD_ACCEPTANCE_DIR:-$(mktemp -d)}"
echo "documents go to $out" >&2

for stages in 2 3 4; do
  for kill in node rank daemon coordinator driver; do
    for at in 0 1 20; do
      # An outage of kvguard itself needs time to end while tokens come.
      tokens=40; case "$kill" in daemon | coordinator) tokens=160 ;; esac
      echo "demo --stages $stages --kill $kill --at-token $at" >&2
      .venv/bin/kvguard demo --stages "$stages" --kill "$kill" --at-token "$at" --max-tokens "$tokens" --sequences 2 -o json > "$out/demo-$stages-$kill-$at.json"
    done
  done
done
echo "demo --corrupt replica must exit 1, --corrupt frame 0" >&2
if .venv/bin/kvguard demo --kill node --corrupt replica --max-tokens 40 -o json > "$out/corrupt-replica.json"; then
  echo "the negative control was not told" >&2
  exit 1
fi
.venv/bin/kvguard demo --kill none --corrupt frame --max-tokens 40 -o json > "$out/corrupt-frame.json"
$python tools/acceptance.py --kills "$kills" -o "$out/kills.json"
KVGUARD_DRILL_DIR="$out/drills" tools/drills.sh 5
KVGUARD_SIMULATION_FRESH="${KVGUARD_SIMULATION_FRESH:-200}" $python -m pytest tests/simulation
