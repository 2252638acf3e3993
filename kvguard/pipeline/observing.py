"""What can be seen of a cluster from outside while something is done to it: statuses sampled, counters and processes before and after.

Knows: the documents that daemons and coordinator answer with, /proc of processes that this world started. Must not know: faults, what should be seen.
Invariants: looking changes nothing; a daemon that can't be asked is left out and named, never guessed.
"""

from __future__ import annotations

import os
import re
import time

from kvguard.errors import KvguardError
from kvguard.pipeline import report
from kvguard.pipeline.world import INSTANCE, Process, World
from kvguard.transport.ask import ask

LOOK_EVERY_S = 0.15
LOOK_TIMEOUT_S = 2.0  # a coordinator that is away holds the load up no longer
STATES_MAX = 64


def stopped(pid: int) -> bool:
    """Whether the kernel says that the process is stopped by a signal."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False


def kind(reason: str) -> str:
    """A reason without its numbers: how long somebody is silent differs in every sample, that somebody is silent doesn't."""
    return re.sub(r"\d+", "#", reason)


class Watch:
    """Samples of the coordinator's status: the states, with kinds of reasons, of ranks and nodes; how far ranks lagged; how full arenas were."""

    def __init__(self, world: World):
        self._world, self._due_s = world, 0.0
        self.samples = self.unanswered = 0
        self.states: dict[str, dict[str, None]] = {}
        self.node_states: dict[str, dict[str, None]] = {}
        self.lag_tokens_max = self.unprotected_sequences_max = 0
        self.arena_share_max = 0.0
        self.epochs: list[int] = []

    def look(self) -> None:
        """A sample, where the last one is old enough."""
        if time.monotonic() < self._due_s:
            return
        try:
            status = ask(self._world.coordinator_address, "status", {}, timeout=LOOK_TIMEOUT_S)
        except KvguardError:
            self.unanswered += 1
        else:
            self._take(status)
        self._due_s = time.monotonic() + LOOK_EVERY_S

    def _take(self, status: dict) -> None:
        self.samples += 1
        for rank in status["ranks"]:
            if rank["state"] != "standby":
                reasons = self.states.setdefault(rank["state"], {})
                if len(reasons) < STATES_MAX:
                    reasons[kind(rank["reason"])] = None
                self.lag_tokens_max = max(self.lag_tokens_max, rank["lag_tokens"])
                self.unprotected_sequences_max = max(self.unprotected_sequences_max, rank["unprotected_sequences"])
        for node in status["nodes"]:
            reasons = self.node_states.setdefault(node["state"], {})
            if len(reasons) < STATES_MAX:
                reasons[kind(node["reason"])] = None
            if node["arena_bytes_max"]:
                self.arena_share_max = max(self.arena_share_max, node["arena_bytes"] / node["arena_bytes_max"])
        self.epochs += [one["epoch"] for one in status["instances"] if one["instance"] == INSTANCE]

    def saw(self, state: str, text: str = "") -> bool:
        """Whether a rank was said to be in `state`, for a reason that has `text` in it."""
        return any(text in reason for reason in self.states.get(state, {}))

    def document(self) -> dict:
        return {
            "samples": self.samples, "unanswered": self.unanswered, "states": {state: list(reasons) for state, reasons in self.states.items()},
            "node_states": {state: list(reasons) for state, reasons in self.node_states.items()}, "lag_tokens_max": self.lag_tokens_max,
            "unprotected_sequences_max": self.unprotected_sequences_max, "arena_share_max": self.arena_share_max,
            "epochs_rise": self.epochs == sorted(self.epochs),
        }  # fmt: skip


