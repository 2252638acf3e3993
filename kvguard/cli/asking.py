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
from kvguard.errors import BadConfig

PLACES = ("/etc/kvguard/node.toml", "/etc/kvguard/coordinator.toml")


@dataclass(frozen=True)
class Reach:
    """Whom to ask, and with which key ("" for none)."""

    address: str
    keys: str
    timeout_s: float

    def coordinator(self, verb: str, arguments: dict | None = None) -> dict:
        return self.node(self.address, verb, arguments)

    def node(self, address: str, verb: str, arguments: dict | None = None) -> dict:
        """The answer's document. Raises Unreachable, TimedOut, or the operating error that the answer stands for."""
        from kvguard.transport.ask import ask

        return ask(address, verb, arguments or {}, timeout=self.timeout_s, keys=self.keys)


def found(file: str | None, address: str | None, keys: str | None) -> tuple[str, str]:
    """The coordinator's address and the directory of keys. Raises BadConfig where no place says it."""
    if address and keys is not None:
        return address, keys
    place = file or next((name for name in PLACES if Path(name).is_file()), None)
    if place is None:
        if address:
            return address, ""
        raise BadConfig(f"nobody says where the coordinator is (none of {', '.join(PLACES)} exists). Try: --coordinator tcp://HOST:7400, or --config FILE")
    tables, _ = config.parse(Path(place), faults := [])
    if faults:
        raise BadConfig("\n".join(map(str, faults)))
    if "node" in tables:
        node = config.load(config.NodeConfig, place)
        return address or node.coordinator, node.keys if keys is None else keys
    coordinator = config.load(config.CoordinatorConfig, place)
    return address or coordinator.listen.replace("//0.0.0.0:", "//127.0.0.1:"), coordinator.keys if keys is None else keys


def reaching(verb: Callable) -> Callable:
    """Adds the options that say whom to ask; the verb gets a Reach first."""

    @click.option("--config", "file", type=click.Path(), envvar="KVGUARD_CONFIG", help="A node's or coordinator's configuration that says where to ask.")
    @click.option("--coordinator", "address", envvar="KVGUARD_COORDINATOR", help="tcp://HOST:PORT of the coordinator.")
    @click.option("--keys", envvar="KVGUARD_KEYS", help="File with this user's key.")
    @click.option("--timeout", type=click.FloatRange(0.1, 3600.0), default=5.0, show_default=True, help="Seconds to wait for an answer.")
    @functools.wraps(verb)
    def asking(file: str | None, address: str | None, keys: str | None, timeout: float, **options):
        return verb(Reach(*found(file, address, keys), timeout), **options)

    return asking


def process_name(default: str) -> str:
    """What log lines call this process."""
    return os.environ.get("KVGUARD_LOG_NAME", default)
