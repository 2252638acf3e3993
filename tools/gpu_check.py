"""Every step of the GPU check in turn, each within its time, and a report that says what passed, what failed and what was measured.

Knows: the steps' names and order, the report's form. Must not know: how a step is done (gpu_steps.py, gpu_decode.py).
Invariants: a step that fails, or that can't be run, never keeps the others from running; a dry run states no number; a report names the GPU, the driver, the
packages and the commit; exit code 0 only where no step failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_decode import decode_overhead
from gpu_steps import STEPS, Bench, NotRun

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what kvguard promises of GPUs on this one.")
    parser.add_argument("--dry-run", action="store_true", help="walk every step with host memory in the GPU's place; measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the report (docs/measurements; of a dry run: none)")
    parser.add_argument("--only", default="", help="steps to run, by name, joined by commas")
    arguments = parser.parse_args()
    steps: dict[str, Callable[[Bench], dict]] = {**STEPS, "decode": decode_overhead}
    only = set(filter(None, arguments.only.split(",")))
    if only - set(steps):
        parser.error(f"no step is called {', '.join(sorted(only - set(steps)))}. Try: {', '.join(steps)}")
    began, results = time.monotonic(), {}
    bench = Bench(dry=arguments.dry_run)
    for name, step in steps.items():
        if only and name not in only:
            continue
        if time.monotonic() - began > LIMIT_S:
            results[name] = {"status": "not run", "reason": f"{LIMIT_S} s were over"}
        else:
            results[name] = carried_out(step, bench)
        print(f"{name:12} {results[name]['status']:8} {results[name].get('reason', '')}", flush=True)
    report = {"about": about(bench), "seconds": None if bench.dry else round(time.monotonic() - began, 1), "steps": results}
    out = arguments.out or (None if bench.dry else ROOT / "docs" / "measurements")
    if out is not None:
        written(report, out)
    failed = [name for name, result in results.items() if result["status"] == "fail"]
    print(f"{'dry run, nothing measured: ' if bench.dry else ''}{len(results) - len(failed)} of {len(results)} steps without a failure")
    return 1 if failed else 0


def carried_out(step: Callable[[Bench], dict], bench: Bench) -> dict:
    """`step`'s result. Measured values are left out of a dry run: host memory says nothing about a GPU."""
    began = time.monotonic()
    try:
        measured = step(bench)
    except NotRun as reason:
        return {"status": "not run", "reason": str(reason)}
    except Exception as error:  # the report says it, and the next step runs
        traceback.print_exc()
        return {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:2000]}
    return {"status": "pass", "seconds": None if bench.dry else round(time.monotonic() - began, 1), "measured": {} if bench.dry else measured}


def about(bench: Bench) -> dict:
    names = ("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x", "cuda-bindings", "transformers")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": bench.name, "uuid": bench.uuid, "dry_run": bench.dry, "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit or "unknown",
        "python": platform.python_version(), "kernel": platform.release(), "packages": {name: version for name in names if (version := version_of(name))},
        "nvidia_smi": asked(["nvidia-smi", "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current", "--format=csv,noheader"]),
    }  # fmt: skip


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def asked(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def written(report: dict, out: Path) -> None:
    """GPU.json and GPU.md."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", report["about"]["gpu"].lower()).strip("-")
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    rows = ["| step | result | measured |", "|---|---|---|"]
    for step, result in report["steps"].items():
        values = "; ".join(f"{key} {value}" for key, value in result.get("measured", {}).items())
        rows.append(f"| {step} | {result['status']} {result.get('reason', '')} | {values} |".replace("\n", " "))
    facts = "; ".join(f"{key} {value}" for key, value in report["about"].items())
    (out / f"{name}.md").write_text(f"# {report['about']['gpu']}\n\n{facts}\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    sys.exit(main())
