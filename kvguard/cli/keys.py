"""kvguard keys generate | list.

Knows: key files as transport/keys.py writes them. Must not know: what is encrypted with them.
Invariant: a secret is never printed.
"""

from __future__ import annotations

import re

import click

from kvguard.cli import show
from kvguard.transport import keys as keyring


@click.group()
def keys() -> None:
    """Make and list keys."""


def named_keys(_context, _parameter, values: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for value in values:
        matched = re.fullmatch(r"([^=\s]+)=(\S{40})", value)
        if not matched:
            raise click.BadParameter(f"{value!r} is not NODE=KEY with a key of 40 characters. Try: kvguard keys list FILE on that node")
        found[matched[1]] = matched[2].encode()
    return found


@keys.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--allow", multiple=True, callback=named_keys, metavar="NODE=KEY", help="A peer (a node's or the coordinator's name) and its public key.")
def generate(file: str, allow: dict[str, bytes]) -> None:
    """Make a key pair in FILE (mode 0600) and print its public half. More peers are added as lines `allow NODE KEY`."""
    made = keyring.generate()
    keyring.save(keyring.Keys(made.secret, made.public, allow), file)
    keyring.load(file)  # what was written is what a daemon will read
    click.echo(f"public {made.public.decode()}")


@keys.command("list")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@show.output_option
def list_(file: str, output: str) -> None:
    """The public key in FILE and the peers that it allows."""
    found = keyring.load(file)
    allowed = [{"node": node, "public": key.decode()} for node, key in sorted(found.allowed.items())]
    if output == "json":
        show.document({"schema": "kvguard.keys/1", "public": found.public.decode(), "allowed": allowed})
        return
    click.echo(f"public {found.public.decode()}")
    show.table("Allowed", ["node", "public"], [[one["node"], one["public"]] for one in allowed], "nobody")
