"""The GPU check without a GPU: every step is walked with host memory in the GPU's place, and a dry run states no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = "kernels,torch,survival,correctness,bandwidth,restore,salvage,models,decode"  # contracts and daemons are tests of their own


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    values = {**os.environ, "KVGUARD_PYTHON": sys.executable, **environment}
    return subprocess.run([ROOT / "tools" / "gpu_check.sh", *arguments], capture_output=True, text=True, timeout=240, env=values, check=False)


def test_a_dry_run_walks_every_step_and_measures_nothing(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path), "--only", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-rehearsal-host-memory.json").read_text())
    assert report["about"]["dry_run"] and report["seconds"] is None
    assert {name: (step["status"], step.get("measured", {})) for name, step in report["steps"].items()} == {
        name: ("not run" if name == "models" else "pass", {}) for name in QUICK.split(",")
    }
    assert "| survival | pass" in (tmp_path / "gpu-rehearsal-host-memory.md").read_text()


def test_a_step_that_is_not_there_is_told():
    done = run("--dry-run", "--only", "survivall")
    assert done.returncode == 2 and "Try: kernels" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_is_missing_and_fails():
    done = run("--only", "kernels")
    assert done.returncode != 0 and "Try:" in done.stderr


def test_missing_packages_are_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = run("--dry-run", KVGUARD_PYTHON=str(bare), KVGUARD_WHEELS="")
    assert done.returncode == 78 and "msgspec" in done.stderr and "KVGUARD_WHEELS" in done.stderr
