"""`kvguard wait-salvaged`: for a unit's ExecStartPre, so that an engine that starts again finds the memory free that its former life had.

Knows: this node's configuration, its daemon's status. Must not know: how memory is salvaged.
Invariants: it waits until the daemon has seen the death and closed the mapping, one moment for whoever asks; it ends, and its error says what it saw.
"""

from __future__ import annotations

import time

import click

from kvguard import config
from kvguard.cli.asking import PLACES, Reach
from kvguard.errors import KvguardError, TimedOut

PAUSE_S = 0.05


@click.command()
@click.argument("instance")
@click.argument("rank", required=False)
@click.option("--config", "file", type=click.Path(), envvar="KVGUARD_CONFIG", default=PLACES[0], show_default=True, help="This node's configuration.")
@click.option("--wait", "wait_s", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds until it must be over.")
def wait_salvaged(instance: str, rank: str | None, file: str, wait_s: float) -> None:
    """Wait until this node's daemon holds nothing of a dead engine's memory: of RANK of INSTANCE, or of all its ranks here."""
    node = config.load(config.NodeConfig, file)
    address = (node.advertise or node.listen).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    reach = Reach(node.coordinator, node.keys, node.insecure, 5.0)
    deadline, saw = time.monotonic() + wait_s, "nothing"
    while True:
        try:
            held = holding(reach.node(node.name, address, "status"), instance, rank)
        except KvguardError as error:
            held, saw = None, str(error)
        if held is not None and not held:
            return
        saw = f"{', '.join(held)} is still served, or unmapped" if held else saw
        if time.monotonic() >= deadline:
            raise TimedOut(f"the memory of {instance} isn't free after {wait_s:g} s: {saw}. Try: is its old process gone? is the daemon of {node.name} there?")
        time.sleep(PAUSE_S)


def holding(status: dict, instance: str, rank: str | None) -> list[str]:
    """Streams of the instance (and rank) whose process the daemon still serves, and what is mapped of former ones. A dead one's mapping goes with its place
    in this list."""
    served, releasing = set(status["processes"]["ranks"]), status["processes"].get("releasing", 0)
    found = [one["stream"] for one in status["ranks"] if one["instance"] == instance and rank in (None, one["rank"]) and one["stream"] in served]
    return [*found, *(["a former pool"] if releasing else [])]
