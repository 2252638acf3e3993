#!/usr/bin/env bash
# The vLLM adapter against the real vLLM, in one command: sets up its environment and SmolLM2 where they are missing, then runs tests/vllm.
# Not part of the default suite: the environment is 3.9 GB. Usage: tools/test_vllm.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(bash tools/setup_vllm.sh)"
# The weights are converted with the default environment's transformers, once, into the cache that the default suite uses too.
if [ -z "${KVGUARD_VLLM_MODEL:-}" ]; then
    bash tools/setup.sh test
    KVGUARD_VLLM_MODEL="$(.venv/bin/python -m kvguard.pipeline.smollm2)"
fi
export KVGUARD_VLLM_MODEL PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m pytest -m vllm tests/vllm "$@"
