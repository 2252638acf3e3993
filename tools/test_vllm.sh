#!/usr/bin/env bash
# The vLLM adapter against the real vLLM, in one command: sets up its environment and SmolLM2 where they are missing, then runs tests/vllm.
# Not part of the default suite: the environment is 3.9 GB. Usage: [KVGUARD_VLLM=0.33] tools/test_vllm.sh [pytest arguments]
# KVGUARD_VLLM=0.33: with 0.33's own Python over 0.32's kernels (tools/setup_vllm_next.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
# First what is quick to fail (a Python that is too old). The weights are converted with the default environment's transformers, once, into the cache that
# the default suite uses too.
if [ -z "${KVGUARD_VLLM_MODEL:-}" ]; then
    bash tools/setup.sh test
    KVGUARD_VLLM_MODEL="$(.venv/bin/python -m kvguard.pipeline.smollm2)"
fi
case "${KVGUARD_VLLM:-0.32}" in
    0.32) python="$(bash tools/setup_vllm.sh)" ;;
    0.33) python="$(bash tools/setup_vllm_next.sh)" ;;
    *) echo "vLLM $KVGUARD_VLLM has no environment here. Try: KVGUARD_VLLM=0.32 or 0.33" >&2; exit 2 ;;
esac
export KVGUARD_VLLM_MODEL PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m pytest -m vllm tests/vllm "$@"
