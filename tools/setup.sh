#!/usr/bin/env bash
# Makes .venv and installs kvguard with an extra ("engine" or "test"). Quick when nothing changed since the last time. Usage: tools/setup.sh EXTRA
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-engine}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvguard needs Python >= 3.11, $python is older. Try: PYTHON=python3.12 $0" >&2; exit 1; }

stamp=".venv/.installed-$extra"
wanted="$(sha256sum pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "Installing kvguard[$extra] into .venv ..." >&2
# torch first and pinned: unpinned, the newest build would bring several GB of CUDA.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
if [ "$extra" = test ]; then # 70 MB; what it is linked to comes with it, what it asks for isn't needed
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "nixl-cu12==1.5.1" ||
        echo "nixl-cu12 can't be had for this Python: the tests of transport = \"nixl\" will skip" >&2
fi
echo "$wanted" > "$stamp"
