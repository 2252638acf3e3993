"""How verbs reach the coordinator and the nodes: options, keys, one question at a time.

Knows: where a coordinator's address may be said: --coordinator, KVGUARD_COORDINATOR, a configuration file. Must not know: what is asked.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from kvguard import config
from kvguard.errors import BadConfig, KvguardError, NotAuthorised

PLACES = ("/etc/kvguard/node.toml", "/etc/kvguard/coordinator.toml")


@dataclass(frozen=True)
class Reach:
    """Whom to ask, and with which key file ("" for none). `insecure`: off loopback without keys."""

    address: str
    keys: str
    insecure: bool
    timeout_s: float

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
        return self.node("coordinator", self.address, verb, arguments)

    def node(self, name: str, address: str, verb: str, arguments: dict | None = None) -> dict:
        """The answer's document. Raises Unreachable, TimedOut, or the operating error that the answer stands for."""
        from kvguard.transport import keys as keyring
        from kvguard.transport.ask import ask

        loaded = keyring.load(self.keys) if self.keys else None
        return ask(address, verb, arguments or {}, self.timeout_s, loaded, node=name, insecure=self.insecure)


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
    place = file or next((name for name in PLACES if Path(name).is_file()), None)
    if address and (place is None or keys is not None):
        return address, keys or "", insecure
    if place is None:
        raise BadConfig(f"nobody says where the coordinator is (none of {', '.join(PLACES)} exists). Try: --coordinator tcp://HOST:7400, or --config FILE")
    tables, _ = config.parse(Path(place), faults := [])
    if faults:
        raise BadConfig("\n".join(map(str, faults)))
    if "node" in tables:
        node = config.load(config.NodeConfig, place)
        return address or node.coordinator, node.keys if keys is None else keys, insecure or node.insecure
    coordinator = config.load(config.CoordinatorConfig, place)
    own = coordinator.listen.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    return address or own, coordinator.keys if keys is None else keys, insecure or coordinator.insecure


def reaching(verb: Callable) -> Callable:
    """Adds the options that say whom to ask; the verb gets a Reach first."""

    @click.option("--config", "file", type=click.Path(), envvar="KVGUARD_CONFIG", help="A node's or coordinator's configuration that says where to ask.")
    @click.option("--coordinator", "address", envvar="KVGUARD_COORDINATOR", help="tcp://HOST:PORT of the coordinator.")
    @click.option("--keys", envvar="KVGUARD_KEYS", help="File with this user's key.")
    @click.option("--insecure", is_flag=True, help="Ask an address off loopback without keys.")
    @click.option("--timeout", type=click.FloatRange(0.1, 3600.0), default=5.0, show_default=True, help="Seconds to wait for an answer.")
    @functools.wraps(verb)
    def asking(file: str | None, address: str | None, keys: str | None, insecure: bool, timeout: float, **options):
        return verb(Reach(*found(file, address, keys, insecure), timeout), **options)

    return asking


def gathered(reach: Reach, verb: str, arguments: dict) -> tuple[dict, list[str]]:
    """One document of all living nodes' answers, and the nodes that gave none with the reason."""
    merged: dict = {"schema": f"kvguard.{'resync' if verb == 'resync' else 'replicas'}/1", "replicas": []}
    silent = []
    for node in reach.coordinator("status")["nodes"]:
        if node["state"] == "dead":
            continue
        try:
            merged["replicas"] += reach.node(node["node"], node["address"], verb, arguments)["replicas"]
        except KvguardError as error:
            silent.append(f"{node['node']}: {error}")
    merged["replicas"].sort(key=lambda one: (one["instance"], one["rank"], one.get("sequence", ""), one["holder"]))
    return merged, silent


def process_name(default: str) -> str:
    """What log lines call this process."""
    return os.environ.get("KVGUARD_LOG_NAME", default)
