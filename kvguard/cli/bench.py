"""kvguard bench: what this machine and link can carry, against memcpy and raw sockets, and what that protects.

Knows: kvguard/capacity, how figures are shown. Must not know: how they are measured.
Invariants: a live daemon is asked a few questions, never sent bytes; progress is drawn on a terminal alone, on stderr.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach, found
from kvguard.cli.options import output_option
from kvguard.config import ADDRESS
from kvguard.errors import BadConfig, Refused
from kvguard.limits import KIB, MIB

DEFAULT_BYTES_PER_TOKEN = 131072
SIZES = (64 * KIB, 1 * MIB, 4 * MIB)
PAIRS, PAIR_BYTES = 5, 48 * MIB
SMALL_BYTES = 16 * MIB


def address_of(_context, _parameter, value: str | None) -> str | None:
    if value is not None and not ADDRESS.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not an address. Try: tcp://THIS_HOST:7440")
    return value


@click.command()
@click.option("--bytes-per-token", type=click.IntRange(1, 1 << 26), help="KV of one token of your model, over all ranks beside one daemon.")
@click.option("--to", "target", help="tcp://HOST:PORT where `kvguard bench --listen` runs: that link. Or a NODE of the cluster: how soon its daemon answers.")
@click.option("--listen", "listening", callback=address_of, help="Be the other end: tcp://THIS_HOST:PORT and the four ports after it, until interrupted.")
@click.option("--quick", is_flag=True, help="One pair of everything: a second instead of some.")
@click.option("--config", "file", type=click.Path(), envvar="KVGUARD_CONFIG", help="For --to NODE: a configuration that says where to ask.")
@click.option("--coordinator", "address", envvar="KVGUARD_COORDINATOR", help="For --to NODE: tcp://HOST:PORT of the coordinator.")
@click.option("--keys", envvar="KVGUARD_KEYS", help="File with this user's key.")
@click.option("--insecure", is_flag=True, help="Leave this machine without keys.")
@click.option("--timeout", type=click.FloatRange(0.1, 3600.0), default=5.0, show_default=True, help="Seconds to wait for an answer of a daemon.")
@output_option
def bench(bytes_per_token: int | None, target: str | None, listening: str | None, quick: bool, output: str, **given) -> None:
    """What this machine and link can carry, against memcpy and raw sockets.

    Makes its own pool, arena and sockets; no daemon is needed, and none is disturbed beyond the two cores that it keeps busy for some seconds.
    """
    from kvguard.transport import keys as keyring

    if listening:
        listen(listening, keyring.load(given["keys"]) if given["keys"] else None, given["insecure"])
        return
    from kvguard.capacity import link, machine, meaning

    far = bool(target and ADDRESS.fullmatch(target))
    keys = keyring.load(given["keys"]) if far and given["keys"] else None
    document: dict = {"schema": "kvguard.bench/1"}
    with progress() as say:
        document["node"] = None
        if target and not far:  # first, because who can't be asked should be told of at once
            document["node"] = asked(Reach(*found(given["file"], given["address"], given["keys"], given["insecure"]), given["timeout"]), target, say)
        rounds, pairs, pair_bytes = (1, 1, SMALL_BYTES) if quick else (5, PAIRS, PAIR_BYTES)
        document["machine"] = machine.measure(bytes_per_token or DEFAULT_BYTES_PER_TOKEN, rounds=rounds, say=say)
        with contextlib.nullcontext(target) if far else link.loopback() as place:
            document["link"] = link.measure(place, SIZES, pairs, pair_bytes, keys, given["insecure"], say)
    document["link"]["loopback"] = not far
    document["means"] = meaning.means(document["machine"], document["link"], bytes_per_token)
    show.document(document) if output == "json" else render(document)


def asked(reach: Reach, target: str, say: Callable[[str], None]) -> dict:
    """How soon the daemon of a node answers."""
    from kvguard.capacity.asked import answers

    nodes = {one["node"]: one for one in reach.coordinator("status")["nodes"]}
    if target not in nodes:
        raise Refused(f"no node is called {target!r}. Try: {', '.join(nodes) or 'kvguard status'}, or tcp://HOST:PORT of a `kvguard bench --listen`")
    say(f"answers of {target}")
    address = nodes[target]["address"]
    return {"node": target, "address": address, **answers(lambda: reach.node(target, address, "stats"))}


def listen(address: str, keys, insecure: bool) -> None:
    """The receiving end, one measurement after the other."""
    from kvguard.capacity.receiver import Receiver

    if address.startswith(("tcp://0.0.0.0:", "tcp://[::]:")):
        raise BadConfig("the raw socket takes bytes from whoever connects, so it is for one network. Try: the address of this host on it")
    receiver = Receiver(address, keys, insecure)
    try:
        click.echo(f"On the other host: kvguard bench --to {receiver.address}   (Ctrl-C ends it here)", err=True)
        while True:
            receiver.serve_one()
    except KeyboardInterrupt:
        return
    finally:
        receiver.close()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """`say(what is being measured)`: a spinner on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    from rich.console import Console

    with Console(stderr=True).status("beginning") as status:
        yield lambda line: status.update(line)


def rate(gb_s: float) -> str:
    return f"{gb_s:.2f}" if gb_s < 100 else f"{gb_s:.0f}"


def span(row: dict) -> str:
    """A ratio with its lowest and highest."""
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}..{row['ratio_high']:.2f})"


def render(found_: dict) -> None:
    machine, link, means, node = (found_[key] for key in ("machine", "link", "means", "node"))
    layout = machine["layout"]
    deeds = [[row["what"], show.size(row["bytes_each"]), rate(row["gb_s"]), rate(row["memcpy_gb_s"]), span(row)] for row in machine["rows"]]
    title = f"This machine, {machine['cores']} cores, tokens of {show.size(layout['token_bytes'])}"
    show.table(title, ["one thread", "bytes each", "GB/s", "memcpy GB/s", "ratio"], deeds, "none")
    place = "loopback, two processes" if link["loopback"] else re.sub(r"^tcp://", "", link["to"])
    frames = [[show.size(row["frame_bytes"]), *(rate(row[f"{way}_gb_s"]) for way in ("raw", "bulk", "control")), span(row)] for row in link["rows"]]
    columns = ["frames of", "raw TCP GB/s", "kvguard", "ZeroMQ alone", "kvguard / raw"]
    show.table(f"Link: {place}; round trip {link['round_trip_us']:.0f} us", columns, frames, "none")
    if node:
        click.echo(f"Daemon of {node['node']} at {node['address']}: answers in {node['p50_ms']:.1f} ms (p99 {node['p99_ms']:.1f}), a new connection each time")
    sides = f"sender {rate(means['sender_gb_s'])}, holder {rate(means['holder_gb_s'])} GB/s"
    rows = [[one["model"], show.size(one["bytes_per_token"]), f"{one['tokens_per_s']:.0f}", f"{one['prompt_ms']:.0f}"] for one in means["rows"]]
    prompt = means["rows"][0]["prompt_tokens"]
    show.table(f"Protects at most ({sides})", ["model", "KV a token", "tokens/s", f"prompt of {prompt}, ms"], rows, "none")
