"""kvguard replicas list | show SEQUENCE | verify [SEQUENCE] | export SEQUENCE FILE.

Knows: each node's kvguard.replicas/1 document; files of numpy (npz). Must not know: stores.
Invariants: what a node didn't say is named, never left out silently (exit code 3); an exported file is whole or isn't there.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import click

from kvguard.cli import copied, show
from kvguard.cli.asking import Reach, gathered
from kvguard.cli.documents import BadAnswer
from kvguard.cli.options import output_option, reaching
from kvguard.errors import KvguardError, Refused, Unreachable

READ_BYTES = 1 << 20  # of KV at a time
COLUMNS = ["instance", "rank", "sequence", "holder", "epoch", "positions", "bytes", "tier", "verified"]


@click.group()
def replicas() -> None:
    """List, show, verify and export replicas."""


def finish(found: dict, silent: list[str], output: str, title: str) -> None:
    if output == "json":
        show.document({**found, "unreachable": silent})
    else:
        copied.table(title, COLUMNS, [{**one, "bytes": show.size(one["bytes"])} for one in found["replicas"]], "none")
    if silent:
        raise Unreachable("no answer from " + "; ".join(silent) + ". Try: kvguard status")


@replicas.command("list")
@reaching
@click.option("--instance", help="Only this instance's.")
@output_option
def list_(reach: Reach, instance: str | None, output: str) -> None:
    """All replicas on all living nodes, by sequence."""
    finish(*gathered(reach, "replicas", {"instance": instance}), output, "Replicas")


@replicas.command("show")
@reaching
@click.argument("sequence")
@click.option("--instance", help="Only this instance's.")
@output_option
def show_(reach: Reach, sequence: str, instance: str | None, output: str) -> None:
    """One sequence's replicas, with lineage, blocks and how many ids are known."""
    found, silent = gathered(reach, "replicas", {"instance": instance, "sequence": sequence, "detail": True})
    if not found["replicas"] and not silent:
        raise Refused(f"no node holds a replica of {sequence!r}. Try: kvguard replicas list")
    finish(found, silent, output, f"Replicas of {sequence}")


@replicas.command()
@reaching
@click.argument("sequence", required=False)
@click.option("--instance", help="Only this instance's.")
@output_option
def verify(reach: Reach, sequence: str | None, instance: str | None, output: str) -> None:
    """Read the bytes of all replicas (or SEQUENCE's) and compare with their checksums. Exit code 1 where one is wrong."""
    found, silent = gathered(reach, "verify", {"instance": instance, "sequence": sequence})
    finish(found, silent, output, "Verified")
    wrong = [f"{one['sequence']} of {one['instance']}/{one['rank']} on {one['holder']}" for one in found["replicas"] if one["verified"] is False]
    if wrong:
        raise KvguardError(f"damaged: {', '.join(wrong)}. Try: kvguard resync")


@replicas.command()
@reaching
@click.argument("sequence")
@click.argument("target", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--instance", help="Only this instance's.")
@click.option("--yes", is_flag=True, help="Replace FILE without asking.")
@output_option
def export(reach: Reach, sequence: str, target: Path, instance: str | None, yes: bool, output: str) -> None:
    """Write all replicas of SEQUENCE to FILE, an npz of numpy with three arrays by INSTANCE/RANK@HOLDER.

    kv: uint8, a row a position (a block where tokens aren't addressable); ids: uint32; request: uint8.
    """
    found, silent = gathered(reach, "replicas", {"instance": instance, "sequence": sequence})
    entries = [one for one in found["replicas"] if not one["released"]]
    if not entries:
        raise Refused(f"no node that answers holds {sequence!r}. Try: kvguard replicas list")
    if target.exists() and not yes:
        click.confirm(f"{target} exists. Replace it?", abort=True, err=True)
    addresses = {node["node"]: node["address"] for node in reach.coordinator("status")["nodes"]}
    written = write_npz(target, {f"{one['instance']}/{one['rank']}@{one['holder']}": fetched(reach, one, addresses[one["holder"]]) for one in entries})
    finish({**found, "replicas": entries, "file": str(target), "file_bytes": written}, silent, output, f"Exported to {target}")


def fetched(reach: Reach, entry: dict, address: str) -> dict:
    """One replica's arrays by name, read a few blocks at a time."""
    import numpy as np
    from rich.progress import Progress

    parts: list[bytes] = []
    position, step = 0, 1
    with Progress(disable=not sys.stderr.isatty(), transient=True) as progress:
        shown = progress.add_task(f"{entry['rank']} from {entry['holder']}", total=entry["positions"])
        while True:
            arguments = {"stream": entry["stream"], "sequence": entry["sequence"], "start": position, "end": min(position + step, entry["positions"])}
            told = reach.node(entry["holder"], address, "read", arguments if position or step > 1 else {**arguments, "end": 0})
            parts.append(base64.b64decode(told["kv"]))
            before, position = position, told["end"]
            progress.update(shown, completed=position)
            if position >= entry["positions"] or (step > 1 and position <= before):  # it may have shrunk meanwhile
                break
            step = max(1, READ_BYTES // told["block_bytes"]) * told["block_tokens"]
    width = told["token_bytes"] if told["addressable"] else told["block_bytes"]
    try:
        kv = np.frombuffer(b"".join(parts), np.uint8)
        ids, request = (np.frombuffer(base64.b64decode(told[name]), kind) for name, kind in (("ids", np.uint32), ("request", np.uint8)))
        return {"kv": kv.reshape(-1, width), "ids": ids, "request": request}
    except ValueError as error:
        raise BadAnswer(f"what {entry['holder']} sent of {entry['sequence']} is no replica: {error}. Try: the same version of kvguard everywhere") from error


def write_npz(file: Path, replicas: dict[str, dict]) -> int:
    """How many bytes the file has. Whole, or not there: it gets its name last."""
    import numpy as np

    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as written:
            np.savez(written, **{f"{name}/{array}": value for name, arrays in replicas.items() for array, value in arrays.items()})
            written.flush()
            os.fsync(written.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise KvguardError(f"{file} can't be written: {error.strerror}. Try: a place with room") from error
    return file.stat().st_size
