"""An operator's own cluster under a drill: whether it may be struck, what would happen, the strike, and what came of it.

Knows: the coordinator's status and history, the processes that daemons on this machine name, pidfds. Must not know: the reference engine, key files.
Invariants: nothing is struck while redundancy isn't whole, nor after it has ceased to be since it was looked at; a process is signalled through a pidfd only
after its number, its beginning, its boot and its namespace are those that its own daemon names; what was stopped is always woken.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from kvguard.daemon import whereabouts
from kvguard.drill.scenarios import Scenario
from kvguard.errors import KvguardError, Refused, TimedOut

POLL_S = 0.1
WHOLE_TIMEOUT_S = 120.0
FRESH_MS = 2000.0
PAUSE_SHARE, PAUSE_S_MAX = 0.2, 1.0  # of the hang threshold
REFUSED = {
    "kill-node": "it would take whatever else runs in that host's process groups with it. Try: pull the plug of a test host",
    "pause-rank": "the rank would be killed by its daemon after the whole hang threshold. Try: kill-rank, or the bench",
    "ids-only": "every node would have to die at once",
    "restart-daemon": "the service's supervisor restarts daemons. Try: systemctl restart kvguard-node, or kill-daemon",
    "kill-coordinator": "its process is not named by any daemon. Try: systemctl kill -s KILL kvguard-coordinator",
    "kill-driver": "an emitter belongs to its users",
}


class Reaches(Protocol):
    """cli.asking.Reach: how coordinator and daemons are asked."""

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict: ...

    def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict: ...


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
        what = f"rank {self.rank} of {self.instance}" if self.rank else "the daemon"
        return f"{what} on {self.node} (process {self.pid})"


def not_whole(status: dict) -> list[str]:
    """Every reason why this cluster must not be struck now; [] when its redundancy is whole."""
    faults = ["automatic failovers are paused"] if status["paused"] else []
    faults += [f"node {node['node']} is {node['state']}: {node['reason']}" for node in status["nodes"] if node["state"] != "alive"]
    faults += [f"node {node['node']} was last heard {node['heartbeat_age_ms']:.0f} ms ago" for node in status["nodes"] if node["heartbeat_age_ms"] > FRESH_MS]
    faults += [f"{one['instance']} is {one['state']}: {one['reason']}" for one in status["instances"] if one["state"] != "running"]
    ranks = [rank for rank in status["ranks"] if rank["state"] != "standby"]
    faults += [f"rank {rank['rank']} of {rank['instance']} is {rank['state']}: {rank['reason']}" for rank in ranks if rank["state"] != "protected"]
    faults += [f"rank {rank['rank']} of {rank['instance']} has no holder" for rank in ranks if not rank["holders"]]
    if not ranks:
        faults.append("no rank is attached")
    for instance in dict.fromkeys(rank["instance"] for rank in ranks):
        if not any(rank["state"] == "standby" and rank["instance"] == instance for rank in status["ranks"]):
            faults.append(f"{instance} has no standby that could take a rank")
    return faults


def demand_whole(reach: Reaches) -> dict:
    """The status. Raises Refused that names everything that is not whole."""
    status = reach.coordinator("status")
    faults = not_whole(status)
    if faults:
        raise Refused("redundancy is not whole: " + "; ".join(faults) + ". Try: kvguard status, and again when every rank is protected")
    return status


def choose(reach: Reaches, scenario: Scenario, seed: int, status: dict) -> Target:
    """The process that a seed stands for, among those on this machine. Raises Refused where the drill isn't for live clusters, or none is here."""
    if not scenario.live:
        why = REFUSED.get(scenario.name, "it needs the bench's own cables, memory or damaged bytes")
        raise Refused(f"{scenario.name} is not tried against a live cluster: {why}. Try: kvguard drill run {scenario.name}, without --config")
    here, targets = whereabouts.here(), []
    for node in status["nodes"]:
        said = reach.node(node["node"], node["address"], "status")
        known = said["processes"]
        if {key: known[key] for key in here} != here:
            continue
        if scenario.name == "kill-daemon":
            targets.append(Target("", "", node["node"], node["address"], **known["daemon"], hang_ms=said["hang_ms"]))
            continue
        for rank in said["ranks"]:
            if rank["stream"] in known["ranks"] and not rank["rank"].endswith("scheduler"):
                place = known["ranks"][rank["stream"]]
                targets.append(Target(rank["instance"], rank["rank"], node["node"], node["address"], **place, hang_ms=said["hang_ms"]))
    if not targets:
        raise Refused("no process of this cluster is on this machine. Try: on the host of a node that is to be struck")
    return random.Random(f"{scenario.name}/{seed}").choice(sorted(targets, key=lambda one: (one.node, one.rank)))


