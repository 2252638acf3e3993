"""Before old keys go: whether those whose keys they are use their new ones. Who doesn't would be locked out.

Knows: key files' contents, whom to ask. Must not know: how keys are rotated (transport/rotating.py), options.
Invariant: "uses its newest key" is what a process proved in a handshake with that key alone; whoever can't be asked isn't taken to use it.
"""

from __future__ import annotations

from kvguard.cli.asking import Reach
from kvguard.errors import KvguardError
from kvguard.transport import rotating
from kvguard.transport.ask import ask
from kvguard.transport.keys import Keys


def unproved(reach: Reach, keys: Keys) -> list[str]:
    """Everybody whose older keys would go and who didn't prove that he uses the newest one, each with the reason. Raises as asking the coordinator does."""
    own, found = keys.own_name(), []
    names = sorted(rotating.superseded(keys))
    addresses = {"coordinator": reach.address}
    if set(names) - {own, "coordinator"}:
        addresses |= {node["node"]: node["address"] for node in reach.coordinator("status")["nodes"]}
    for name in names:
        if name == own:
            why = "" if keys.public == keys.of(own)[-1] else "this file's own pair is an older one"
        elif name not in addresses:
            why = "it listens nowhere, and can't be asked (drivers, gateways, operators)"
        else:
            why = _asked(reach, name, addresses[name], keys)
        found += [f"{name}: {why}"] if why else []
    return found


def _asked(reach: Reach, name: str, address: str, keys: Keys) -> str:
    """"" where `name` answers with its newest key; else what it does."""
    own = {keys.own_name(): keys.public} if keys.own_name() else {}
    for listed, otherwise in ((keys.of(name)[-1:], ""), (keys.of(name)[:-1], "it still uses an older key")):
        known = Keys(keys.secret, keys.public, {**own, name: listed[0]}, {name: listed[1:]} if listed[1:] else {})
        try:
            ask(address, "status", {}, reach.timeout_s, known, node=name, insecure=reach.insecure)
        except KvguardError as error:
            last = str(error).partition(" Try: ")[0]
        else:
            return otherwise
    return f"it answers with none of its keys: {last}"
