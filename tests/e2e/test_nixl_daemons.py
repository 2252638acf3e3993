"""Daemons whose payloads travel over NIXL: what the pool has, the replica has, status says over what; a peer without it, a holder that is killed or stopped."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest

from kvguard.transport.nixl_agent import PACKAGES

pytestmark = pytest.mark.e2e
RANK = "0.1.0"


@pytest.fixture
def over_nixl(cluster):
    """Both nodes, on this host: payloads by CMA, notes by TCP."""
    if not any(importlib.util.find_spec(package) for package in PACKAGES):
        assert not os.environ.get("KVGUARD_REQUIRE_ALL"), "nixl-cu12 isn't installed: tools/setup.sh test"
        pytest.skip("nixl-cu12 isn't installed. Try: tools/setup.sh test")
    for name in cluster.addresses:
        with open(cluster.directory / f"{name}.toml", "a") as file:
            file.write('transport = "nixl"\nnixl_devices = "lo"\nnixl_tls = "cma,tcp"\n')
    return cluster


def carrier(cluster, source: str = "a", target: str = "b") -> str | None:
    """What `kvguard status` says."""
    code, found = cluster.cli("status")
    assert code == 0
    return next(node for node in found["nodes"] if node["node"] == source)["carriers"].get(target)


def same(cluster, engine) -> bool:
    return engine.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]


def test_the_replica_equals_the_pool_and_status_says_over_what(over_nixl):
    over_nixl.start()
    engine = over_nixl.engine("rank", "a", RANK)
    engine.tell("step", commits=[["long", 100], ["short", 3]])
    for _ in range(30):
        engine.tell("step", commits=[["long", 1], ["short", 1]])
    over_nixl.protected(RANK, 130 + 33)
    assert same(over_nixl, engine)
    over_nixl.until("the carrier", lambda: carrier(over_nixl) == "nixl cma/memory")
    assert over_nixl.ask("b", "stats")["checksum_failures"] == 0


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_holder_that_is_killed_or_stopped_under_load(over_nixl, blow):
    over_nixl.start()
    engine = over_nixl.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 200]])
    over_nixl.protected(RANK, 200)
    if blow == signal.SIGKILL:
        over_nixl.kill("b")
    else:
        over_nixl.running["b"].send_signal(blow)
    for _ in range(20):  # the engine waits for nobody
        engine.tell("step", commits=[["one", 5]])
    over_nixl.until("the loss", lambda: over_nixl.rank(RANK)["state"] == "unprotected")
    if blow == signal.SIGKILL:
        over_nixl.start("b")
    else:
        over_nixl.running["b"].send_signal(signal.SIGCONT)
    over_nixl.protected(RANK, 300)
    assert same(over_nixl, engine)
    over_nixl.until("the carrier", lambda: carrier(over_nixl) == "nixl cma/memory")


def test_a_holder_without_nixl_is_served_over_tcp_and_the_log_says_so(over_nixl):
    file = over_nixl.directory / "b.toml"
    file.write_text(file.read_text().replace('transport = "nixl"', 'transport = "zeromq"'))
    over_nixl.start()
    engine = over_nixl.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 50]])
    over_nixl.protected(RANK, 50)
    assert same(over_nixl, engine)
    over_nixl.until("the carrier", lambda: carrier(over_nixl) == "tcp (not nixl: the peer has none)")
    assert "don't take nixl: the peer has none" in (over_nixl.directory / "a.log").read_text()
    assert over_nixl.ask("a", "stats")["transport"]["without_nixl"] == 1