def consequence(scenario: Scenario, target: Target, status: dict) -> str:
    """What would happen, for --dry-run and for the question before the strike."""
    if scenario.name == "kill-daemon":
        return f"{target} gets SIGKILL; its ranks are unprotected until its supervisor has started it again (nobody else does)"
    if scenario.name == "pause-briefly":
        return f"{target} is stopped for {pause_s(target):.2f} s, its instance with it, and woken; nobody should fail over"
    standbys = sum(rank["state"] == "standby" and rank["instance"] == target.instance for rank in status["ranks"])
    return f"{target} gets SIGKILL; {target.instance} stands still until one of {standbys} standbys is that rank, and has one standby less"


def pause_s(target: Target) -> float:
    return min(PAUSE_S_MAX, PAUSE_SHARE * target.hang_ms / 1e3)


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


def strike(reach: Reaches, scenario: Scenario, seed: int, target: Target, wait_s: float = WHOLE_TIMEOUT_S) -> dict:
    """The drill: conditions once more, the strike, the recovery. The evidence, in the form of a bench's. Raises Refused when one doesn't hold any more."""
    with held(target) as pidfd:
        before = demand_whole(reach)
        history = reach.coordinator("history")["history"]
        epochs = {one["instance"]: one["epoch"] for one in before["instances"]}
        struck_ns = time.monotonic_ns()
        evidence = _pause(reach, target, pidfd, epochs) if scenario.name == "pause-briefly" else _kill(target, pidfd)
    after, samples = _until_whole(reach, epochs, lambda status: _missing(reach, scenario, target, epochs, status), wait_s)
    whole_ms = (time.monotonic_ns() - struck_ns) / 1e6
    entries = reach.coordinator("history")["history"][len(history) :]
    entry = next((one for one in entries if one["instance"] == target.instance), None)
    rose = {one["instance"]: one["epoch"] for one in after["instances"]}
    watched = target.instance or next(iter(epochs))
    promises, silent = _promises(reach, after, watched)
    outage = {"kind": scenario.name, "down_ms": whole_ms, "tokens_meanwhile": None, "acked_before": _acked(before), "acked_after": _acked(after),
              "epoch_before": epochs.get(watched, 0), "epoch_after": rose.get(watched, 0)}  # fmt: skip
    return {
        "fault": {"kind": scenario.name, "target": str(target), "at_token": None, "at_position": None, "fired": all(evidence.values()), "evidence": evidence},
        "recovery": _recovery(entry) if entry is not None else None, "outage": outage if entry is None else None,
        "observed": {
            "epoch_before": epochs.get(watched, 0), "epoch_after": rose.get(watched, 0), "history": [one for one in entries if one["instance"] == watched],
            "promises": promises, "silent": silent, "conflicts": [], "watch": samples.document(), "whole_ms": whole_ms, "waves": 0,
            "counters": {}, "replicas_equal_pools": None,
        },
    }  # fmt: skip


def _acked(status: dict) -> int:
    return sum(rank["acked"] for rank in status["ranks"])


def _kill(target: Target, pidfd: int) -> dict:
    """Evidence: the kernel says that the process is gone."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return {"died": bool(poll.poll(10_000))}


def _pause(reach: Reaches, target: Target, pidfd: int, epochs: dict[str, int]) -> dict:
    """Evidence: the kernel says that it is stopped. Woken at the end, or at once when the cluster doesn't bear it."""
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    seen = False
    try:
        until_s = time.monotonic() + pause_s(target)
        while time.monotonic() < until_s:
            with open(f"/proc/{target.pid}/stat", "rb") as stat:
                seen = seen or stat.read().rpartition(b") ")[2][:1] == b"T"
            now = {one["instance"]: one["epoch"] for one in reach.coordinator("status")["instances"]}
            if now != epochs:
                raise Refused(f"aborted, and the process woken: the epochs went from {epochs} to {now} while it was stopped. Try: kvguard history")
            time.sleep(POLL_S / 5)  # between two looks at a condition with a deadline
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    return {"stopped": seen}


