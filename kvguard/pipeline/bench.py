"""A cluster that is struck again and again for drills: `python -m kvguard.pipeline.bench`, commands as JSON lines on stdin, evidence likewise on stdout.

Commands: {"do": "start", "model", "stages", "sequences", "max_tokens"}, {"do": "quit"},
{"do": "strike", "name", "seed", "stage", "at_token", "sampled", "share"}.
Answers: {"event": "started", ...}, {"event": "evidence", ...} (facts alone: what they prove is judged elsewhere), {"event": "error", "message", "code"}.

Knows: the reference engine's world, its load, the strikes. Must not know: drills' hypotheses, invariants, reports; torch.
Invariants: one world for all strikes; after an error nothing more is struck in it; it and everything that it started end with this process.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

from kvguard.errors import KvguardError
from kvguard.pipeline import demo, faults, observing
from kvguard.pipeline.client import Client
from kvguard.pipeline.faults import Fault
from kvguard.pipeline.load import Load, recovery
from kvguard.pipeline.observing import COUNTERS, Snapshot, Watch
from kvguard.pipeline.strikes import OUTAGES, STRIKES, Bench, Draw
from kvguard.pipeline.world import World, WorldSettings

HANG_MS = 3000
DISTRESS_S = 300.0  # a bound, not a target: processes that import a tensor library start slowly on a busy machine


class Cluster:
    """A world, its client and its load, ready for strikes."""

    def __init__(self, model: Path, stages: int, sequences: int, max_tokens: int):
        options = demo.Options(stages=stages, sequences=sequences, max_tokens=max_tokens, model=str(model), kill="none")
        options.check()
        self.root = demo.own_directory()
        # Dozens of failovers in minutes is what this is for; the bound on them and the waits between them have tests of their own.
        self.world = World(WorldSettings(
            root=self.root, model=model, stages=stages, gated=True, node_overrides={"hang_ms": HANG_MS},
            coordinator_overrides={"failovers_per_window": 10_000, "backoff_ms": 0, "standby_ms": int(1e3 * DISTRESS_S)},
        ))  # fmt: skip
        self.client = Client(self.world)
        self.load = Load(self.client, demo.prompts_of(options, model), max_tokens)

    def start(self) -> None:
        self.world.start()
        self.world.wait_ready(DISTRESS_S)
        self.client.connect("ready")

    def close(self, keep_logs: bool) -> None:
        self.world.stop()
        for left in self.root.iterdir():
            if left.is_dir() and not (keep_logs and left.name == "logs"):
                shutil.rmtree(left)
            elif left.is_file():
                left.unlink()
        if not keep_logs:
            self.root.rmdir()

    # ---- one strike

    def strike(self, name: str, seed: int, draw: Draw) -> dict:
        """Everything that was seen of one fault under load. Raises KvguardError where the cluster can't go on."""
        world, load, client = self.world, self.load, self.client
        watch = Watch(world)
        bench = Bench(world, client, load, watch, draw, HANG_MS)
        load.reference(draw.sampled)
        world.wait_until("the cluster whole", lambda: faults.whole(world), DISTRESS_S)
        load.begin(f"{name}-{seed}", draw.sampled)
        bench.wait("the moment to strike", lambda: load.reached(draw.at_token) and faults.protected(world))
        before, at_position = Snapshot(world), client.position(load.wave.run)
        fault = STRIKES[name](bench)
        began = time.monotonic()
        world.replenish(client.endpoints)
        load.end()
        replicas = observing.replicas_equal(world, load.wave.digests, load.wave.run, bench.wait, DISTRESS_S)
        load.release()
        bench.wait("the cluster whole again", self._supervised, DISTRESS_S)
        whole_ms = 1e3 * (time.monotonic() - began)
        seen = self._seen(name, draw, fault, before, Snapshot(world), watch, at_position)
        seen["observed"] |= {"replicas_equal_pools": replicas, "whole_ms": whole_ms}
        return {"event": "evidence", "name": name, "seed": seed, **seen}

    def _supervised(self) -> bool:
        """Whether the cluster is whole; what has ended meanwhile is started again, as a fleet's supervisor would."""
        self.world.replenish(self.client.endpoints)
        return faults.whole(self.world)

    def _seen(self, name: str, draw: Draw, fault: Fault, before: Snapshot, after: Snapshot, watch: Watch, at_position: int) -> dict:
        load = self.load
        struck = load.struck_wave(fault)
        recovered = recovery(self.world, self.client, fault, struck.run if struck else load.wave.run) if fault.resumed else None
        outage = None
        if name in OUTAGES:
            outage = {
                "kind": name, "down_ms": fault.down_ms, "tokens_meanwhile": fault.tokens_meanwhile, "acked_before": before.acked, "acked_after": after.acked,
                "epoch_before": before.epoch, "epoch_after": after.epoch,
            }  # fmt: skip
        kind = fault.kind if name == f"kill-{fault.kind}" else name
        return {
            "fault": {"kind": kind, "target": target(name, fault), "at_token": draw.at_token, "at_position": at_position, "fired": fault.fired,
                      "evidence": fault.evidence},
            "recovery": recovered, "outage": outage, "identical": load.identical(), "logits_identical": load.logits_identical(),
            "kv_identical": load.kv_identical(fault) if fault.resumed else None,
            "observed": {
                "epoch_before": before.epoch, "epoch_after": after.epoch, "history": after.history[len(before.history) :],
                "history_before": len(before.history), "history_after": len(after.history),
                "promises": {node: seen["promise"] for node, seen in after.nodes.items()},
                "silent": after.silent, "conflicts": load.conflicts(), "disagreed": self._disagreed(), "waves": len(load.waves),
                "died": observing.died(before, self._meant(name, fault, before)),
                "buffers": {node: seen["buffers"] for node, seen in after.nodes.items()},
                "descriptors": {node: [before.nodes[node]["descriptors"], seen["descriptors"]] for node, seen in after.nodes.items() if node in before.nodes},
                "arena": {node: [seen["arena_bytes"], seen["arena_bytes_max"]] for node, seen in after.nodes.items()},
                "counters": {counter: after.rose(before, counter) for counter in COUNTERS}, "watch": watch.document(),
                "resumed": [[one["run"], one["sequence"], one["resume_position"], one["prompt_tokens"], one["emitted"]] for one in fault.resumed["sequences"]]
                if fault.resumed else [],
            },
        }  # fmt: skip

    def _meant(self, name: str, fault: Fault, before: Snapshot) -> list[int]:
        """Processes whose end was the fault's own doing."""
        nodes = {"kill-node": [fault.node.name], "corrupt-replica": [fault.node.name], "ids-only": list(before.groups)}.get(name, [])
        woken = [process.pid for label, process in before.processes.items() if name == "pause-node" and label.split("#")[0] in fault.evidence["woken"]]
        daemons = {"restart-daemon": [fault.process.pid], "fill-arena": before.daemons}.get(name, [])
        killed = [fault.process.pid] if fault.process.popen.returncode == faults.SIGKILLED else []
        return [*(pid for node in nodes for pid in before.groups[node]), *woken, *daemons, *killed]

    def _disagreed(self) -> list[str]:
        """Sequences on which the ranks did not agree with the plan after it was carried out."""
        runs = {wave.run for wave in self.load.waves}
        return [json.dumps(mark) for mark in self.client.marks.get("disagreed", []) if mark.get("run") in runs]


