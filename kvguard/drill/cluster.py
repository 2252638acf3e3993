"""An operator's own cluster under a drill: whether it may be struck, what would happen, the strike, and what came of it.

Knows: the coordinator's status and history, the processes that daemons on this machine name. Must not know: the reference engine, key files, signals
(blows.py). Invariants: nothing is struck while redundancy isn't whole, nor after it has ceased to be since it was looked at; only a process whose boot and
namespace are this machine's is chosen; a stranger who is sent to knock has a key that nobody ever listed.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from kvguard.daemon import whereabouts
from kvguard.drill import blows, kept
from kvguard.drill.blows import COORDINATOR, Target
from kvguard.drill.scenarios import Scenario
from kvguard.errors import KvguardError, Refused, TimedOut

POLL_S = 0.1
WHOLE_TIMEOUT_S = 120.0
FRESH_MS = 2000.0
DAEMONS = ("kill-daemon", "restart-daemon")
REFUSED = {
    "kill-node": "it would take whatever else runs in that host's process groups with it. Try: pull the plug of a test host",
    "pause-node": "whatever else runs in that host's process groups would be stopped with it",
    "ids-only": "every node would have to die at once",
    "kill-driver": "an emitter belongs to its users",
}


class Reaches(Protocol):
    """cli.asking.Reach: how coordinator and daemons are asked."""

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict: ...

    def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict: ...

    def stranger(self, name: str, address: str) -> str | None:
        """What becomes of somebody with a fresh key there: answered, refused, or why neither is known; None where no keys are in use."""


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
    if scenario.name == "kill-coordinator":
        said = reach.coordinator("stats")["process"]
        if {key: said[key] for key in here} == here:
            targets.append(Target("", "", COORDINATOR, "", said["pid"], said["began"], hang_ms=0))
    for node in status["nodes"] if scenario.name != "kill-coordinator" else ():
        said = reach.node(node["node"], node["address"], "status")
        known = said["processes"]
        if {key: known[key] for key in here} != here:
            continue
        if scenario.name in DAEMONS:
            targets.append(Target("", "", node["node"], node["address"], **known["daemon"], hang_ms=said["hang_ms"]))
            continue
        for rank in said["ranks"]:
            if rank["stream"] in known["ranks"] and not rank["rank"].endswith("scheduler"):
                place = known["ranks"][rank["stream"]]
                targets.append(Target(rank["instance"], rank["rank"], node["node"], node["address"], **place, hang_ms=said["hang_ms"]))
    if scenario.name == "restart-daemon" and targets:
        targets = [target for target in targets if blows.service_of(target.pid)]
        if not targets:
            raise Refused("no daemon here is a service of systemd's, so nobody would start it again. Try: kill-daemon, and start it again yourself")
    if not targets:
        raise Refused("no process of this cluster is on this machine. Try: on the host of a node that is to be struck")
    return random.Random(f"{scenario.name}/{seed}").choice(sorted(targets, key=lambda one: (one.node, one.rank)))


def consequence(scenario: Scenario, target: Target, status: dict) -> str:
    """What would happen, for --dry-run and for the question before the strike."""
    if scenario.name in DAEMONS:
        what = "gets SIGKILL" if scenario.name == "kill-daemon" else "is restarted"
        return f"{target} {what}; its ranks are unprotected until it is back: {blows.supervisor(target)}"
    if scenario.name == "kill-coordinator":
        return f"{target} gets SIGKILL; nothing recovers until it is back, everything else goes on: {blows.supervisor(target)}"
    if scenario.name == "pause-briefly":
        return f"{target} is stopped for {target.pause_s:.2f} s, its instance with it, and woken; nobody should fail over"
    standbys = sum(rank["state"] == "standby" and rank["instance"] == target.instance for rank in status["ranks"])
    if scenario.name == "pause-rank":
        stands = f"{target.instance} stands still for {target.hang_ms / 1e3:.0f} s until its daemon kills the rank"
        return f"{target} is stopped; {stands}, and then until one of {standbys} standbys is that rank, and has one standby less"
    return f"{target} gets SIGKILL; {target.instance} stands still until one of {standbys} standbys is that rank, and has one standby less"


def strike(reach: Reaches, scenario: Scenario, seed: int, target: Target) -> dict:
    """The drill: conditions once more, the strike, the recovery. The evidence, in the form of a bench's. Raises Refused when one doesn't hold any more."""
    with blows.held(target) as pidfd:
        before = demand_whole(reach)
        history = reach.coordinator("history")["history"]
        epochs = {one["instance"]: one["epoch"] for one in before["instances"]}
        killed = _processes_killed(reach, target) if scenario.name == "pause-rank" else 0
        ask = functools.partial(reach.node, target.node, target.address)
        held = kept.held(ask, bool(blows.service_of(target.pid))) if scenario.name in DAEMONS else None
        struck_ns = time.monotonic_ns()
        evidence = _blow(reach, scenario, target, pidfd, epochs)
    after, samples = _until_whole(reach, epochs, lambda status: _missing(reach, scenario, target, epochs, status))
    whole_ms = (time.monotonic_ns() - struck_ns) / 1e6
    entries = reach.coordinator("history")["history"][len(history) :]
    entry = next((one for one in entries if one["instance"] == target.instance), None)
    rose = {one["instance"]: one["epoch"] for one in after["instances"]}
    watched = target.instance or next(iter(epochs))
    promises, silent = _promises(reach, after, watched)
    counters = {"processes_killed": _processes_killed(reach, target) - killed} if scenario.name == "pause-rank" else {}
    outage = {"kind": scenario.name, "down_ms": whole_ms, "tokens_meanwhile": None, "acked_before": _acked(before), "acked_after": _acked(after),
              "epoch_before": epochs.get(watched, 0), "epoch_after": rose.get(watched, 0)}  # fmt: skip
    return {
        "fault": {"kind": scenario.name, "target": str(target), "at_token": None, "at_position": None, "fired": all(evidence.values()), "evidence": evidence},
        "recovery": _recovery(entry) if entry is not None else None, "outage": outage if entry is None else None,
        "observed": {
            "epoch_before": epochs.get(watched, 0), "epoch_after": rose.get(watched, 0), "history": [one for one in entries if one["instance"] == watched],
            "promises": promises, "silent": silent, "conflicts": [], "watch": samples.document(), "whole_ms": whole_ms, "waves": 0,
            "counters": counters, "replicas_equal_pools": None, "strangers": _strangers(reach, after),
            "kept": kept.found(ask, held) if held is not None else None,
        },
    }  # fmt: skip


def _processes_killed(reach: Reaches, target: Target) -> int:
    """By the target's own daemon, so far."""
    return reach.node(target.node, target.address, "stats")["counters"].get("processes_killed", 0)


