"""Which processes a daemon is and serves, said so that a drill on the same machine can find exactly those and no others.

Knows: /proc, pidfds that engines passed. Must not know: drills, signals.
Invariant: a process is named by its number, when it began and where numbers count (boot and pid namespace): a number alone may be another's by now.
"""

from __future__ import annotations

import os

from kvguard.daemon.descriptors import process_of


def here() -> dict:
    """Where process numbers count: {"boot_id", "pid_namespace"}."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return {"boot_id": boot.read().strip(), "pid_namespace": os.stat("/proc/self/ns/pid").st_ino}


def began(pid: int) -> int:
    """When the process began, in clock ticks since boot; 0 for one that isn't there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b") ")[2].split()[19])
    except OSError:
        return 0


def process(pid: int) -> dict:
    return {"pid": pid, "began": began(pid)}


def processes(engines) -> dict:
    """This daemon and the living ranks that it serves, by stream; `releasing`: pools of former ones, and arenas, that are still mapped.
    `engines`: ranks.Ranks."""
    ranks = {str(stream): process(process_of(rank.pidfd)) for stream, rank in engines.ranks.items() if rank.stream.alive}
    return {**here(), "daemon": process(os.getpid()), "ranks": ranks, "releasing": engines.releasing}
