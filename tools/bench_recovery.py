"""How long a recovery takes, phase by phase: kills of a rank and of a node, each with 8 sequences of 512 positions in flight, in one living cluster.

    python tools/bench_recovery.py [--kills 10] [--kinds rank,node] [--stages 3] [--model DIR] [-o FILE]

Phases follow each other: `detect` from the fault to the coordinator's verdict, `fence`, `plan` and `restore` as the coordinator saw them, `first_token` from the
driver's resumption to the first new token. `to_tokens` is what the target bounds: fence + plan + restore. For a rank, `detect` is shown in two parts: `gone`, until
the kernel has torn the process down (its pidfd turns readable only when its memory is unmapped), and `told`, all that daemon and coordinator do after that.
Every run is compared with an undisturbed one: a number of a recovery that went wrong would say nothing.

Knows: the reference engine's world, its faults, its clocks (one machine: one monotonic clock). Must not know: how recovery works.
Invariants: a fault that did not fire, a run that is not identical, or a cluster that does not become whole again ends the program.
"""

from __future__ import annotations

import json
import os
import platform
import random
import select
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvguard.errors import KvguardError
from kvguard.pipeline import demo, faults
from kvguard.pipeline.client import Client
from kvguard.pipeline.load import Load, strike_run
from kvguard.pipeline.world import World, WorldSettings

TOKENS_BEFORE, TOKENS_AFTER = 8, 8  # emitted before the strike, and wanted after it
RUN_TIMEOUT_S = 900.0
PHASES = ("detect", "gone", "told", "fence", "plan", "restore", "to_tokens", "first_token", "total", "rolled_back")
TARGETS = {"rank": {"detect": 20.0, "to_tokens": 150.0, "rolled_back": 0}, "node": {"detect": 1500.0, "to_tokens": 150.0, "rolled_back": 1}}


