"""Deaths that are suspected before they are seen, in real processes: the round begins at the first sign, the pool is adopted after the death."""

from __future__ import annotations

import signal

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


def standbys(cluster):
    return sum(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"])


def standby(cluster):
    before = standbys(cluster)
    made = cluster.engine("standby", "a", RANK)
    cluster.until("the standby known", lambda: standbys(cluster) > before)
    return made


def resumed(cluster, claimed, epoch):
    said = claimed.hear(30.0)
    assert said == {"claimed": True, "adopted": True, "lengths": {"one": 40}} and claimed.tell("intact")["wrong"] == []
    cluster.until("the instance running", lambda: cluster.ask("coordinator", "status")["instances"][0]["state"] == "running")
    entry = cluster.ask("coordinator", "history")["history"][-1]
    assert (entry["epoch"], entry["error"], entry["rungs"]) == (epoch, "", {"one": "pool"}), entry
    return entry


def test_a_process_with_much_memory_is_suspected_before_it_is_gone(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    assert engine.tell("hold", mib=512) == {"held": 512}
    cluster.protected(RANK, 40)
    spare = standby(cluster)
    engine.kill()
    assert "suspected" in resumed(cluster, spare, 1)["reason"], "the round began before the death was seen"


def end_client_thread(engine) -> None:
    """Its answer may not come any more: the daemon is as quick."""
    engine.popen.stdin.write(b'{"do": "end_client_thread"}\n')
    engine.popen.stdin.flush()


def test_a_thread_that_ends_alone_costs_the_process_its_life_and_its_successor_is_watched_too(cluster):
    """Nothing else tells of it: the process runs on, its pidfd is silent, its line to the daemon open."""
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    cluster.protected(RANK, 40)
    first = standby(cluster)
    end_client_thread(engine)
    assert engine.popen.wait(20) == -signal.SIGKILL
    assert "suspected" in resumed(cluster, first, 1)["reason"]
    cluster.protected(RANK, 40)
    second = standby(cluster)
    end_client_thread(first)
    assert first.popen.wait(20) == -signal.SIGKILL
    assert "suspected" in resumed(cluster, second, 2)["reason"]


def test_a_process_that_ends_in_order_without_detach_is_dead_and_not_suspected(cluster):
    """Its end is seen once, by its pidfd, and nobody kills it; one that detaches leaves nothing to recover."""
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    cluster.protected(RANK, 40)
    spare = standby(cluster)
    engine.popen.stdin.close()
    assert engine.popen.wait(20) == 0
    assert "died: its process ended" in resumed(cluster, spare, 1)["reason"]
    log = (cluster.directory / "a.log").read_text()
    assert "suspected" not in log and "killed" not in log
    cluster.protected(RANK, 40)
    assert spare.tell("detach") == {"detached": True}
    cluster.until("nobody left", lambda: cluster.rank(RANK) is None)
    assert len(cluster.ask("coordinator", "history")["history"]) == 1 and cluster.ask("coordinator", "status")["instances"][0]["state"] == "running"
