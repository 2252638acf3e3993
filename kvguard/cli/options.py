"""Options that many verbs share: whom to ask, and the form of the output.

Knows: click, how a Reach is found. Must not know: what is asked, how it is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import click

from kvguard.cli.asking import Reach, found

output_option = click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", help="Form of the output.")


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
