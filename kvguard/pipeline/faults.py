"""Faults fired at a world, proved, and mended as a fleet's supervisor would.

Knows: what a kill does to which process, where ranks live now. Must not know: how recovery works, comparisons.
Invariants: a fault counts as fired only if its process lived before and is dead of SIGKILL after; what died is started again, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvguard.errors import KvguardError
from kvguard.pipeline.client import Client
from kvguard.pipeline.world import INSTANCE, Node, Process, World

KILLS = ("rank", "node", "daemon", "coordinator", "driver", "none")
OUTAGE_TOKENS = 3  # an outage lasts until at least so many tokens came without the one that is away
SIGKILLED = -9


@dataclass
class Fault:
    """One kill: where it struck, when, and what was seen of it."""

    kind: str
    stage: int
    node: Node
    process: Process
    struck_ns: int = 0
    fired: bool = False
    resumed: dict | None = None  # the driver's event, for kinds that need a recovery
    down_ms: float = 0.0
    tokens_meanwhile: int = 0
    evidence: dict = field(default_factory=dict)  # what `fired` was concluded from

    @property
    def target(self) -> str:
        return {"rank": f"0.{self.stage}.0", "node": self.node.name, "daemon": self.node.name}.get(self.kind, self.kind)


def aim(world: World, client: Client, kind: str, stage: int) -> Fault:
    """The process that `kind` means: ranks move between nodes, so the stage is found by the endpoint that the driver uses."""
    node, engine = world.engine_at(client.endpoints[stage])
    processes = {"rank": engine, "node": node.daemon, "daemon": node.daemon, "coordinator": world.coordinator, "driver": world.driver}
    return Fault(kind, stage, node, processes[kind])


def strike(world: World, client: Client, fault: Fault) -> None:
    """Fires it."""
    was_alive = fault.process.alive()
    client.driver_may_end = fault.kind == "driver"
    fault.struck_ns = time.monotonic_ns()
    if fault.kind == "node":
        world.kill_node(fault.node)
    else:
        fault.process.kill()
    fault.evidence["waitpid"] = fault.process.popen.returncode
    fault.fired = was_alive and fault.process.popen.returncode == SIGKILLED


def resumption(client: Client, fault: Fault, wait: Callable, timeout_s: float = 90.0) -> None:
    """Waits until the driver goes on in a newer epoch than the fault struck in."""
    wait("the resumption", lambda: client.last("resumed") and client.last("resumed")["t_ns"] > fault.struck_ns, timeout_s)
    fault.resumed = client.last("resumed")


def mend(world: World, client: Client, fault: Fault, run: str) -> None:
    """Waits for the recovery where there is one, and starts again what died."""
    if fault.kind == "driver":
        client.disconnect()
        fault.resumed = client.connect("resumed")
    elif fault.kind in ("rank", "node"):
        resumption(client, fault, client.wait)
        world.replenish(client.endpoints)
    elif fault.kind in ("daemon", "coordinator"):
        _end_outage(world, client, fault, run)


def _end_outage(world: World, client: Client, fault: Fault, run: str) -> None:
    """The daemon or coordinator comes back after some tokens went by without it; over when everything is protected again."""
    enough = len(client.arrivals) + OUTAGE_TOKENS
    client.wait("tokens during the outage", lambda: len(client.arrivals) >= enough or client.last("finished", run), 60.0)
    if fault.kind == "daemon":
        world.start_daemon(fault.node)
    else:
        world.start_coordinator()
    client.wait(f"the {fault.kind} back, everything protected", lambda: protected(world), 60.0)
    back_ns = time.monotonic_ns()
    fault.down_ms = (back_ns - fault.struck_ns) / 1e6
    fault.tokens_meanwhile = sum(told == run and fault.struck_ns < t_ns < back_ns for t_ns, told in client.arrivals)


def protected(world: World) -> bool:
    """Every node alive, every rank there, and what it has replicated."""
    status = world.status_or_none()
    if status is None or len(status["nodes"]) < len(world.nodes):
        return False
    ranks = [rank for rank in status["ranks"] if rank["state"] != "standby"]
    return (
        all(node["state"] == "alive" for node in status["nodes"])
        and len(ranks) >= world.settings.stages
        and all(rank["state"] == "protected" or not rank["sequences"] for rank in ranks)
    )


def whole(world: World) -> bool:
    """Protected, and every spare process known: ready for the next fault."""
    if not protected(world):
        return False
    standbys = sum(rank["state"] == "standby" for rank in world.status()["ranks"])
    return standbys >= sum(len(node.engines) for node in world.nodes) - world.settings.stages


def holder_of(world: World, stage: int) -> Node:
    """Who holds a stage's replica now. Raises KvguardError where nobody does."""
    for rank in world.status()["ranks"]:
        if rank["rank"] == f"0.{stage}.0" and rank["holders"]:
            return world.node_named(rank["holders"][0])
    raise KvguardError(f"rank 0.{stage}.0 has no holder. Try: kvguard status")


def corrupt_replica(world: World, stage: int, sequence: str, position: int, bytes_only: bool = False) -> bool:
    """An acknowledged position of the replica changes. With its sum, so that no checksum can tell: the negative control; or `bytes_only`: the sum must tell."""
    arguments = {"instance": INSTANCE, "rank": f"0.{stage}.0", "sequence": sequence, "position": position, "bytes_only": bytes_only}
    return bool(world.query(holder_of(world, stage), "corrupt_replica", arguments)["changed"])


def totals(world: World) -> tuple[int, int]:
    """(acknowledged positions over all ranks, the instance's epoch)."""
    status = world.status()
    acked = sum(rank["acked"] for rank in status["ranks"])
    return acked, next((one["epoch"] for one in status["instances"] if one["instance"] == INSTANCE), 0)


def arm_corrupt_frame(node: Node, world: World) -> None:
    """The sender's next KV frame leaves with one byte changed."""
    world.query(node, "corrupt_frame", {})
