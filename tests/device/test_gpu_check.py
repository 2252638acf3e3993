"""The GPU check without a GPU: every step is walked with host memory in the GPU's place, and a dry run states no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = "basics,kernels,correctness,torch,survival,bandwidth,restore,salvage,decode"  # the others run tests, and demos that have tests, of their own
FAKE_STEP = """
import json, os, subprocess, sys, time
name, result = sys.argv[1:3]
waits = [sys.executable, "-c", "import sys, time; time.sleep(600)", os.environ["MARK"]]
found = {"status": "pass", "seconds": 0.1, "measured": {"rate": 7}}
if name == "machine":
    found = {"gpu": "Toy 9", "dry_run": False}
if name == "crashes":
    print("about to end", flush=True)
    os.abort()
if name in ("hangs", "leaves"):
    subprocess.Popen(waits, start_new_session=True)
if name == "hangs":
    time.sleep(600)
open(result, "w").write(json.dumps(found))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    values = {**os.environ, "KVGUARD_PYTHON": sys.executable, **environment}
    return subprocess.run([ROOT / "tools" / "gpu_check.sh", *arguments], capture_output=True, text=True, timeout=240, env=values, check=False)


def test_a_dry_run_walks_every_step_and_measures_nothing(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path), "--only", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-rehearsal-host-memory.json").read_text())
    assert report["about"]["dry_run"] and report["seconds"] is None
    assert {name: (step["status"], step.get("measured", {})) for name, step in report["steps"].items()} == {
        name: ("pass", {}) for name in QUICK.split(",")
    }
    assert "| survival | pass" in (tmp_path / "gpu-rehearsal-host-memory.md").read_text()


def test_a_step_that_hangs_crashes_or_leaves_something_costs_the_others_nothing(tmp_path):
    fake, mark = tmp_path / "step.py", f"kvguard-fake-step-{os.getpid()}"
    fake.write_text(FAKE_STEP)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_check; from pathlib import Path; gpu_check.STEP = Path({str(fake)!r}); "
        "gpu_check.LIMITS_S = {'crashes': 60, 'hangs': 1, 'leaves': 60, 'good': 60}; "
        f"sys.argv = ['gpu_check', '--out', {str(tmp_path)!r}]; sys.exit(gpu_check.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env={**os.environ, "MARK": mark}, check=False)
    assert done.returncode == 1 and "1 of 4 steps passed" in done.stdout, done.stdout + done.stderr
    steps = json.loads((tmp_path / "gpu-toy-9.json").read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"crashes": "fail", "hangs": "fail", "leaves": "fail", "good": "pass"}
    assert "ended with -6" in steps["crashes"]["reason"] and "about to end" in steps["crashes"]["reason"]
    assert "longer than 1 s" in steps["hangs"]["reason"] and "left 1 processes" in steps["leaves"]["reason"]
    alive = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(path)]
    assert alive == []


def test_packages_from_a_folder_reach_every_process_that_the_steps_start():
    """They come by PYTHONPATH (KVGUARD_WHEELS): who starts a process of its own adds to it, and never replaces it."""
    run_there = [*(ROOT / "tests" / "device").glob("*.py"), *(ROOT / "tests" / "e2e").glob("*.py"), ROOT / "tests" / "adapters" / "test_transformers_resume.py"]
    replacing = '"PYTHONPATH": ' + "str(ROOT)}"
    assert len(run_there) > 20 and [path.name for path in run_there if replacing in path.read_text()] == []


def test_of_the_basics_all_that_fail_are_told_and_the_others_are_tried():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]; import gpu_basics; from gpu_steps import Bench, NotRun\n"
        "def fails(bench): raise RuntimeError('no such call')\n"
        "def lacks(bench): raise NotRun('no torch')\n"
        "gpu_basics.CHECKS = {'one': fails, 'two': lambda bench: None, 'three': lacks, 'four': fails, 'five': gpu_basics.copies}\n"
        "try: gpu_basics.basics(Bench(True))\n"
        "except AssertionError as error: print('told:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    told = done.stdout.partition("told: ")[2]
    assert told.startswith("2 of 5") and "'one': 'FAILED: RuntimeError: no such call'" in told and "'four'" in told
    assert "two: ok" in done.stdout and "three: missing: no torch" in done.stdout and "five: ok" in done.stdout


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has just ended


def test_a_step_that_is_not_there_is_told():
    done = run("--dry-run", "--only", "survivall")
    assert done.returncode == 2 and "Try: basics" in done.stderr


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
