"""The GPU check without a GPU: every step is walked with host memory in the GPU's place, and a dry run states no number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    mark = f"kvguard-fake-step-{os.getpid()}"
    command = faked(tmp_path, "STEPS_S = {'crashes': (1, 60), 'hangs': (1, 1), 'leaves': (1, 60), 'good': (1, 60)}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "MARK": mark}, check=False)
    assert done.returncode == 1 and "1 of 4 steps passed" in done.stdout, done.stdout + done.stderr
    steps = json.loads((tmp_path / "gpu-toy-9.json").read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"crashes": "fail", "hangs": "fail", "leaves": "fail", "good": "pass"}
    assert "ended with -6" in steps["crashes"]["reason"] and "about to end" in steps["crashes"]["reason"]
    assert "longer than 1 s" in steps["hangs"]["reason"] and "left 1 processes" in steps["leaves"]["reason"]
    assert alive_with(mark) == []


def test_a_step_that_hangs_takes_none_of_the_time_that_is_kept_for_those_behind_it(tmp_path):
    mark = f"kvguard-kept-step-{os.getpid()}"
    command = faked(tmp_path, "LIMIT_S = 104", "STEPS_S = {'hangs': (2, 300), 'good': (100, 300)}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "MARK": mark}, check=False)
    assert "1 of 2 steps passed; not: hangs" in done.stdout, done.stdout + done.stderr
    assert alive_with(mark) == []


def test_what_is_kept_for_all_steps_fits_into_the_whole():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_check as it, gpu_step; assert set(it.STEPS_S) == set(gpu_step.ALL); "
        "print(it.LIMIT_S - it.ABOUT_S - sum(kept for kept, _ in it.STEPS_S.values()), [most - kept for kept, most in it.STEPS_S.values()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True, cwd=ROOT, env=with_root())
    assert "-" not in done.stdout  # neither is anything negative


def test_a_check_that_is_ended_leaves_a_report_that_names_what_has_not_run_and_no_process(tmp_path):
    mark = f"kvguard-ended-step-{os.getpid()}"
    command = [*faked(tmp_path, "STEPS_S = {'good': (1, 60), 'hangs': (1, 600), 'leaves': (1, 60), 'crashes': (1, 60)}"), "--only", "good,hangs,leaves"]
    check = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "MARK": mark})
    try:
        deadline = time.monotonic() + 100
        while not alive_with(mark):
            assert time.monotonic() < deadline and check.poll() is None
            time.sleep(0.05)  # between two looks
        check.terminate()
        assert check.wait(60) == 128 + signal.SIGTERM
    finally:
        check.kill()
        check.wait(10)
    report = json.loads((tmp_path / "gpu-toy-9.json").read_text())
    assert report["steps"]["good"]["status"] == "pass" and report["not_asked_for"] == ["crashes"]
    assert {name: report["steps"][name] for name in ("hangs", "leaves")} == {
        "hangs": {"status": "not run", "reason": "the check was ended while it ran"}, "leaves": {"status": "not run", "reason": "the check ended before"},
    }  # fmt: skip
    assert "| leaves | not run the check ended before |" in (tmp_path / "gpu-toy-9.md").read_text() and alive_with(mark) == []


def faked(folder: Path, *changes: str) -> list[str]:
    """A check whose steps are FAKE_STEP's, with `changes` of its own values."""
    fake = folder / "step.py"
    fake.write_text(FAKE_STEP)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_check; from pathlib import Path; gpu_check.STEP = Path({str(fake)!r}); "
        + "".join(f"gpu_check.{change}; " for change in changes)
        + "sys.argv[0] = 'gpu_check'; sys.exit(gpu_check.main())"
    )
    return [sys.executable, "-c", code, "--out", str(folder)]


def alive_with(mark: str) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(path)]


def with_root() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


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


def test_a_demo_that_does_not_end_is_told_with_what_its_processes_said(tmp_path):
    """And the other one is tried, and transformers: what is known of them is in the step's words."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]; import gpu_models, types; from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r}); logs = folder / 'kvguard-demo.1' / 'logs'\n"
        "logs.mkdir(parents=True); (logs / 'node.log').write_text('waits for a GPU')\n"
        "gpu_models.DEMO_S, gpu_models.needed = 0.01, lambda package: None\n"
        "gpu_models.model_of = lambda bench, made: (made, 'none')\n"
        "demonstrated = gpu_models.demonstrated\n"
        "gpu_models.demonstrated = lambda bench, model, kill, rung, made: demonstrated(bench, model, kill, rung, folder)\n"
        "gpu_models.tested = lambda *arguments: print('transformers are tried') or {'pytest': '1 passed'}\n"
        "try: gpu_models.models(types.SimpleNamespace(dry=False, kind='rehearsal'))\n"
        "except AssertionError as error: print('told:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    told = done.stdout.partition("told: ")[2]
    assert "transformers are tried" in done.stdout and told.count("took longer than 0.01 s") == 2 and told.count("node.log: waits for a GPU") == 2
