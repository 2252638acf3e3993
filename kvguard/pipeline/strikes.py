"""What drills do to the reference engine's cluster: one function per fault. Each fires it, proves it, mends it, and says what it saw.

Knows: processes, signals, gates, the damaging verbs of daemons that allow it. Must not know: what a drill expects, which invariant that would prove.
Invariants: `fired` is concluded from evidence that the fault itself left (an exit status, a state that the kernel tells, a counter, a broken checksum),
never from having asked for it; only processes that this world started are signalled; every function leaves the cluster able to become whole again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvguard.errors import KvguardError
from kvguard.pipeline import demo, faults
from kvguard.pipeline.client import Client
from kvguard.pipeline.faults import SIGKILLED, Fault
from kvguard.pipeline.load import Load
from kvguard.pipeline.observing import Watch, stopped
from kvguard.pipeline.world import INSTANCE, Node, Process, World

PATIENCE_S = 300.0  # a bound, not a target
TOKENS_MEANWHILE = 5  # a fault of kvguard's own lasts at least so many tokens
SMALL_ARENA_BYTES = 1 << 20
BALLAST, BALLAST_PROMPTS, BALLAST_IDS = "ballast", 12, 256


@dataclass(frozen=True)
class Draw:
    """What a drill's seed stands for. `share`: from 0 to 1, for whatever a fault has to choose; `sampled`: a seed of the sampler, null for greedy."""

    stage: int
    at_token: int
    sampled: int | None
    share: float


