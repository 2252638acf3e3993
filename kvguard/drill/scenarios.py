"""What each drill does, what it claims beforehand, and what its seed stands for.

Knows: names, hypotheses, which outcome each would prove. Must not know: how a fault is fired, processes, clocks.
Invariants: a drill is drawn from its name and seed alone; a hypothesis is written down before anything is struck.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvguard.errors import KvguardError
from kvguard.types import Rung

RECOVERY, OUTAGE = "recovery", "outage"  # an epoch is raised and the run resumed; none is
MARGIN_TOKENS = 12  # a fault strikes so long before the end of a wave, at least
FIRST_TOKEN = 4  # and after so many tokens: prompts are protected by then


class UnknownDrill(KvguardError):
    exit_code = 2


@dataclass(frozen=True)
class Scenario:
    """`rungs`: where KV may come back from. `rolled_back_max`: positions that may be lost of it, None where it is only counted. `proves`: invariants that must
    be found held. `live`: can be tried against an operator's own cluster.
    """

    name: str
    does: str
    hypothesis: str
    outcome: str
    proves: tuple[str, ...]
    rungs: tuple[str, ...] = ()
    rolled_back_max: int | None = None
    live: bool = False


ALWAYS = ("I4", "I6", "I7", "I8", "I9")
FAILOVER = ("I1", "I2", "I3", *ALWAYS)
BYSTANDER = ("I3", "I5", *ALWAYS)

SCENARIOS: dict[str, Scenario] = {one.name: one for one in (
    Scenario("kill-rank", "SIGKILL to an engine rank", "The rank's pool outlives it: a standby adopts it and not one position is lost.", RECOVERY, FAILOVER,
             (Rung.POOL,), 0, live=True),
    Scenario("kill-node", "SIGKILL to a node's whole process group, its memory gone", "The rank is rebuilt from its replica on another node; what was not yet "
             "acknowledged is recomputed.", RECOVERY, FAILOVER, (Rung.REPLICA,)),
    Scenario("pause-rank", "SIGSTOP to a rank for longer than the hang threshold", "The daemon finds the hang, kills the rank through its pidfd and only then "
             "is it replaced.", RECOVERY, FAILOVER, (Rung.POOL,), 0, live=True),
    Scenario("pause-node", "SIGSTOP to a node's whole group for longer than the threshold, then SIGCONT", "Another node takes over; the woken ranks find "
             "themselves fenced, emit nothing and end.", RECOVERY, FAILOVER, (Rung.REPLICA,)),
    Scenario("pause-briefly", "SIGSTOP to a rank for less than the threshold, then SIGCONT", "Nobody fails over: the epoch stays, the run goes on.", OUTAGE,
             ("I3", *ALWAYS), live=True),
    Scenario("ids-only", "SIGKILL to every node at once", "All pools and replicas are gone; the ids alone bring every sequence back, recomputed.", RECOVERY,
             FAILOVER, (Rung.TOKENS,)),
    Scenario("kill-daemon", "SIGKILL to a node daemon, restarted after some tokens", "The engine doesn't notice; it is said to be unprotected meanwhile and "
             "protected again after; no epoch is raised.", OUTAGE, (*BYSTANDER, "I11"), live=True),
    Scenario("restart-daemon", "SIGTERM to a node daemon and a new life of it, as in an upgrade", "The engine doesn't notice; everything is protected again; "
             "no epoch is raised.", OUTAGE, (*BYSTANDER, "I11"), live=True),
    Scenario("kill-coordinator", "SIGKILL to the coordinator, restarted after some tokens", "Serving and replication go on without it; it comes back with its "
             "epochs and its history.", OUTAGE, (*BYSTANDER, "I11"), live=True),
    Scenario("kill-driver", "SIGKILL to the driver, the only emitter", "Ids, sampler state and requests come from the holders; the KV never left the pools.",
             RECOVERY, FAILOVER, (Rung.POOL,), 0),
    Scenario("cut-link", "The cable to a holder is cut, and joined again", "It is said to be unprotected, nobody fails over, and the replica catches up.",
             OUTAGE, BYSTANDER),
    Scenario("slow-link", "The cable to a holder passes a fraction of the stream's rate", "The lag is seen and costs no memory; the replica catches up.",
             OUTAGE, BYSTANDER),
    Scenario("fill-arena", "A holder's arena is too small for what is to be held", "Whole sequences are refused and said to be; the engine doesn't notice; "
             "with room again all are protected.", OUTAGE, BYSTANDER),
    Scenario("corrupt-frame", "One byte of a KV frame changes on the wire", "The checksum finds it before anything is applied; the frame is sent again.",
             OUTAGE, BYSTANDER),
    Scenario("corrupt-replica", "Bytes of a replica change under their sum, then the node of the pool dies", "The sum tells before anything is resumed from "
             "it; the next rung of the ladder is taken.", RECOVERY, (*FAILOVER, "I11"), (Rung.REPLICA, Rung.TOKENS)),
)}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """`sampled`: the sampler's seed, None for greedy decoding. `share`: from 0 to 1, for whatever the fault has to choose."""

    stage: int
    at_token: int
    sampled: int | None
    share: float


def named(name: str) -> Scenario:
    """Raises UnknownDrill."""
    if name not in SCENARIOS:
        raise UnknownDrill(f"no drill is called {name!r}. Try: {', '.join(SCENARIOS)}, or all")
    return SCENARIOS[name]


def drawn(scenario: Scenario, seed: int, stages: int, max_tokens: int) -> Drawn:
    """What a seed stands for. One way of sampling beside greedy: each costs an undisturbed run of its own."""
    draw = random.Random(f"{scenario.name}/{seed}")
    at_token = draw.randrange(FIRST_TOKEN, max(FIRST_TOKEN + 1, max_tokens - MARGIN_TOKENS))
    return Drawn(draw.randrange(stages), at_token, 7 if draw.random() < 0.5 else None, draw.random())
