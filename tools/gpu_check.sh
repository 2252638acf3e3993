#!/usr/bin/env bash
# What is promised of GPUs, checked and measured on this one, without a network, in under 8 minutes.
#
# tools/gpu_check.sh [--dry-run] [--out FOLDER] [--only STEP,...]
# KVGUARD_PYTHON: the interpreter that has torch and cupy (default: .venv's, else python3). KVGUARD_WHEELS: a folder of wheels from which missing packages are
# installed, beside that interpreter's own and for this run alone. --dry-run walks every step with host memory in the GPU's place; it measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${KVGUARD_PYTHON:-}"
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
missing=$("$python" - "$@" <<'PYTHON'
import importlib.util, sys
wanted = {"msgspec": "msgspec", "xxhash": "xxhash", "zmq": "pyzmq", "msgpack": "msgpack", "psutil": "psutil", "click": "click", "rich": "rich",
          "numpy": "numpy", "prometheus_client": "prometheus-client", "pytest": "pytest", "hypothesis": "hypothesis", "pytest_timeout": "pytest-timeout"}
if "--dry-run" not in sys.argv and importlib.util.find_spec("cupy"):
    wanted["cuda.bindings"] = "cuda-bindings"

def there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False

print(" ".join(package for module, package in wanted.items() if not there(module)))
PYTHON
)
site=""
if [[ -n $missing ]]; then
    if [[ -z ${KVGUARD_WHEELS:-} ]]; then
        echo "gpu_check: $python has no $missing. Try: KVGUARD_WHEELS=FOLDER with their wheels (pip download, where there is a network)" >&2
        exit 78
    fi
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # shellcheck disable=SC2086
    "$python" -m pip install -q --no-index --find-links "$KVGUARD_WHEELS" --target "$site" $missing
fi
PYTHONPATH="$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" "$python" tools/gpu_check.py "$@"
