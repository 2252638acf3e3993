"""With keys: everything works as without, and who isn't listed reads, changes and learns nothing."""

from __future__ import annotations

import pytest

from kvguard.errors import NotAuthorised, TimedOut, Unreachable
from kvguard.transport import keys as keyring
from kvguard.transport.ask import ask

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


def with_keys(cluster):
    """A key file for each process, in which all others are listed."""
    made = {name: keyring.generate() for name in ("coordinator", *cluster.addresses)}
    listed = {name: pair.public for name, pair in made.items()}
    for name, pair in made.items():
        keyring.save(keyring.Keys(pair.secret, pair.public, listed), cluster.directory / f"{name}.key")
        file = cluster.directory / f"{name}.toml"
        file.write_text(file.read_text().replace('# keys = ""', f'keys = "{cluster.directory / name}.key"'))
    return keyring.load(cluster.directory / "a.key")


def test_a_cluster_with_keys(cluster):
    own = with_keys(cluster)
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 20]])

    def asked(name, verb):
        address = cluster.coordinator_address if name == "coordinator" else cluster.addresses[name]
        return ask(address, verb, {}, 5.0, own, node=name)

    def whole():
        return [rank for rank in asked("coordinator", "status")["ranks"] if rank["state"] == "protected" and rank["acked"] == 20]

    cluster.until("the rank protected", whole)
    assert asked("b", "sums")["sums"] == engine.tell("sums")["sums"]
    listed = keyring.Keys(own.secret, own.public, own.allowed)
    stranger = keyring.generate()
    for keys in (keyring.Keys(stranger.secret, stranger.public, listed.allowed), None):
        with pytest.raises((NotAuthorised, Unreachable, TimedOut)):
            ask(cluster.addresses["b"], "sums", {}, 2.0, keys, node="b")
    refused = asked("b", "stats")["transport"]
    assert any(refused.values()), refused
    engine.tell("step", commits=[["one", 1]])
    cluster.until("the next position", lambda: len(asked("b", "sums")["sums"]["one"]) == 21)
