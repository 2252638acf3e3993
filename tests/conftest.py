"""What every test run promises the machine: nothing is left behind.

Knows: this process's descendants, /dev/shm, mounts, network namespaces. Must not know: what the tests do.
Invariant: orphans of the tests are adopted by this process (child subreaper), so that none escapes the count.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path

import psutil
import pytest

PR_SET_CHILD_SUBREAPER = 36
OTHERS_WORK_HERE = "KVGUARD_OTHERS_WORK_HERE"  # 1: what appears on the machine may be theirs (tools/gpu_check.sh); only this run's processes count
MADE_BY_A_RUN = re.compile(r"kvguard-(?:test|bench)-(\d+)-")  # the process whose name a directory in /dev/shm carries


def is_anothers(name: str) -> bool:
    """Made by another run on this machine that is still working: its own check counts it."""
    if name.startswith("sem.mp-"):
        return True  # Python's own, of any program: eight letters by chance
    made = MADE_BY_A_RUN.match(name)
    return bool(made) and int(made[1]) != os.getpid() and psutil.pid_exists(int(made[1]))


def left_on_the_machine() -> dict[str, set[str]]:
    shm, netns = Path("/dev/shm"), Path("/run/netns")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "files in /dev/shm": {name for name in os.listdir(shm) if "kvg" in name.lower() and not is_anothers(name)} if shm.is_dir() else set(),
        "network namespaces": set(os.listdir(netns)) if netns.is_dir() else set(),
        "mounts": {line.split()[4] for line in mounts},
    }


def why_no_gpu() -> str:
    """Empty where a GPU can be used. A machine without one is no fault of the machine's: these tests skip even where everything is required."""
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA GPU here: tools/gpu_check.sh runs these where there is one"
    return "" if importlib.util.find_spec("cupy") else "cupy is not installed: pip install 'kvguard[cuda13]'"


def pytest_collection_modifyitems(items) -> None:
    reason = why_no_gpu()
    for item in items if reason else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = left_on_the_machine()
    yield
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" in " ".join(process.cmdline()):
                continue  # multiprocessing's own: it ends with this process
            process.wait(5)  # one that is ending may end
        except psutil.NoSuchProcess:
            continue
        except psutil.TimeoutExpired:
            alive.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
            process.kill()
    assert not alive, f"processes left behind: {alive}"
    if os.environ.get(OTHERS_WORK_HERE) == "1":
        return
    found = {what: sorted(names - before[what]) for what, names in left_on_the_machine().items() if names - before[what]}
    assert not found, f"left behind: {found}"
