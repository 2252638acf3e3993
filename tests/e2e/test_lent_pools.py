"""Pools whose memory the node's daemon made: an engine is killed, who takes its rank goes on in the same memory. Without a GPU, rehearsed in host memory."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


@pytest.fixture(params=["host", "rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def lending(request, cluster, monkeypatch):
    """A cluster whose engines borrow their pools."""
    monkeypatch.setenv("ENGINE_DEVICE", request.param)
    monkeypatch.setenv("ENGINE_BORROWS", "1")
    (cluster.directory / "conf.d").mkdir()
    (cluster.directory / "conf.d" / "gpu.toml").write_text(f'[node]\ndevice = "{request.param}"\nring_bytes = {1 << 20}\n')
    cluster.configure_coordinator(suspect_ms=10_000, dead_ms=30_000)
    cluster.start()
    return cluster, request.param


def adopted_by_a_standby(cluster, engine, lengths: dict[str, int]):
    """The engine is killed; the standby that has its rank now."""
    standby = cluster.engine("standby", "a", RANK)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    engine.kill()
    assert standby.hear(30.0) == {"claimed": True, "adopted": True, "lengths": lengths}
    assert standby.tell("intact")["wrong"] == [] and standby.tell("unsaid")["as_it_was"]
    return standby


def replica_is_the_pool(cluster, engine) -> bool:
    return engine.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]


def test_who_takes_a_dead_engine_s_rank_goes_on_in_its_memory_twice(lending):
    cluster, device = lending
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected(RANK, 45)
    second = adopted_by_a_standby(cluster, engine, {"one": 40, "two": 5})
    if device != "host":
        cluster.until("its ring", lambda: second.tell("counts")["joined"])
    for _ in range(5):
        second.tell("step", commits=[["one", 2], ["three", 1]])
    cluster.protected(RANK, 60)
    if device != "host":
        counts = second.tell("counts")
        assert counts["joined"] and counts["packed"] >= 5 and not counts["lost"]
    third = adopted_by_a_standby(cluster, second, {"one": 50, "three": 5, "two": 5})
    third.tell("step", commits=[["two", 3]])
    cluster.protected(RANK, 63)
    assert replica_is_the_pool(cluster, third)


def test_a_daemon_that_comes_again_hands_the_memory_on_as_well(lending):
    cluster, _ = lending
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    cluster.kill("a")  # who made the memory is gone, and it is still there
    engine.tell("step", commits=[["one", 5]])
    cluster.start("a")
    cluster.protected(RANK, 25)
    second = adopted_by_a_standby(cluster, engine, {"one": 25})
    second.tell("step", commits=[["one", 1]])
    cluster.protected(RANK, 26)
    assert replica_is_the_pool(cluster, second)


def test_an_engine_that_is_started_again_goes_on_in_its_former_life_s_memory(lending):
    cluster, _ = lending
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 30], ["two", 7]])
    cluster.protected(RANK, 37)
    engine.kill()
    again = cluster.engine("standby", "a", RANK)  # nobody was there when it died
    assert again.hear(30.0) == {"claimed": True, "adopted": True, "lengths": {"one": 30, "two": 7}}
    assert again.tell("intact")["wrong"] == [] and again.tell("unsaid")["as_it_was"]
    again.tell("step", commits=[["two", 4]])
    cluster.protected(RANK, 41)
    assert replica_is_the_pool(cluster, again)
