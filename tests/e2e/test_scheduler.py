"""A scheduler beside the ranks, in real processes: what it has accepted survives a rank and an emitter; its own death costs nothing but its head start."""

from __future__ import annotations

import contextlib

import pytest

from kvguard import emitter

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


@contextlib.contextmanager
def emitting(cluster):
    made = emitter.connect("llama", cluster.coordinator_address)
    try:
        made.scheduled(1)
        made.welcome(20.0)
        yield made
    finally:
        made.close()


def held(cluster, ids):
    """`replicas show`, once the holder has so many ids of the scheduler's stream."""

    def found():
        code, shown = cluster.cli("replicas", "show", "one")
        return code == 0 and [one for one in shown["replicas"] if one["rank"] == "0.scheduler" and one["holder"] == "b" and one["ids"] == ids]

    return cluster.until(f"{ids} ids at the holder", found)


def schedulers(cluster):
    return [one["state"] for one in cluster.ask("coordinator", "status")["schedulers"]]


def epoch(cluster):
    [instance] = cluster.ask("coordinator", "status")["instances"]
    return instance["epoch"]


@contextlib.contextmanager
def started(cluster):
    """A rank, a scheduler, the emitter: 20 positions on the rank, protected; 25 ids at the scheduler, held elsewhere."""
    cluster.start()
    engine, lead = cluster.engine("rank", "a", RANK), cluster.engine("scheduler", "a", RANK)
    with emitting(cluster) as gateway:
        gateway.welcome(20.0)  # before the first sequence: a later emitter would have to be told of it
        engine.tell("step", commits=[["one", 20]])
        cluster.protected(RANK, 20)
        lead.tell("accept", sequence="one", length=20, ids=25)
        [shown] = held(cluster, 25)
        assert (shown["positions"], shown["bytes"]) == (0, 0)
        cluster.until("the scheduler protected", lambda: schedulers(cluster) == ["protected"])
        assert epoch(cluster) == 0
        yield engine, lead, gateway


def test_ids_ahead_of_a_killed_rank_come_back(cluster):
    with started(cluster) as (engine, lead, gateway):
        standby = cluster.engine("standby", "a", RANK)
        cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
        engine.kill()
        assert standby.hear(30.0)["lengths"] == {"one": 20}
        resumption = gateway.resume(20.0)
        [token] = resumption.tokens
        assert (token.sequence, token.position, token.rung) == ("one", 20, "pool")
        assert (token.prefix, token.tokens) == (tuple(range(20)), tuple(range(20, 25)))
        gateway.adopt(resumption)
        assert lead.tell("restore", timeout_s=20.0) == {"epoch": 1, "lengths": {"one": 20}}
        lead.tell("accept", sequence="one", length=20, ids=30)
        held(cluster, 30)


def test_a_killed_scheduler_costs_its_head_start_alone(cluster):
    with started(cluster) as (engine, lead, _):
        lead.kill()
        cluster.until("its death said", lambda: schedulers(cluster) == ["lost"])
        [said] = cluster.ask("coordinator", "status")["schedulers"]
        assert "died" in said["reason"] and "scheduler_died" in cluster.last_words()
        engine.tell("step", commits=[["one", 3]])  # the ranks notice nothing
        cluster.protected(RANK, 23)
        held(cluster, 25)
        assert schedulers(cluster) == ["lost"]
        second = cluster.engine("scheduler", "a", RANK)
        second.tell("accept", sequence="one", length=23, ids=27)
        held(cluster, 27)
        cluster.until("the new one alone", lambda: schedulers(cluster) == ["protected"])
        assert epoch(cluster) == 0 and second.tell("status")["fenced"] is False


def test_a_new_emitter_is_told_what_only_the_scheduler_knew(cluster):
    with started(cluster) as (engine, lead, gateway):
        lead.tell("accept", sequence="begun by no rank", length=0, ids=4)
        cluster.until("held", lambda: cluster.ask("coordinator", "status")["schedulers"][0]["acked_ids"] == 29)
        gateway.close()  # two that live would end each other in turn
        with emitting(cluster) as second:
            for process in (engine, lead):
                cluster.until("fenced", lambda process=process: process.tell("status")["fenced"])
                assert process.tell("restore", timeout_s=20.0)["epoch"] == 1
            tokens = {token.sequence: token for token in second.resume(20.0).tokens}
    assert (tokens["one"].position, tokens["one"].prefix + tokens["one"].tokens) == (20, tuple(range(25)))
    assert (tokens["begun by no rank"].position, tokens["begun by no rank"].tokens) == (0, tuple(range(4)))
    assert tokens["begun by no rank"].request == b"request"