class Snapshot:
    """Everything at one moment. `nodes`: by name the daemon's status, counters and what its process holds; `silent`: daemons that gave no answer, and why."""

    def __init__(self, world: World):
        status = world.status()
        instance = next((one for one in status["instances"] if one["instance"] == INSTANCE), {"epoch": 0})
        self.epoch: int = instance["epoch"]
        self.history: list[dict] = ask(world.coordinator_address, "history", {}, timeout=5.0)["history"]
        self.acked = sum(rank["acked"] for rank in status["ranks"])
        self.committed = sum(rank["committed"] for rank in status["ranks"])
        self.processes: dict[str, Process] = {}
        self.daemons = [node.daemon.pid for node in world.nodes if node.daemon]
        self.groups = {node.name: [process.pid for process in node.processes()] for node in world.nodes}
        for node in world.nodes:
            self.processes |= {f"{process.name}#{process.pid}": process for process in node.processes() if process.alive()}
        self.nodes, self.silent = {}, {}
        for node in world.nodes:
            try:
                self.nodes[node.name] = self._node(world, node)
            except (KvguardError, OSError) as error:
                self.silent[node.name] = str(error)

    def _node(self, world: World, node) -> dict:
        said, stats = world.query(node, "status", {}), world.query(node, "stats", {})
        pid = node.daemon.pid
        return {
            "pid": pid, "promise": said["epochs"].get(INSTANCE, 0), "arena_bytes": said["arena_bytes"] + said["arena_bytes_promised"],
            "arena_bytes_max": said["arena_bytes_max"], "buffers": stats["buffers"], "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "checksum_failures": stats["checksum_failures"], "frames_corrupted": stats["frames_corrupted"],
            "refused": stats["store"].get("refused", 0), "positions_damaged": stats["store"].get("positions_damaged", 0),
            "stale_epoch": stats["store"].get("stale_epoch", 0), "processes_killed": stats["counters"].get("processes_killed", 0),
        }  # fmt: skip

    def rose(self, before: Snapshot, counter: str) -> int:
        """By how much a counter rose over all daemons; one that was restarted meanwhile counts from 0."""
        total = 0
        for name, node in self.nodes.items():
            old = before.nodes.get(name)
            total += node[counter] - (old[counter] if old is not None and old["pid"] == node["pid"] else 0)
        return total


COUNTERS = ("checksum_failures", "frames_corrupted", "refused", "positions_damaged", "stale_epoch", "processes_killed")


def died(before: Snapshot, meant: list[int]) -> list[str]:
    """Engine and daemon processes that were alive before and aren't now, beside those that were meant to die."""
    return [name for name, process in before.processes.items() if not process.alive() and process.pid not in meant]


def replica_sums(world: World, digests: dict, run: str, wait=None, timeout_s: float = 15.0) -> dict:
    """What holders have, by rank and sequence, once they have all that the pools have (their last acknowledgements may be under way). Raises TimedOut."""
    found: dict = {}
    sequences = {name for one in digests.values() for name in one}

    def complete() -> bool:
        try:
            look()
        except KvguardError:
            return False  # who is not there yet is asked again, until the deadline
        return all(len(found.get(rank, {}).get(i, [])) >= len(sums) for rank, one in digests.items() for i, sums in one.items())

    def look() -> None:
        for rank in world.status()["ranks"]:
            if rank["rank"] not in digests or rank["state"] == "standby" or not rank["holders"]:
                continue
            arguments = {"instance": INSTANCE, "rank": rank["rank"], "sequences": [f"{run}-{i}" for i in sequences]}
            sums = world.query(world.node_named(rank["holders"][0]), "sums", arguments)["sums"]
            found[rank["rank"]] = {i: [f"{value:016x}" for value in sums.get(f"{run}-{i}", [])] for i in sequences}

    (wait or world.wait_until)("the replicas complete", complete, timeout_s)
    return found


def replicas_equal(world: World, digests: dict, run: str, wait=None, timeout_s: float = 15.0) -> bool | None:
    """Whether every holder has what the pools have, byte for byte. `wait`: as World.wait_until, which is the default."""
    sequences = 1 + max(int(i) for one in digests.values() for i in one)
    return report.kv_identical(digests, replica_sums(world, digests, run, wait, timeout_s), [1 << 62] * sequences)
