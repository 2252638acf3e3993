"""A live cluster under a drill: what is refused, what would happen, and that exactly the named process is signalled, and always woken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvguard.daemon import whereabouts
from kvguard.drill import blows, cluster, documents, kept
from kvguard.drill.scenarios import SCENARIOS
from kvguard.errors import KvguardError, Refused, TimedOut


def status(**changes) -> dict:
    """Two nodes, a rank on each, a standby: whole."""
    spare = {"instance": "llama", "rank": "", "node": "n0", "holders": [], "state": "standby", "reason": "", "acked": 0}
    ranks = [{**spare, "rank": f"0.{pp}.0", "node": f"n{pp}", "holders": [f"n{1 - pp}"], "state": "protected"} for pp in (0, 1)]
    nodes = [{"node": f"n{n}", "state": "alive", "reason": "heartbeats", "heartbeat_age_ms": 50.0, "address": f"tcp://n{n}"} for n in (0, 1)]
    found = {"paused": False, "nodes": nodes, "instances": [{"instance": "llama", "epoch": 3, "state": "running", "reason": ""}], "ranks": [*ranks, spare]}
    return {**found, **changes}


class Cluster:
    """Answers as coordinator and daemons would; `statuses` one after the other, the last for ever."""

    def __init__(self, child: subprocess.Popen, statuses: list[dict], history: list[list[dict]] | None = None) -> None:
        self.statuses, self.histories, self.child = statuses, history or [[]], child
        self.processes = {**whereabouts.here(), "daemon": whereabouts.process(child.pid), "ranks": {"s": whereabouts.process(child.pid)}}

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
        if verb == "stats":
            return {"process": {**whereabouts.here(), **self.processes["daemon"]}}
        queue = self.statuses if verb == "status" else self.histories
        found = queue.pop(0) if len(queue) > 1 else queue[0]
        return found if verb == "status" else {"history": found}

    def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict:
        place = self.processes if name == "n1" else {**self.processes, "boot_id": "another machine"}
        killed = 1 if self.child.poll() is not None else 0
        if verb in ("replicas", "verify"):
            return {"replicas": [{"stream": name, "verified": True if verb == "verify" else None} for name in ("s", "s", "t")]}
        return {"processes": place, "hang_ms": 1000, "ranks": [{"instance": "llama", "rank": "0.1.0", "stream": "s"}], "epochs": {"llama": 4},
                "counters": {"processes_killed": killed}, "store": {"replicas_read_back": 2}}  # fmt: skip

    def stranger(self, name: str, address: str) -> str | None:
        return "refused"


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"paused": True}, "paused"),
        ({"instances": [{"instance": "llama", "epoch": 3, "state": "recovering", "reason": "fencing"}]}, "llama is recovering: fencing"),
        ({"ranks": []}, "no rank is attached"),
        ({"ranks": status()["ranks"][:2]}, "no standby"),
        ({"ranks": [{**rank, "state": "unprotected", "reason": "no other node"} for rank in status()["ranks"]]}, "unprotected: no other node"),
        ({"nodes": [{**node, "state": "suspect"} for node in status()["nodes"]]}, "n0 is suspect"),
        ({"nodes": [{**node, "heartbeat_age_ms": 9999.0} for node in status()["nodes"]]}, "last heard"),
    ],
)
def test_what_is_not_whole_is_not_struck(child, changes, said) -> None:
    assert cluster.not_whole(status()) == []
    with pytest.raises(Refused, match=said) as refused:
        cluster.demand_whole(Cluster(child, [status(**changes)]))
    assert refused.value.exit_code == 4 and "Try: " in str(refused.value)


@pytest.mark.parametrize("name", [name for name, one in SCENARIOS.items() if not one.live])
def test_what_is_not_for_live_clusters_is_refused_with_the_reason(child, name) -> None:
    with pytest.raises(Refused, match=f"{name} is not tried against a live cluster: .*Try: "):
        cluster.choose(Cluster(child, [status()]), SCENARIOS[name], 1, status())


def test_only_processes_of_this_machine_are_chosen(child) -> None:
    target = cluster.choose(Cluster(child, [status()]), SCENARIOS["kill-rank"], 1, status())
    assert (target.node, target.rank, target.pid) == ("n1", "0.1.0", child.pid)
    assert "1 standbys" in cluster.consequence(SCENARIOS["kill-rank"], target, status())
    elsewhere = Cluster(child, [status()])
    elsewhere.processes["pid_namespace"] = 0
    with pytest.raises(Refused, match="no process of this cluster is on this machine"):
        cluster.choose(elsewhere, SCENARIOS["kill-rank"], 1, status())


def test_a_number_that_is_another_process_by_now_is_not_signalled(child) -> None:
    reach = Cluster(child, [status()])
    reach.processes["ranks"]["s"]["began"] += 1
    target = cluster.choose(reach, SCENARIOS["kill-rank"], 1, status())
    with pytest.raises(Refused, match="is not rank 0.1.0 of llama"):
        cluster.strike(reach, SCENARIOS["kill-rank"], 1, target)
    assert child.poll() is None


def test_conditions_are_looked_at_once_more_before_the_strike(child) -> None:
    reach = Cluster(child, [status(), status(paused=True)])

    def confirmed(consequence: str) -> None:
        assert "gets SIGKILL" in consequence

    with pytest.raises(Refused, match="paused"):
        cluster.run(reach, SCENARIOS["kill-rank"], 1, 1, confirmed)
    assert child.poll() is None


def test_a_rank_is_killed_and_the_new_epoch_waited_for(child) -> None:
    risen = status(instances=[{"instance": "llama", "epoch": 4, "state": "running", "reason": ""}])
    told = {"instance": "llama", "epoch": 4, "reason": "its process ended", "error": "", "lost": {}, "positions": {"a": 7}, "rungs": {"a": "pool"},
            "timing_ms": {"detect": 1.0, "fence": 2.0, "plan": 3.0, "restore": 4.0, "total": 10.0}, "bytes_by_rung": {"pool": 0}}  # fmt: skip
    reach = Cluster(child, [status(), status(), status(), risen], [[], [told]])
    ((seed, seen),) = cluster.run(reach, SCENARIOS["kill-rank"], 8, 1, lambda consequence: None)
    assert child.wait(5) == -signal.SIGKILL and seed == 8
    assert seen["fault"]["fired"] and seen["fault"]["evidence"] == {"died": True} and seen["recovery"]["epoch"] == 4 and seen["recovery"]["rung"] == "pool"
    assert seen["observed"]["strangers"] == {"coordinator": "refused", "n0": "refused", "n1": "refused"}
    assert seen["observed"]["promises"] == {"n0": 4, "n1": 4} and (seen["observed"]["epoch_before"], seen["observed"]["epoch_after"]) == (3, 4)


def test_the_coordinator_hears_what_became_of_a_drill() -> None:
    told = []

    class Hears:
        def coordinator(self, verb: str, arguments: dict) -> dict:
            told.append((verb, arguments))
            return {"noted": arguments["name"]}

    cluster.tell(Hears(), {"name": "kill-rank", "failed": 1, "started": "2026-05-04T03:02:01.005+00:00"})
    assert told == [("drilled", {"name": "kill-rank", "passed": False, "at_s": 1777863721.005})]


def test_what_was_stopped_is_woken_also_when_the_drill_is_aborted(child) -> None:
    risen = status(instances=[{"instance": "llama", "epoch": 4, "state": "running", "reason": ""}])
    with pytest.raises(Refused, match="aborted, and the process woken"):
        cluster.run(Cluster(child, [status(), status(), risen]), SCENARIOS["pause-briefly"], 1, 1, lambda consequence: None)
    assert child.poll() is None and not stopped(child.pid)
    ((_, seen),) = cluster.run(Cluster(child, [status()]), SCENARIOS["pause-briefly"], 1, 1, lambda consequence: None)
    assert seen["fault"]["evidence"] == {"stopped": True} and seen["recovery"] is None and not stopped(child.pid)


def stopped(pid: int) -> bool:
    return blows.state(pid) == "T"


RISEN = status(instances=[{"instance": "llama", "epoch": 4, "state": "running", "reason": ""}])
TOLD = {"instance": "llama", "epoch": 4, "reason": "hung", "error": "", "lost": {}, "positions": {"a": 7}, "rungs": {"a": "pool"},
        "timing_ms": {"detect": 1.0, "fence": 2.0, "plan": 3.0, "restore": 4.0, "total": 10.0}, "bytes_by_rung": {"pool": 0}}  # fmt: skip


class Killing(Cluster):
    """Its daemon kills what stands still, once it was seen so; what it brings about meanwhile names the instance."""

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
        if verb == "status" and stopped(self.child.pid):
            self.child.kill()
            self.child.wait()
            return status(instances=[{"instance": "llama", "epoch": 3, "state": "recovering", "reason": "hung"}])
        return super().coordinator(verb, arguments)


def test_a_rank_that_stands_still_is_killed_by_its_daemon_and_by_nobody_else(child) -> None:
    reach = Killing(child, [status(), status(), RISEN], [[], [TOLD]])
    ((_, seen),) = cluster.run(reach, SCENARIOS["pause-rank"], 1, 1, lambda consequence: None)
    assert child.returncode == -signal.SIGKILL and seen["fault"]["evidence"] == {"stopped": True, "died": True} and seen["fault"]["fired"]
    run = documents.judged(SCENARIOS["pause-rank"], 1, "cluster", seen)
    assert run["passed"] and run["invariants"]["I10"] == "held" and seen["observed"]["counters"] == {"processes_killed": 1}


def test_a_long_pause_ends_when_the_cluster_loses_what_it_needs(child) -> None:
    alone = status(ranks=status()["ranks"][:2])
    with pytest.raises(Refused, match="aborted, and the process woken: llama has no standby"):
        cluster.run(Cluster(child, [status(), status(), alone]), SCENARIOS["pause-rank"], 1, 1, lambda consequence: None)
    assert child.poll() is None and not stopped(child.pid)


def test_the_coordinator_is_killed_and_another_process_waited_for(child) -> None:
    class Restarted(Cluster):
        def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
            if verb == "stats" and self.child.poll() is not None:
                return {"process": {**whereabouts.here(), **whereabouts.process(os.getpid())}}
            return super().coordinator(verb, arguments)

    asked = []
    ((_, seen),) = cluster.run(Restarted(child, [status()]), SCENARIOS["kill-coordinator"], 1, 1, asked.append)
    assert "the coordinator (process" in asked[0] and "start it again yourself" in asked[0]
    assert child.wait(5) == -signal.SIGKILL and seen["fault"]["evidence"] == {"died": True} and seen["recovery"] is None
    assert documents.judged(SCENARIOS["kill-coordinator"], 1, "cluster", seen)["passed"]


def test_a_daemon_is_restarted_by_its_service_manager_or_not_at_all(child, monkeypatch, tmp_path) -> None:
    reach = Cluster(child, [status()])
    with pytest.raises(Refused, match="no daemon here is a service of systemd's"):
        cluster.choose(reach, SCENARIOS["restart-daemon"], 1, status())

    class Renewed(Cluster):
        def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict:
            if self.child.poll() is not None:
                self.processes["daemon"] = whereabouts.process(os.getpid())
            return super().node(name, address, verb, arguments)

    called = tmp_path / "systemctl"
    called.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\nkill {child.pid}\n")
    called.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(blows, "service_of", lambda pid: ("--user", "kvguard-node.service"))
    ((_, seen),) = cluster.run(Renewed(child, [status()]), SCENARIOS["restart-daemon"], 1, 1, lambda consequence: None)
    assert (tmp_path / "asked").read_text() == "--user restart kvguard-node.service\n"
    run = documents.judged(SCENARIOS["restart-daemon"], 1, "cluster", seen)
    assert child.wait(5) == -signal.SIGTERM and seen["fault"]["fired"] and run["passed"] and run["invariants"]["I11"] == "held"
    assert seen["observed"]["kept"] == {"promised": True, "replicas": 2, "read_back": 2, "unreadable": 0, "unsound": 0, "verified": True}
    called.write_text("#!/bin/sh\necho not permitted >&2\nexit 4\n")
    with pytest.raises(KvguardError, match="ended with 4: not permitted"):
        blows.restart(blows.Target("", "", "n1", "", child.pid, 1, 1000), -1)


def test_a_drill_is_no_failure_because_reading_takes_longer_than_an_answer_is_waited_for() -> None:
    def ask(verb: str) -> dict:
        if verb == "verify":
            raise TimedOut("no answer within 5 s. Try: a longer --timeout")
        return {"replicas": [{"stream": "s"}], "store": {"replicas_read_back": 1}}

    found = kept.found(ask, kept.held(ask, True))
    assert found["read_back"] == 1 and found["verified"] is None and found["unread"] == "no answer within 5 s. Try: a longer --timeout"


def test_what_nobody_promised_is_not_read() -> None:
    for before in ({"promised": False, "replicas": 1}, {"promised": True, "replicas": 0}):
        asked: list[str] = []
        kept.found(lambda verb, asked=asked: asked.append(verb) or {"store": {}}, before)
        assert asked == ["stats"]


def test_only_the_main_process_of_a_unit_is_a_service(child, monkeypatch, tmp_path) -> None:
    """Whoever runs these tests is in some unit, or in none; in neither is this child the main process."""
    assert blows.service_of(child.pid) == () and blows.service_of(2**22 + 1) == ()