@dataclass
class Bench:
    """A world under load, about to be struck."""

    world: World
    client: Client
    load: Load
    watch: Watch
    draw: Draw
    hang_ms: int

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        """The load goes on and the status is sampled meanwhile."""

        def looked() -> object:
            self.watch.look()
            return condition()

        self.load.wait(what, looked, timeout_s)

    def supervised(self, what: str, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        """wait(); what ends meanwhile is started again, as a fleet's supervisor would."""

        def watched() -> object:
            self.world.replenish(self.client.endpoints)
            return condition()

        self.wait(what, watched, timeout_s)

    def aim(self, kind: str) -> Fault:
        return faults.aim(self.world, self.client, kind, self.draw.stage)

    def wait_for_tokens(self) -> None:
        enough = len(self.client.arrivals) + TOKENS_MEANWHILE
        self.wait(f"{TOKENS_MEANWHILE} tokens meanwhile", lambda: len(self.client.arrivals) >= enough)

    def wait_protected(self, what: str) -> None:
        self.wait(f"{what}, everything protected", lambda: faults.protected(self.world))

    def counted(self, fault: Fault) -> Fault:
        """The outage is over: how long it was, how many tokens came."""
        now_ns = time.monotonic_ns()
        fault.down_ms = (now_ns - fault.struck_ns) / 1e6
        fault.tokens_meanwhile = sum(fault.struck_ns < t_ns < now_ns for t_ns, _ in self.client.arrivals)
        return fault

    def stats(self, node: Node) -> dict:
        return self.world.query(node, "stats", {})


# ---- deaths -----------------------------------------------------------------------------------------------------------------------


def kill(kind: str) -> Callable[[Bench], Fault]:
    """SIGKILL to a rank or to a node; a recovery follows."""

    def struck(bench: Bench) -> Fault:
        fault = bench.aim(kind)
        faults.strike(bench.world, bench.client, fault)
        faults.resumption(bench.client, fault, bench.wait, PATIENCE_S)
        return fault

    return struck


def kill_driver(bench: Bench) -> Fault:
    fault = bench.aim("driver")
    faults.strike(bench.world, bench.client, fault)
    bench.client.disconnect()
    fault.resumed = bench.client.connect("resumed")
    return fault


def kill_all(bench: Bench) -> Fault:
    """Every node at once: all pools and all replicas are gone, what is left are the ids that the emitter has."""
    fault, world = bench.aim("node"), bench.world
    doomed = [process for node in world.nodes for process in node.processes() if process.alive()]
    fault.struck_ns = time.monotonic_ns()
    for node in world.nodes:
        world.kill_node(node)
    fault.evidence = {"waitpid": {process.name: process.popen.returncode for process in doomed}}
    fault.fired = bool(doomed) and all(process.popen.returncode == SIGKILLED for process in doomed)
    world.replenish(bench.client.endpoints)
    faults.resumption(bench.client, fault, bench.wait, PATIENCE_S)
    return fault


# ---- pauses -----------------------------------------------------------------------------------------------------------------------


def _stop(bench: Bench, fault: Fault, processes: list[Process]) -> None:
    """SIGSTOP, until the kernel says of each that it is stopped."""
    fault.struck_ns = time.monotonic_ns()
    for process in processes:
        process.popen.send_signal(signal.SIGSTOP)
    bench.wait("the processes stopped", lambda: all(stopped(process.pid) for process in processes), 10.0)
    fault.evidence["stopped"] = [process.name for process in processes]


def pause_rank(bench: Bench) -> Fault:
    """Stopped beyond the threshold: its daemon kills it through its pidfd. Nobody here does."""
    fault = bench.aim("rank")
    _stop(bench, fault, [fault.process])
    bench.wait("the stopped rank's death", lambda: fault.process.popen.poll() is not None)
    fault.evidence["waitpid"] = fault.process.popen.returncode
    fault.fired = fault.process.popen.returncode == SIGKILLED
    faults.resumption(bench.client, fault, bench.wait, PATIENCE_S)
    return fault


def pause_briefly(bench: Bench) -> Fault:
    """Stopped for less than the threshold, and woken."""
    fault = bench.aim("rank")
    _stop(bench, fault, [fault.process])
    until_s = time.monotonic() + bench.hang_ms / 1e3 * (0.15 + 0.25 * bench.draw.share)
    bench.wait("the end of a short pause", lambda: time.monotonic() >= until_s)
    fault.evidence["arrivals_while_stopped"] = sum(t_ns > fault.struck_ns + 10**8 for t_ns, _ in bench.client.arrivals)
    still = stopped(fault.process.pid)
    fault.process.popen.send_signal(signal.SIGCONT)
    fault.fired = still
    bench.counted(fault)
    bench.wait_for_tokens()
    bench.wait_protected("the woken rank at work")
    return fault


def pause_node(bench: Bench) -> Fault:
    """The whole group, until another node has its ranks; then woken: a host that slept and doesn't know it."""
    fault, world = bench.aim("node"), bench.world
    sleeping = [process for process in fault.node.processes() if process.alive()]
    woken = [engine for engine in fault.node.engines if engine.endpoint in bench.client.endpoints]
    _stop(bench, fault, sleeping)
    try:
        faults.resumption(bench.client, fault, bench.wait, PATIENCE_S)
        fault.fired = all(stopped(process.pid) for process in sleeping)
    finally:
        os.killpg(world.group(fault.node), signal.SIGCONT)
    bench.wait("the woken ranks' end", lambda: all(engine.popen.poll() is not None for engine in woken))
    fault.evidence["woken"] = {engine.name: engine.popen.returncode for engine in woken}
    return fault


# ---- kvguard's own processes ------------------------------------------------------------------------------------------------------


def kill_daemon(bench: Bench) -> Fault:
    fault = bench.aim("daemon")
    faults.strike(bench.world, bench.client, fault)
    bench.wait_for_tokens()
    bench.world.start_daemon(fault.node)
    bench.wait_protected("the daemon back")
    return bench.counted(fault)


def _restart(bench: Bench, node: Node, **overrides) -> int:
    """SIGTERM and a new life, as an upgrade does; how the old one ended."""
    old = node.daemon
    old.popen.terminate()
    bench.wait(f"the end of {node.name}'s daemon", lambda: old.popen.poll() is not None, 20.0)
    bench.world.start_daemon(node, **overrides)
    return old.popen.returncode


def restart_daemon(bench: Bench) -> Fault:
    fault = bench.aim("daemon")
    fault.struck_ns = time.monotonic_ns()
    code = _restart(bench, fault.node)
    bench.wait_for_tokens()
    bench.wait_protected("the daemon back")
    new = fault.node.daemon
    fault.evidence |= {"waitpid": code, "pids": [fault.process.pid, new.pid]}
    fault.fired = code == 0 and new.pid != fault.process.pid and new.alive()
    return bench.counted(fault)


def kill_coordinator(bench: Bench) -> Fault:
    fault = bench.aim("coordinator")
    faults.strike(bench.world, bench.client, fault)
    bench.wait_for_tokens()
    bench.world.start_coordinator()
    bench.wait_protected("the coordinator back")
    return bench.counted(fault)


# ---- links ------------------------------------------------------------------------------------------------------------------------


def _cable(bench: Bench, kind: str) -> Fault:
    """The link from a stage's node to its holder."""
    holder = faults.holder_of(bench.world, bench.draw.stage)
    assert holder.gate is not None, "a world without cables"
    return Fault(kind, bench.draw.stage, holder, holder.daemon)


def cut_link(bench: Bench) -> Fault:
    fault, proxy = _cable(bench, "cut-link"), bench.world.proxy
    gate, before = fault.node.gate, dict(fault.node.gate.counters)
    fault.struck_ns = time.monotonic_ns()
    proxy.cut(gate)

    def rose(counter: str) -> int:
        return gate.counters[counter] - before.get(counter, 0)

    try:
        bench.wait("the sender's next attempt, and its word that nothing is protected", lambda: rose("connections_refused") and bench.watch.saw("unprotected"))
        bench.wait_for_tokens()
    finally:
        proxy.heal(gate)
    fault.evidence = {counter: rose(counter) for counter in ("connections_cut", "connections_refused")}
    fault.fired = all(fault.evidence.values())
    bench.wait_protected("the link back")
    return bench.counted(fault)


def slow_link(bench: Bench) -> Fault:
    """Far below the stream's rate: the lag grows and is seen; nothing is lost."""
    fault, proxy = _cable(bench, "slow-link"), bench.world.proxy
    gate, before = fault.node.gate, fault.node.gate.counters["bytes_delayed"]
    rate = int(2048 * 8**bench.draw.share)
    fault.struck_ns = time.monotonic_ns()
    proxy.slow(gate, rate)

    def delayed() -> int:
        return gate.counters["bytes_delayed"] - before

    try:
        bench.wait("bytes held up, and a lag in the status", lambda: delayed() and (bench.watch.lag_tokens_max or bench.watch.saw("unprotected")))
        bench.wait_for_tokens()
    finally:
        proxy.heal(gate)
    fault.evidence = {"bytes_delayed": delayed(), "bytes_per_s": rate}
    fault.fired = delayed() > 0
    bench.wait_protected("the link as fast as before")
    return bench.counted(fault)


# ---- memory and bytes -------------------------------------------------------------------------------------------------------------


def fill_arena(bench: Bench) -> Fault:
    """The holder comes back with an arena that is too small for what is there, and more comes."""
    world, client, small = bench.world, bench.client, []
    fault = _cable(bench, "fill-arena")
    fault.struck_ns = time.monotonic_ns()
    while (holder := faults.holder_of(world, bench.draw.stage)) not in small:  # one whose daemon is away for long is replaced: then the next is made small too
        small.append(holder)
        _restart(bench, holder, arena_bytes=SMALL_ARENA_BYTES)
        bench.wait("the daemon back", lambda: _heard(world, small[-1]))
    fault.node = holder
    client.begin(BALLAST, [demo.ids(BALLAST_IDS, 5 * n) for n in range(BALLAST_PROMPTS)], 1, None)
    bench.wait("the ballast in the pools", lambda: client.last("finished", BALLAST))
    bench.wait("sequences refused, and said to be", lambda: bench.stats(fault.node)["store"].get("refused") and bench.watch.saw("unprotected", "store full"))
    bench.wait_for_tokens()
    status = world.query(fault.node, "status", {})
    fault.evidence = {
        "refused": bench.stats(fault.node)["store"]["refused"], "arena_bytes": status["arena_bytes"], "arena_bytes_promised": status["arena_bytes_promised"],
        "arena_bytes_max": status["arena_bytes_max"],
    }  # fmt: skip
    fault.fired = fault.evidence["refused"] > 0
    client.release(BALLAST)
    for node in small:
        _restart(bench, node)
    bench.wait_protected("an arena that is large enough")
    return bench.counted(fault)


def _heard(world: World, node: Node) -> bool:
    """Whether the coordinator hears of it."""
    nodes = (world.status_or_none() or {"nodes": ()})["nodes"]
    return any(one["node"] == node.name and one["state"] == "alive" and one["heartbeat_age_ms"] < 1000 for one in nodes)


def corrupt_frame(bench: Bench) -> Fault:
    """One byte of one KV frame changes on its way."""
    world = bench.world
    node, engine = world.engine_at(bench.client.endpoints[bench.draw.stage])
    holder = faults.holder_of(world, bench.draw.stage)
    fault = Fault("corrupt-frame", bench.draw.stage, node, engine)
    sent, caught = bench.stats(node)["frames_corrupted"], bench.stats(holder)["checksum_failures"]
    fault.struck_ns = time.monotonic_ns()
    faults.arm_corrupt_frame(node, world)
    bench.wait("the damaged frame sent", lambda: bench.stats(node)["frames_corrupted"] > sent)
    bench.wait("the damaged frame caught", lambda: bench.stats(holder)["checksum_failures"] > caught, 20.0)
    fault.evidence = {"frames_corrupted": bench.stats(node)["frames_corrupted"] - sent, "checksum_failures": bench.stats(holder)["checksum_failures"] - caught}
    fault.fired = fault.evidence["frames_corrupted"] > 0
    bench.wait_for_tokens()
    bench.wait_protected("the frame sent again")
    return bench.counted(fault)


def corrupt_replica(bench: Bench) -> Fault:
    """Bytes of a replica change under their sum, in the memory of its holder; then the node whose pool it copies dies."""
    fault, world = bench.aim("node"), bench.world
    holder = faults.holder_of(world, bench.draw.stage)
    number = int(bench.draw.share * len(bench.load.prompts)) % len(bench.load.prompts)
    sequence = f"{bench.load.wave.run}-{number}"
    wanted = {"instance": INSTANCE, "rank": f"0.{bench.draw.stage}.0", "sequence": sequence}
    held = [one for one in world.query(holder, "replicas", wanted)["replicas"] if not one["released"]]
    if not held or not held[0]["positions"]:
        raise KvguardError(f"{holder.name} holds nothing of {sequence} that could be damaged. Try: again, later in the run")
    position = int(bench.draw.share * (held[0]["positions"] - 1))
    changed = faults.corrupt_replica(world, bench.draw.stage, sequence, position, bytes_only=True)
    verified = [one["verified"] for one in world.query(holder, "verify", wanted)["replicas"]]
    faults.strike(world, bench.client, fault)
    fault.evidence |= {"holder": holder.name, "sequence": number, "position": position, "changed": changed, "verified": verified}
    fault.fired = fault.fired and changed and False in verified
    faults.resumption(bench.client, fault, bench.supervised, PATIENCE_S)  # a standby that finds damage ends: where many ranks are lost none may be left
    fault.evidence["resumed_at"] = demo.positions(fault.resumed, len(bench.load.prompts))[number]
    return fault


STRIKES: dict[str, Callable[[Bench], Fault]] = {
    "kill-rank": kill("rank"), "kill-node": kill("node"), "pause-rank": pause_rank, "pause-node": pause_node, "pause-briefly": pause_briefly,
    "ids-only": kill_all, "kill-daemon": kill_daemon, "restart-daemon": restart_daemon, "kill-coordinator": kill_coordinator, "kill-driver": kill_driver,
    "cut-link": cut_link, "slow-link": slow_link, "fill-arena": fill_arena, "corrupt-frame": corrupt_frame, "corrupt-replica": corrupt_replica,
}  # fmt: skip
OUTAGES = ("pause-briefly", "kill-daemon", "restart-daemon", "kill-coordinator", "cut-link", "slow-link", "fill-arena", "corrupt-frame")  # raise no epoch
