"""Letting go: which replicas nobody will ask for again, and when a node is told.

Knows: the cast's nodes, what they list as held. Must not know: how a plan comes about.
"""

from __future__ import annotations

import msgspec

from kvguard.types import Rank, StreamId
from tests.core.cast import INSTANCE, Cast, Daemon, three_stages

R1 = Rank(0, 1, 0)
STREAM = StreamId(INSTANCE, R1, 1)


def lists_its_replicas(daemon: Daemon) -> None:
    """From now on its heartbeats say what it holds; what it is told to drop is gone."""
    plain = daemon.beat

    def beat():
        daemon.replicas = {stream: rows for stream, rows in daemon.replicas.items() if stream not in daemon.dropped}
        return msgspec.structs.replace(plain(), replicas=tuple((stream, len(rows), 0) for stream, rows in daemon.replicas.items()))

    daemon.beat = beat


def after_an_adoption() -> Cast:
    """The pool of rank 0.1.0 went to a standby on its own node, and beside it lies a replica of the same stream: one that an earlier round had sent back."""
    cast = three_stages()
    b = cast.daemons["b"]
    cast.say(b, b.kill_rank(R1))
    cast.run(500)
    assert len(cast.emitter.resumes) == 1 and b.ranks[R1]["stream"] == STREAM, "the stream goes on in the adopted pool"
    b.replicas[STREAM] = {"s": (0, 11)}
    for daemon in cast.daemons.values():
        lists_its_replicas(daemon)
    return cast


def test_a_replica_beside_its_own_pool_goes_and_the_holders_stays():
    cast = after_an_adoption()
    cast.run(300)
    assert list(cast.daemons["b"].replicas) == [StreamId(INSTANCE, Rank(0, 0, 0), 1)], "what b holds for another rank"
    assert cast.daemons["b"].dropped == [STREAM] and STREAM in cast.daemons["c"].replicas and not cast.daemons["c"].dropped


def test_a_replica_beside_its_own_pool_stays_while_the_rank_is_unprotected():
    """It may be all that is left of it should the pool go with its process."""
    cast = after_an_adoption()
    cast.daemons["b"].ranks[R1]["state"] = "unprotected"
    cast.run(300)
    assert STREAM in cast.daemons["b"].replicas
    cast.daemons["b"].ranks[R1]["state"] = "protected"
    cast.run(300)
    assert STREAM not in cast.daemons["b"].replicas