def _strangers(reach: Reaches, status: dict) -> dict[str, str] | None:
    """What the coordinator and each daemon say to somebody whose key nobody has listed; None where no keys are in use."""
    told = {COORDINATOR: reach.stranger(COORDINATOR, "")}
    told |= {node["node"]: reach.stranger(node["node"], node["address"]) for node in status["nodes"]}
    return None if None in told.values() else told


def _acked(status: dict) -> int:
    return sum(rank["acked"] for rank in status["ranks"])


def _blow(reach: Reaches, scenario: Scenario, target: Target, pidfd: int, epochs: dict[str, int]) -> dict:
    """The strike; evidence that it fired."""
    if scenario.name == "pause-briefly":

        def unmoved() -> str:
            now = {one["instance"]: one["epoch"] for one in reach.coordinator("status")["instances"]}
            return "" if now == epochs else f"the epochs went from {epochs} to {now} while it was stopped"

        return blows.pause(target, pidfd, unmoved)
    if scenario.name == "pause-rank":
        own = f"{target.instance} is ", f" of {target.instance} is "

        def borne() -> str:
            """What the pause itself brings about is said of its instance or a rank of it; anything else, and the loss of the standby, is a reason to end it."""
            faults = not_whole(reach.coordinator("status"))
            return "; ".join(fault for fault in faults if not fault.startswith(own[0]) and own[1] not in fault.partition(":")[0])

        return blows.stop_until_killed(target, pidfd, borne)
    return blows.restart(target, pidfd) if scenario.name == "restart-daemon" else blows.kill(target, pidfd)


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
    if scenario.name in ("kill-rank", "pause-rank"):
        epoch = next((one["epoch"] for one in status["instances"] if one["instance"] == target.instance), 0)
        return "" if epoch > epochs.get(target.instance, 0) else f"no recovery of {target.instance} yet"
    if scenario.name == "kill-coordinator":
        now = reach.coordinator("stats")["process"]
        return "" if (now["pid"], now["began"]) != (target.pid, target.began) else "the old coordinator still answers"
    if scenario.name in DAEMONS:
        try:
            now = reach.node(target.node, target.address, "status")["processes"]["daemon"]
        except KvguardError as error:
            return f"its supervisor has not started it again: {error}"
        return "" if now != {"pid": target.pid, "began": target.began} else "the old daemon still answers"
    return ""


def _until_whole(reach: Reaches, epochs: dict[str, int], missing: Callable[[dict], str]) -> tuple[dict, _Samples]:
    """Whole as before, but for the standby that a rebuilt rank took. Raises TimedOut, KvguardError where a recovery failed."""
    samples, deadline, last = _Samples(), time.monotonic() + WHOLE_TIMEOUT_S, "no answer"
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
    raise TimedOut(f"not whole again within {WHOLE_TIMEOUT_S:g} s: {last}. Try: kvguard status; a daemon that was killed is its supervisor's to start")


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
