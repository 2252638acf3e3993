"""How verbs reach the coordinator and the nodes: keys, one question at a time.

Knows: where a coordinator's address may be said: on the command line or in the environment, else in a configuration file; that answers have a form
(documents.py). Must not know: options (options.py), what is asked.
Invariant: what an answer lacks, or has of another kind, is an operating error that names it: who reads the document finds what it reads.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from kvguard.cli import copied
from kvguard.errors import BadConfig, KvguardError, NotAuthorised

PLACES = ("/etc/kvguard/node.toml", "/etc/kvguard/coordinator.toml")


class Reach(NamedTuple):
    """Whom to ask, and with which key file ("" for none). `insecure`: off loopback without keys."""

    address: str
    keys: str
    insecure: bool
    timeout_s: float

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
        return self.node("coordinator", self.address, verb, arguments)

    def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict:
        """The answer's document. Raises Unreachable, TimedOut, BadAnswer, or the operating error that the answer stands for."""
        from kvguard.cli import documents
        from kvguard.transport import keys as keyring
        from kvguard.transport.ask import ask

        loaded = keyring.load(self.keys) if self.keys else None
        return documents.understood(ask(address, verb, arguments or {}, self.timeout_s, loaded, node=name, insecure=self.insecure), name, address, verb)

    def stranger(self, name: str, address: str) -> str | None:
        """What becomes of somebody with a fresh key at `address` ("": the coordinator's): answered, refused, or why neither is known; None without keys."""
        from kvguard.transport import keys as keyring
        from kvguard.transport.ask import ask

        if not self.keys:
            return None
        known, unlisted = keyring.load(self.keys), keyring.generate()
        pair = keyring.Keys(unlisted.secret, unlisted.public, known.allowed, known.beside)
        try:
            ask(address or self.address, "status", {}, self.timeout_s, pair, node=name, insecure=self.insecure)
        except NotAuthorised:
            return "refused"
        except KvguardError as error:
            return str(error)
        return "answered"


def found(file: str | None, address: str | None, keys: str | None, insecure: bool) -> tuple[str, str, bool]:
    """The coordinator's address, the key file, whether keys may be missing. Raises BadConfig where no place says it."""
    if address and not _is_address(address):
        raise BadConfig(f"{address!r} is not where a coordinator can be. Try: tcp://HOST:7400")
    place = file or next((name for name in PLACES if os.path.isfile(name)), None)
    if address and (place is None or keys is not None):
        return address, keys or "", insecure
    if place is None:
        raise BadConfig(f"nobody says where the coordinator is (none of {', '.join(PLACES)} exists). Try: --coordinator tcp://HOST:7400, or --config FILE")
    from kvguard import config

    faults: list[config.Fault] = []
    tables = [config.parse(path, faults)[0] for path in config.layers(place, faults)]
    if faults:
        raise BadConfig("\n".join(map(str, faults)))
    section = next((name for name in ("node", "coordinator", "gateway") if any(name in table for table in tables)), None)
    if section is None:
        raise BadConfig(f"{place} configures no process of kvguard: it has no section [node], [coordinator] or [gateway]. Try: --coordinator tcp://HOST:7400")
    loaded = config.load(config.KINDS[section], place)
    own = loaded.listen.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") if section == "coordinator" else loaded.coordinator
    return address or own, loaded.keys if keys is None else keys, insecure or loaded.insecure


def _is_address(text: str) -> bool:
    """Of the form tcp://HOST:PORT. What a configuration says is checked there, at a price that whoever gives an address needn't pay."""
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    return text.startswith("tcp://") and bool(host) and not set(host) & set(" /\t\n") and port.isdecimal() and 0 < int(port) <= 65535


def gathered(reach: Reach, verb: str, *questions: dict) -> tuple[dict, list[str]]:
    """One document of all living nodes' answers to all questions, and the nodes that gave none with the reason. Rows say whom else they are for."""
    merged: dict = {"schema": f"kvguard.{'resync' if verb == 'resync' else 'replicas'}/1", "replicas": []}
    silent = []
    status = reach.coordinator("status")
    for node in status["nodes"]:
        if node["state"] == "dead":
            continue
        try:
            for arguments in questions:
                merged["replicas"] += reach.node(node["node"], node["address"], verb, arguments)["replicas"]
        except KvguardError as error:
            silent.append(f"{node['node']}: {error}")
    covered = copied.covered(status)
    for one in merged["replicas"]:
        one["copied_for"] = covered.get((one["instance"], one["rank"]), [])
    merged["replicas"].sort(key=lambda one: (one["instance"], one["rank"], one.get("sequence", ""), one["holder"]))
    return merged, silent