class _Samples:
    """What the status said meanwhile."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, None]] = {}
        self.count, self.epochs = 0, []

    def take(self, status: dict, epochs: dict[str, int]) -> None:
        self.count += 1
        for rank in status["ranks"]:
            self.states.setdefault(rank["state"], {})[rank["reason"]] = None
        self.epochs.append(sum(one["epoch"] for one in status["instances"] if one["instance"] in epochs))

    def document(self) -> dict:
        return {"samples": self.count, "states": {state: list(reasons) for state, reasons in self.states.items() if state != "standby"},
                "epochs_rise": self.epochs == sorted(self.epochs), "arena_share_max": 0.0, "lag_tokens_max": 0}  # fmt: skip


def _promises(reach: Reaches, status: dict, instance: str) -> tuple[dict[str, int], dict[str, str]]:
    """The epoch that each node has promised, and who didn't say."""
    promises, silent = {}, {}
    for node in status["nodes"]:
        try:
            promises[node["node"]] = reach.node(node["node"], node["address"], "status")["epochs"].get(instance, 0)
        except KvguardError as error:
            silent[node["node"]] = str(error)
    return promises, silent


def _missing(reach: Reaches, scenario: Scenario, target: Target, epochs: dict[str, int], status: dict) -> str:
    """What has not come about yet, "" when all has: a status may be older than the strike."""
    if scenario.name == "kill-rank":
        epoch = next((one["epoch"] for one in status["instances"] if one["instance"] == target.instance), 0)
        return "" if epoch > epochs.get(target.instance, 0) else f"no recovery of {target.instance} yet"
    if scenario.name == "kill-daemon":
        try:
            now = reach.node(target.node, target.address, "status")["processes"]["daemon"]
        except KvguardError as error:
            return f"its supervisor has not started it again: {error}"
        return "" if now != {"pid": target.pid, "began": target.began} else "the old daemon still answers"
    return ""


def _until_whole(reach: Reaches, epochs: dict[str, int], missing: Callable[[dict], str], wait_s: float) -> tuple[dict, _Samples]:
    """Whole as before, but for the standby that a rebuilt rank took. Raises TimedOut, KvguardError where a recovery failed."""
    samples, deadline, last = _Samples(), time.monotonic() + wait_s, "no answer"
    while time.monotonic() < deadline:
        try:
            status = reach.coordinator("status")
        except KvguardError as error:
            last = str(error)
        else:
            samples.take(status, epochs)
            failed = [one["reason"] for one in status["instances"] if one["state"] == "failed"]
            if failed:
                raise KvguardError(f"the recovery failed: {'; '.join(failed)}. Try: kvguard history, then kvguard failover")
            faults = [fault for fault in not_whole(status) if "no standby" not in fault]
            last = "; ".join(faults) or missing(status)
            if not last:
                return status, samples
        time.sleep(POLL_S)  # between two looks at a condition with a deadline
    raise TimedOut(f"not whole again within {wait_s:g} s: {last}. Try: kvguard status; a daemon that was killed is its supervisor's to start")


def _recovery(entry: dict) -> dict:
    """kvguard.demo/1's recovery part, of what the coordinator knows of it: the first token is the engine's own affair."""
    sequences = [{"sequence": name, "rung": entry["rungs"][name], "resume_position": position, "rolled_back": None, "recomputed": None}
                 for name, position in entry["positions"].items()]  # fmt: skip
    timing = entry["timing_ms"]
    return {
        "epoch": entry["epoch"], "rung": max((one["rung"] for one in sequences), key=("pool", "replica", "tokens").index, default="pool"),
        "resume_position": min(entry["positions"].values(), default=0), "rolled_back": None, "recomputed": None, "lost_sequences": len(entry["lost"]),
        "bytes": sum(entry["bytes_by_rung"].values()), "bytes_by_rung": entry["bytes_by_rung"],
        "ms": {**{phase: timing.get(phase) for phase in ("detect", "fence", "plan", "restore")}, "first_token": None, "total": timing.get("total")},
        "sequences": sequences,
    }  # fmt: skip


def tell(reach: Reaches, document: dict) -> None:
    """The coordinator remembers when each drill was last run, and whether it passed: alerts look at it. Raises as asking does."""
    at_s = datetime.fromisoformat(document["started"]).timestamp()
    reach.coordinator("drilled", {"name": document["name"], "passed": not document["failed"], "at_s": at_s})


def run(reach: Reaches, scenario: Scenario, seed: int, repeat: int, confirm: Callable[[str], None]) -> list[tuple[int, dict]]:
    """Evidence by seed. Every run finds the cluster whole, or none follows. `confirm` raises where its question is not answered with yes."""
    found = []
    for number in range(seed, seed + repeat):
        status = demand_whole(reach)
        target = choose(reach, scenario, number, status)
        confirm(consequence(scenario, target, status))
        try:
            found.append((number, strike(reach, scenario, number, target)))
        except TimedOut as error:
            found.append((number, {"error": str(error)}))
            break
    return found