class Death(threading.Thread):
    """Waits on a process' own pidfd beside whoever else does; `seen_ns`: when it turned readable, 0 before."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pidfd = os.pidfd_open(pid)
        self.seen_ns = 0
        self.start()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll()
        self.seen_ns = time.monotonic_ns()
        os.close(self._pidfd)


def prompts_of(sequences: int, context: int, vocabulary: int) -> list[list[int]]:
    """Ids that make `context` positions at the strike, the same every time."""
    draw = random.Random(1)
    return [[draw.randrange(10, vocabulary) for _ in range(context - TOKENS_BEFORE + 1)] for _ in range(sequences)]


class Kills:
    """One world and its undisturbed run; then kills, one by one."""

    def __init__(self, world: World, prompts: list[list[int]]):
        self.world, self.client = world, Client(world)
        self.load = Load(self.client, prompts, TOKENS_BEFORE + TOKENS_AFTER)

    def start(self) -> None:
        self.world.start()
        self.world.wait_ready()
        self.client.connect("ready")
        self.load.reference(None)

    def strike(self, kind: str, stage: int, number: int) -> dict:
        run, deaths = f"{kind}-{number}", []

        def watched(fault: faults.Fault):
            deaths.append(Death(fault.process.pid))
            return lambda: deaths[0].join(10.0)

        struck = strike_run(self.load, run, None, kind, stage, lambda: self.load.reached(TOKENS_BEFORE), watched)
        fault, recovered = struck.fault, struck.recovery
        if not fault.fired or not struck.identical:
            raise KvguardError(f"{run} of stage {stage}: {'not identical' if fault.fired else 'did not fire'}. Try: the logs in {self.world.root / 'logs'}")
        timing = recovered["ms"]
        found = {"kind": kind, "stage": stage, "rolled_back": recovered["rolled_back"], "rung": recovered["rung"], "bytes": recovered["bytes"], **timing}
        found["to_tokens"] = timing["fence"] + timing["plan"] + timing["restore"]
        if kind == "rank":
            found["gone"] = (deaths[0].seen_ns - fault.struck_ns) / 1e6
            found["told"] = timing["detect"] - found["gone"]
        return found


def summary(kills: list[dict]) -> dict:
    """By kind and phase: median, maximum, and whether the target holds for each."""
    kinds: dict[str, dict] = {}
    for kind in dict.fromkeys(kill["kind"] for kill in kills):
        phases = kinds[kind] = {}
        for phase in PHASES:
            values = [kill[phase] for kill in kills if kill["kind"] == kind and kill.get(phase) is not None]
            if values:
                phases[phase] = {"median": statistics.median(values), "max": max(values), "samples": len(values)}
            if values and phase in TARGETS[kind]:
                target = TARGETS[kind][phase]
                phases[phase] |= {"target": target, "median_met": statistics.median(values) <= target, "max_met": max(values) <= target}
    return kinds


def render(document: dict, console: Console) -> None:
    shape = f"{document['sequences']} sequences x {document['context']} positions, {document['stages']} stages of {document['model']}"
    table = Table(title=f"{shape}; ms, median / max; load {document['load_1m']:.2f}", title_justify="left")
    kinds = document["summary"]
    for name in ("phase", *(f"{kind} ({kinds[kind]['total']['samples']} kills)" for kind in kinds), "target"):
        table.add_column(name)
    for phase in PHASES:
        cells = [f"{row['median']:.1f} / {row['max']:.1f}" if (row := kinds[kind].get(phase)) else "" for kind in kinds]
        targets = [f"{kind} {kinds[kind][phase]['target']:g}" for kind in kinds if "target" in kinds[kind].get(phase, {})]
        table.add_row(phase, *cells, ", ".join(targets))
    console.print(table)


@click.command()
@click.option("--kills", default=10, show_default=True, help="Of each kind.")
@click.option("--kinds", default="rank,node", show_default=True)
@click.option("--stages", default=3, show_default=True)
@click.option("--sequences", default=8, show_default=True)
@click.option("--context", default=512, show_default=True, help="Positions of each sequence when the fault strikes.")
@click.option("--model", help="A model directory; without it the default model.")
@click.option("-o", "output", type=click.Path(), help="Where the JSON document goes.")
def main(kills: int, kinds: str, stages: int, sequences: int, context: int, model: str | None, output: str | None) -> None:
    """Recoveries, timed phase by phase."""
    console = Console(highlight=False)
    options = demo.Options(stages=stages, sequences=sequences, max_tokens=TOKENS_BEFORE + TOKENS_AFTER, model=model, kill="none")
    options.check()
    wanted = kinds.split(",")
    if unknown := [kind for kind in wanted if kind not in TARGETS]:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(TARGETS)}", param_hint="--kinds")
    directory = demo.model_directory(options)
    vocabulary = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    root = Path(tempfile.mkdtemp(prefix="kvguard-recovery."))
    world = World(WorldSettings(root=root, model=directory, stages=stages, coordinator_overrides={"failovers_per_window": 10_000, "backoff_ms": 0}))
    campaign = Kills(world, prompts_of(sequences, context, vocabulary))
    found: list[dict] = []
    try:
        campaign.start()
        for number in track(range(kills), "kills", console=console, disable=not console.is_terminal):
            for kind in wanted:
                found.append(campaign.strike(kind, number % stages, number))
                if not console.is_terminal:
                    print(json.dumps(found[-1]), flush=True)
    except KvguardError as error:
        console.print(f"[red]ended after {len(found)} kills: {error}[/red]")
        console.print(f"the logs are in {root}/logs")
        raise SystemExit(1) from error
    finally:
        world.stop()
    document = {"schema": "kvguard.bench_recovery/1", "model": directory.name, "stages": stages, "sequences": sequences, "context": context,
                "machine": platform.machine(), "cores": os.cpu_count(), "load_1m": os.getloadavg()[0], "summary": summary(found), "kills": found}  # fmt: skip
    if output:
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    render(document, console)
    shutil.rmtree(root)
    targets = [row for phases in document["summary"].values() for row in phases.values() if "target" in row]
    raise SystemExit(not all(row["median_met"] for row in targets))


if __name__ == "__main__":
    main()