def target(name: str, fault: Fault) -> str:
    if name in ("pause-rank", "pause-briefly", "corrupt-frame"):
        return f"0.{fault.stage}.0"
    if name == "ids-only":
        return "all nodes"
    if name in ("cut-link", "slow-link"):
        return f"link to {fault.node.name}"
    return fault.node.name if name in ("fill-arena", "restart-daemon", "pause-node", "corrupt-replica") else fault.target


# ---- the process ------------------------------------------------------------------------------------------------------------------


def say(event: dict) -> None:
    print(json.dumps(event), flush=True)


def obey(command: dict, cluster: Cluster | None) -> Cluster | None:
    """One command; the cluster from now on."""
    if command["do"] == "start":
        assert cluster is None, "started twice"
        options = demo.Options(stages=command["stages"], model=command.get("model"), kill="none")
        cluster = Cluster(demo.model_directory(options), command["stages"], command["sequences"], command["max_tokens"])
        try:
            cluster.start()
        except BaseException:
            cluster.close(keep_logs=True)
            raise
        say({"event": "started", "logs": str(cluster.root / "logs"), "nodes": [node.name for node in cluster.world.nodes]})
    elif command["do"] == "strike":
        draw = Draw(command["stage"], command["at_token"], command["sampled"], command["share"])
        say(cluster.strike(command["name"], command["seed"], draw))
    return cluster


def main() -> int:
    signal.signal(signal.SIGTERM, demo.stopped)
    cluster, failed = None, False
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "quit":
                break
            cluster = obey(command, cluster)
    except KvguardError as error:
        failed = True
        logs = f" (logs: {cluster.root / 'logs'})" if cluster else ""
        say({"event": "error", "message": f"{error}{logs}", "code": error.exit_code})
        return error.exit_code
    except Exception:
        failed = True
        raise
    finally:
        if cluster is not None:
            cluster.close(keep_logs=failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
