"""kvguard demo: its options. The reference engine, and with it torch, is imported when the demo runs.

Knows: options of interfaces.md. Must not know: how a demo goes.
"""

from __future__ import annotations

import importlib
import sys

import click


@click.command()
@click.option("--stages", type=click.IntRange(1, 8), default=3, show_default=True, help="Pipeline stages, a process each.")
@click.option("--tp", type=click.IntRange(1, 1), default=1, show_default=True, help="Tensor-parallel ranks per stage.")
@click.option("--kill", type=click.Choice(["rank", "node", "daemon", "coordinator", "driver", "none"]), default="node", show_default=True)
@click.option("--at-token", type=click.IntRange(0), default=20, show_default=True, help="Strikes when every sequence has emitted so many; 0: during prefill.")
@click.option("--max-tokens", type=click.IntRange(1), default=60, show_default=True)
@click.option("--sequences", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--seed", type=int, help="Samples with this seed; without it the demo is greedy.")
@click.option("--prompt", help="The text to go on from.")
@click.option("--prompt-ids", type=click.IntRange(1), help="A first prompt of so many ids instead of a text.")
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="A local transformers directory of the Llama, GPT-2 or OPT family.")
@click.option("--corrupt", type=click.Choice(["replica", "frame"]), help="A negative control, and a fault on the wire.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "rehearsal"]), default="cpu", show_default=True, help="Where model and pools are.")
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table")
def demo(**options) -> None:
    """Kill something in mid-generation and watch the text go on, identical."""
    if options["corrupt"] == "replica" and options["kill"] != "node":
        raise click.UsageError("--corrupt replica goes with --kill node only: no other kill restores from a replica")
    sys.exit(importlib.import_module("kvguard.pipeline.demo").main(**options))
