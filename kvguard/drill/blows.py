"""What is done to one process of a live cluster: killed, stopped, or started anew by its service manager.

Knows: pidfds, states that the kernel tells, systemd's units. Must not know: what a drill expects, the cluster beyond this process.
Invariants: a process is signalled through a pidfd only after its number and its beginning are those that its own daemon names; what was stopped is always
woken; evidence is what the kernel or the service manager says, never that it was asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvguard.daemon import whereabouts
from kvguard.errors import KvguardError, Refused

PAUSE_SHARE, PAUSE_S_MAX = 0.2, 1.0  # of the hang threshold
HANG_GRACE_S = 20.0  # beyond the hang threshold, until the daemon must have killed what stands still
LOOK_S = 0.02
RESTART_S = 60.0
COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Target:
    """One process of the cluster, on this machine."""

    instance: str
    rank: str  # "" for a daemon
    node: str
    address: str
    pid: int
    began: int
    hang_ms: int

    def __str__(self) -> str:
        what = f"rank {self.rank} of {self.instance} on {self.node}" if self.rank else "the coordinator" if self.node == COORDINATOR else (
            f"the daemon on {self.node}")  # fmt: skip
        return f"{what} (process {self.pid})"

    @property
    def pause_s(self) -> float:
        """How long it may be stopped without anybody calling it hung."""
        return min(PAUSE_S_MAX, PAUSE_SHARE * self.hang_ms / 1e3)


@contextlib.contextmanager
def held(target: Target):
    """A pidfd of exactly this process. Raises Refused where the number is another's by now."""
    try:
        pidfd = os.pidfd_open(target.pid)
    except OSError as error:
        raise Refused(f"{target} can't be reached: {error.strerror}. Try: as the user whose process it is, while it runs") from error
    try:
        if whereabouts.began(target.pid) != target.began:  # looked at after the pidfd was opened: it is this process or none
            raise Refused(f"process {target.pid} is not {target} any more. Try: again")
        yield pidfd
    finally:
        os.close(pidfd)


def gone(pidfd: int, timeout_s: float) -> bool:
    """Whether the process has ended, by the kernel's word."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


def kill(target: Target, pidfd: int) -> dict:
    """SIGKILL."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return {"died": gone(pidfd, 10.0)}


def pause(target: Target, pidfd: int, bearable: Callable[[], str]) -> dict:
    """SIGSTOP for less than the hang threshold. `bearable()`: why the cluster doesn't bear it, "" while it does; else it is woken at once, and Refused
    raised."""
    return {"stopped": _stopped(target, pidfd, target.pause_s, bearable)}


def stop_until_killed(target: Target, pidfd: int, bearable: Callable[[], str]) -> dict:
    """SIGSTOP beyond the hang threshold: its daemon must find it and kill it. `bearable` as in pause, until it has died."""
    stopped = _stopped(target, pidfd, target.hang_ms / 1e3 + HANG_GRACE_S, bearable)
    return {"stopped": stopped, "died": gone(pidfd, 0.0)}  # by somebody else's hand: nothing but SIGSTOP and SIGCONT was sent from here


def _stopped(target: Target, pidfd: int, for_s: float, bearable: Callable[[], str]) -> bool:
    """Whether the kernel ever said that it was stopped. Woken at the end, whatever happens."""
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    seen = False
    try:
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s and not gone(pidfd, LOOK_S):
            seen = seen or state(target.pid) == "T"
            why = bearable()
            if why and not gone(pidfd, 0.0):
                raise Refused(f"aborted, and the process woken: {why}. Try: kvguard status, kvguard history")
    finally:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile, as it should be where it stood still for long
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    return seen


def state(pid: int) -> str:
    """The kernel's letter for what a process does; "" for one that isn't there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        return ""


# ---- service managers -----------------------------------------------------------------------------------------------------------------


def service_of(pid: int) -> tuple[str, ...]:
    """systemctl's words for the unit whose main process this is, such as ("kvguard-node.service",) or ("--user", ...); () where there is none."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as cgroups:
            path = cgroups.read().strip().rpartition("\n")[2].rpartition(":")[2]
    except OSError:
        return ()
    unit = path.rpartition("/")[2]
    words = (*(("--user",) if "/user@" in path else ()), unit)
    if not unit.endswith(".service"):
        return ()
    try:
        said = subprocess.run(["systemctl", *words[:-1], "show", "-p", "MainPID", "--value", unit], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return words if said.stdout.strip() == str(pid) else ()


def supervisor(target: Target) -> str:
    """Who starts it again, in words."""
    unit = service_of(target.pid)
    return f"systemd starts it again ({unit[-1]})" if unit else "it is no service of systemd's: start it again yourself"


def restart(target: Target, pidfd: int) -> dict:
    """SIGTERM and a new life, by its service manager. Raises Refused, KvguardError where that is not done."""
    unit = service_of(target.pid)
    if not unit:
        raise Refused(f"{target} is no service of systemd's any more. Try: again")
    try:
        done = subprocess.run(["systemctl", *unit[:-1], "restart", unit[-1]], capture_output=True, text=True, timeout=RESTART_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise KvguardError(f"systemctl restart {unit[-1]}: {error}. Try: as root") from error
    if done.returncode:
        raise KvguardError(f"systemctl restart {unit[-1]} ended with {done.returncode}: {done.stderr.strip()}. Try: as root")
    return {"died": gone(pidfd, 10.0)}
