"""Every step of the GPU check in turn, each in a process of its own and within its time, and a report that says what passed, what failed, what was measured.

Knows: the steps' names, order and limits, the report's form. Must not know: how a step is done (gpu_step.py and its neighbours); cupy, torch, kvguard.
Invariants: a step that fails, hangs, crashes, or loses the GPU never keeps the others from running, nor takes the time that is kept for those behind it; what
it started ends with it; the report is written anew before and after every step, and names what has not run, and why; a dry run
states no number; a report names the GPU, the driver, the packages and the commit; exit code 0 only where every step passed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = Path(__file__).resolve().parent / "gpu_step.py"
LIMIT_S = 470  # of all steps together: under eight minutes with what is around them
# name -> (what is kept for it, the longest that it may take), in the order of what is lost where the time isn't enough. All that is kept fits into LIMIT_S.
STEPS_S = {
    "basics": (40, 90), "contracts": (80, 150), "survival": (15, 60), "decode": (60, 150), "bandwidth": (20, 60), "restore": (25, 90), "correctness": (20, 60),
    "torch": (20, 60), "salvage": (15, 60), "models": (55, 200), "daemons": (45, 150), "kernels": (10, 60),
}  # fmt: skip
ABOUT_S = 60
LEAST_S = 1
SLOW = 8  # a dry run measures nothing, and may run on a machine that is busy
ENDING_S = 20
WORDS = 1500  # of what a step said that are kept with its failure
PR_SET_CHILD_SUBREAPER = 36
_given_up: set[int] = set()  # processes that the driver doesn't let go of: no later step waits for them again, or is blamed


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what kvguard promises of GPUs on this one.")
    parser.add_argument("--dry-run", action="store_true", help="walk every step with host memory in the GPU's place; measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the report (docs/measurements; of a dry run: none)")
    parser.add_argument("--only", default="", help="steps to run, by name, joined by commas")
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    if only - set(STEPS_S):
        parser.error(f"no step is called {', '.join(sorted(only - set(STEPS_S)))}. Try: {', '.join(STEPS_S)}")
    dry, began = arguments.dry_run, time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # whoever ends this ends what it has started, too
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a step leaves behind is ours to end
    about = in_a_process(command_of("machine", dry), ABOUT_S * (SLOW if dry else 1))
    if not about.get("gpu"):
        print(f"gpu_check: no GPU to check: {about.get('reason', 'nothing is known')}", file=sys.stderr)
        return 1
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    out = arguments.out or (None if dry else ROOT / "docs" / "measurements")
    chosen = [name for name in STEPS_S if not only or name in only]
    report = {"about": about, "seconds": None, "steps": {name: not_run("the check ended before") for name in chosen}}
    report["not_asked_for"] = [name for name in STEPS_S if name not in chosen]

    def said(name: str, result: dict) -> None:
        report["steps"][name] = result
        report["seconds"] = None if dry else round(time.monotonic() - began, 1)
        if out is not None:
            written(report, out)

    for name in chosen:
        said(name, not_run("the check was ended while it ran"))
        limit = limit_of(chosen[chosen.index(name) :], time.monotonic() - began, SLOW if dry else 1)
        result = in_a_process(command_of(name, dry), limit) if limit >= LEAST_S else not_run(f"{LIMIT_S} s were over")
        said(name, result)
        print(f"{name:12} {result['status']:8} {result.get('reason', '')}", flush=True)
    others = [name for name, result in report["steps"].items() if result["status"] != "pass"]
    passed = f"{len(chosen) - len(others)} of {len(chosen)} steps passed"
    print(f"{'dry run, nothing measured: ' if dry else ''}{passed}{'; not: ' if others else ''}{', '.join(others)}")
    return 1 if others else 0


def not_run(reason: str) -> dict:
    return {"status": "not run", "reason": reason}


def limit_of(steps: list[str], gone_s: float, slow: int) -> float:
    """How long the first of `steps` may take: as long as what is kept for those behind it is left."""
    _, most = STEPS_S[steps[0]]
    kept = sum(STEPS_S[name][0] for name in steps[1:])
    return min(most * slow, (LIMIT_S - kept) * slow - gone_s)


def command_of(name: str, dry: bool) -> list[str]:
    """Without the file for the result, which is the last argument but the options."""
    return [sys.executable, str(STEP), name, *(["--dry-run"] if dry else [])]


def in_a_process(command: list[str], limit_s: float) -> dict:
    """The step's result, from the file that it writes; what it, and whatever it started, did instead, where there is none."""
    with tempfile.TemporaryDirectory(prefix="kvguard-gpu-check.") as folder:
        result, said = Path(folder) / "result.json", Path(folder) / "said"
        with open(said, "wb") as log:
            whole = [*command[:3], str(result), *command[3:]]
            process = subprocess.Popen(whole, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT)
            try:
                process.wait(limit_s)
                why = f"it ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                why = f"it took longer than {limit_s:.0f} s"
            finally:
                ended = end_descendants(process)
        words = said.read_text(errors="replace")
        try:
            found = json.loads(result.read_text())
        except (OSError, ValueError):
            found = {"status": "fail", "reason": f"{why}: {words[-WORDS:].strip()}"}
        if found.get("status") == "fail":
            print(words[-4 * WORDS :], file=sys.stderr, flush=True)
            found["said"] = words[-WORDS:]
        if ended and found.get("status") == "pass":
            found |= {"status": "fail", "reason": f"it left {ended} processes behind"}
        return found


def end_descendants(process: subprocess.Popen) -> int:
    """End the step, if it still runs, and what it started in whatever session: how many there were. Orphans among them have this process for a parent.

    A process that the driver doesn't let go of is given up after ENDING_S: it must not keep the other steps from running.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + ENDING_S
    while time.monotonic() < deadline and (alive := [pid for pid in children_of(os.getpid()) if pid not in _given_up]):
        for pid in alive:
            ended.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                continue  # it has just ended
        time.sleep(0.01)  # between two looks at who is still there
    _given_up.update(children_of(os.getpid()))
    process.returncode = process.returncode if process.returncode is not None else -signal.SIGKILL
    return len(ended)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(") ")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def written(report: dict, out: Path) -> None:
    """GPU.json and GPU.md."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", report["about"]["gpu"].lower()).strip("-")
    made = out / f".{name}.part"
    made.write_text(json.dumps(report, indent=1) + "\n")
    made.rename(out / f"{name}.json")
    rows = ["| step | result | measured |", "|---|---|---|"]
    for step, result in report["steps"].items():
        values = "; ".join(f"{key} {value}" for key, value in result.get("measured", {}).items())
        reason = result.get("reason", "")[:300].replace("|", "/")
        rows.append(f"| {step} | {result['status']} {reason} | {values} |".replace("\n", " "))
    rows += [f"| {step} | not asked for | |" for step in report["not_asked_for"]]
    facts = "; ".join(f"{key} {value}" for key, value in report["about"].items())
    (out / f"{name}.md").write_text(f"# {report['about']['gpu']}\n\n{facts}\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    sys.exit(main())
