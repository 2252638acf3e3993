"""A node's key and the coordinator's are rotated while an engine streams: nothing that was protected is lost, nobody recovers, and the old key is worth nothing."""

from __future__ import annotations

import signal
import threading

import pytest
from test_keys import with_keys

from kvguard.cli import main
from kvguard.cli.asking import Reach
from kvguard.errors import KvguardError, NotAuthorised, Refused, TimedOut, Unreachable
from kvguard.transport import keys as keyring
from kvguard.transport.ask import ask

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


class Rotated:
    """A cluster with keys, its files, and what an operator of node b asks with."""

    def __init__(self, cluster) -> None:
        self.cluster = cluster
        with_keys(cluster)

    def file(self, name: str):
        return self.cluster.directory / f"{name}.key"

    def ask(self, name: str, verb: str, keys=None) -> dict:
        cluster = self.cluster
        address = cluster.coordinator_address if name == "coordinator" else cluster.addresses[name]
        return ask(address, verb, {}, 5.0, keys or keyring.load(self.file("b")), node=name)

    def verb(self, *arguments: str, code: int = 0) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["keys", "rotate", *arguments])
        assert ended.value.code == code

    def finish(self, name: str, code: int = 0) -> None:
        self.verb(str(self.file(name)), "--finish", "--yes", "--coordinator", self.cluster.coordinator_address, code=code)

    def reload(self, name: str) -> None:
        """SIGHUP, and the daemon's word that it has read its keys again."""
        log = self.cluster.directory / f"{name}.log"
        said = log.read_text().count("keys read again")
        self.cluster.running[name].send_signal(signal.SIGHUP)
        self.cluster.until(f"{name} reads its keys again", lambda: log.read_text().count("keys read again") > said)

    def rank(self) -> dict:
        ranks = [rank for rank in self.ask("coordinator", "status")["ranks"] if rank["rank"] == RANK]
        return ranks[0] if ranks else {"state": "unknown", "acked": 0, "committed": 0}

    def moved_on(self) -> None:
        """Protected again, at a position that was not there before this call."""
        now = self.rank()["committed"]
        self.cluster.until("streaming goes on, protected", lambda: (one := self.rank())["state"] == "protected" and one["acked"] > now)


def steps(engine, over: threading.Event, failed: list) -> None:
    """The load: one position after the other."""
    try:
        while not over.wait(0.01):  # the pace of an engine, and slow enough that its pool outlasts the test
            engine.tell("step", commits=[["one", 1]])
    except Exception as error:  # noqa: BLE001 - a thread's end is the test's to judge
        failed.append(error)


@pytest.mark.parametrize("whose", ["a", "coordinator"])
def test_a_key_is_rotated_under_load(cluster, whose):
    rotated, others = Rotated(cluster), [name for name in ("coordinator", *cluster.addresses) if name != whose]
    cluster.start()
    cluster.until("all nodes are known", lambda: len(rotated.ask("coordinator", "status")["nodes"]) == 2)
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 20]])
    cluster.until("protected", lambda: rotated.rank()["state"] == "protected" and rotated.rank()["acked"] >= 20)
    old = keyring.load(rotated.file(whose))
    over, failed = threading.Event(), []
    load = threading.Thread(target=steps, args=(engine, over, failed))
    load.start()
    try:
        rotated.verb(str(rotated.file(whose)))
        new = keyring.load(rotated.file(whose)).coming[1].decode()
        for name in others:
            rotated.verb(str(rotated.file(name)), "--allow", f"{whose}={new}")
            rotated.reload(name)
        cluster.until("the load is held as well", lambda: rotated.rank()["acked"] > 20)
        held = rotated.rank()["acked"]
        for name in others:  # whose key it is doesn't use the new one yet: it would be locked out
            rotated.finish(name, code=Refused.exit_code)
        rotated.verb(str(rotated.file(whose)), "--switch")
        rotated.reload(whose)
        rotated.moved_on()
        for name in (whose, *others):
            rotated.finish(name)
            rotated.reload(name)
        rotated.moved_on()
    finally:
        over.set()
        load.join(30.0)
    assert not failed and not load.is_alive()
    end = engine.tell("sums")["sums"]
    assert len(end["one"]) > held > 20
    cluster.until("the replica is the pool, byte for byte", lambda: rotated.ask("b", "sums")["sums"] == end)
    assert rotated.ask("coordinator", "history")["history"] == [] and rotated.rank()["state"] == "protected", "nobody recovered"
    log = (cluster.directory / "b.log").read_text()
    assert "dropped" not in log, "no replica was dropped"

    known = keyring.load(rotated.file("b"))
    former = keyring.Keys(old.secret, old.public, known.allowed)
    with pytest.raises((NotAuthorised, Unreachable, TimedOut)):
        rotated.ask("b", "sums", former)
    asked = keyring.Keys(known.secret, known.public, {**known.allowed, whose: old.public})
    with pytest.raises((NotAuthorised, Unreachable, TimedOut)):
        rotated.ask(whose, "status", asked)
    assert rotated.ask("b", "stats")["transport"]["key_refused"] > 0


def test_a_stranger_as_drills_send_one(cluster):
    """What I10 is judged by, on a cluster with keys."""
    rotated = Rotated(cluster)
    cluster.start()
    cluster.until("all nodes are known", lambda: len(rotated.ask("coordinator", "status")["nodes"]) == 2)
    reach = Reach(cluster.coordinator_address, str(rotated.file("b")), False, 5.0)
    assert reach.stranger("coordinator", "") == reach.stranger("a", cluster.addresses["a"]) == "refused"
    assert Reach(cluster.coordinator_address, "", False, 5.0).stranger("coordinator", "") is None


def test_a_broken_key_file_changes_nothing(cluster):
    rotated = Rotated(cluster)
    cluster.start()
    cluster.until("all nodes are known", lambda: len(rotated.ask("coordinator", "status")["nodes"]) == 2)
    sound = keyring.load(rotated.file("b"))
    rotated.file("a").write_text("rubbish\n")
    cluster.running["a"].send_signal(signal.SIGHUP)
    cluster.until("it says what is wrong", lambda: "the configuration stays as it was" in (cluster.directory / "a.log").read_text())
    assert rotated.ask("a", "status", sound)["node"] == "a"


def test_a_peer_that_is_not_listed_ends_no_daemon_and_is_found_once_it_is(cluster):
    rotated = Rotated(cluster)
    text = rotated.file("a").read_text()
    rotated.file("a").write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("allow b ")))
    cluster.start()
    cluster.until("all nodes are known", lambda: len(rotated.ask("coordinator", "status")["nodes"]) == 2)
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 20]])
    cluster.until("what is missing is said", lambda: "no key is listed for 'peer:b'" in (cluster.directory / "a.log").read_text())
    with pytest.raises(KvguardError):
        rotated.ask("a", "status")
    rotated.file("a").write_text(text)
    rotated.reload("a")
    cluster.until("protected", lambda: rotated.rank()["state"] == "protected" and rotated.rank()["acked"] == 20)
