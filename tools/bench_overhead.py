"""What kvguard costs the reference engine: decode throughput with it against without, in alternating pairs of short runs of two worlds that live at once.

    python tools/bench_overhead.py [--pairs 60] [--stages 1] [--threads 1] [--model DIR] [-o FILE]

Two worlds of the same model, stages and threads: one guarded (as many nodes as stages, at least two, and a coordinator; no standbys), one bare. Only one of them
has work at any time; what the other one's processes use of a processor meanwhile is measured and said (`idle_cpu_percent`). Every pair is followed by a control
pair, the bare world against itself, which says what the machine's noise alone does to the same figure. `--threads` as many as there are cores is the saturated
figure: then the daemons have no core of their own.

A run's throughput is the decoding alone: tokens after the last of its sequences' first ones, over the driver's clock. `ratio`: the median over pairs of
(guarded / bare of the same pair), with a bootstrap interval of 95 %. CPU figures are the processes' own accounts, per token of the guarded runs.

Knows: the reference engine's world and its client, processes' CPU time. Must not know: how replication works.
Invariants: both runs of a pair have the same prompts and tokens; a run that is not whole ends the program.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvguard.errors import KvguardError
from kvguard.pipeline import demo
from kvguard.pipeline.client import Client
from kvguard.pipeline.world import World, WorldSettings

TARGET = 0.99
RESAMPLES = 10_000
RUN_TIMEOUT_S = 300.0


@dataclass
class Side:
    """One world with its client, and what its runs have used. `cpu_s`: by kind of process, during its own runs."""

    name: str
    world: World
    client: Client
    runs: int = 0
    tokens: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)
    idle_cpu_s: dict[str, float] = field(default_factory=dict)
    idle_wall_s: float = 0.0

    def processes(self) -> dict[str, list[psutil.Process]]:
        world = self.world
        kinds = {
            "daemons": [node.daemon for node in world.nodes if node.daemon],
            "stages": [engine for node in world.nodes for engine in node.engines],
            "driver": [world.driver],
            "coordinator": [world.coordinator] if world.coordinator else [],
        }
        return {kind: [psutil.Process(process.pid) for process in processes] for kind, processes in kinds.items()}

    def cpu(self) -> dict[str, float]:
        """Seconds of processor time so far, by kind."""
        return {kind: sum(used(process) for process in processes) for kind, processes in self.processes().items()}


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def added(total: dict[str, float], now: dict[str, float], before: dict[str, float]) -> None:
    for kind, seconds in now.items():
        total[kind] = total.get(kind, 0.0) + seconds - before[kind]


def opened(name: str, root: Path, options: demo.Options, model: Path, threads: int, guarded: bool) -> Side:
    """A world that is ready for runs. The caller stops it, also when this raises."""
    world = World(WorldSettings(root=root / name, model=model, stages=options.stages, threads=threads, guarded=guarded, standbys=False))
    return Side(name, world, Client(world))


def started(side: Side) -> None:
    side.world.start()
    if side.world.settings.guarded:
        side.world.wait_ready()
    side.client.connect("ready")


def run(side: Side, other: Side, prompts: list, tokens: int) -> float:
    """One run of `side` while `other` has nothing to do; tokens a second of its decoding."""
    name = f"run-{side.runs}"
    side.runs += 1
    before, idle_before, begun = side.cpu(), other.cpu(), time.monotonic()
    side.client.begin(name, prompts, tokens, None)
    side.client.finished(name, RUN_TIMEOUT_S)
    side.client.release(name)
    wall = time.monotonic() - begun
    transcript = side.client.transcripts.pop(name)
    if transcript.emitted() != [tokens] * len(prompts):
        raise KvguardError(f"{side.name}: {name} emitted {transcript.emitted()} tokens instead of {tokens} each. Try: the logs in {side.world.root / 'logs'}")
    added(side.cpu_s, side.cpu(), before)
    added(other.idle_cpu_s, other.cpu(), idle_before)
    side.tokens += tokens * len(prompts)
    other.idle_wall_s += wall
    arrivals, side.client.arrivals, side.client.marks = side.client.arrivals, [], {}
    return decode_rate(sorted(t_ns for t_ns, _ in arrivals), len(prompts))


def decode_rate(arrivals_ns: list[int], sequences: int) -> float:
    """Tokens a second after the first of every sequence: they are emitted together, so the first `sequences` arrivals are the first tokens or later ones of
    a sequence whose prompt was short; both worlds schedule alike, so both leave out the same."""
    start = sequences - 1
    return (len(arrivals_ns) - 1 - start) / ((arrivals_ns[-1] - arrivals_ns[start]) / 1e9)


def measured(guarded: Side, bare: Side, prompts: list, tokens: int, pairs: int, console: Console) -> tuple[list, list]:
    """(guarded, bare) and (bare, bare) rates by pair. Each kind of pair alternates its order."""
    of_pairs, of_control = [], []
    for _ in range(2):  # imports, page tables and clocks are warm before anything counts
        run(guarded, bare, prompts, tokens)
        run(bare, guarded, prompts, tokens)
    for side in (guarded, bare):
        side.cpu_s, side.tokens, side.idle_cpu_s, side.idle_wall_s = {}, 0, {}, 0.0
    for pair in track(range(pairs), "pairs", console=console, disable=not console.is_terminal):
        rates = {side.name: run(side, other, prompts, tokens) for side, other in ((guarded, bare), (bare, guarded))[:: 1 if pair % 2 else -1]}
        of_pairs.append((rates["guarded"], rates["bare"]))
        first, second = run(bare, guarded, prompts, tokens), run(bare, guarded, prompts, tokens)
        of_control.append((first, second) if pair % 2 else (second, first))
    return of_pairs, of_control


def summary(pairs: list[tuple[float, float]]) -> dict:
    """Median ratio of the pairs and its bootstrap interval; a fixed seed, so that the same samples give the same interval."""
    ratios = np.array([one / two for one, two in pairs])
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    rates = [{"ratio": float(ratio), "tokens_per_s": pair} for ratio, pair in zip(ratios, pairs, strict=True)]
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high), "mean": float(ratios.mean()), "pairs": rates}


def document(guarded: Side, bare: Side, of_pairs: list, of_control: list, described: dict) -> dict:
    found = {"schema": "kvguard.bench_overhead/1", **described, "target": TARGET, "guarded": summary(of_pairs), "control": summary(of_control)}
    found["tokens_per_s"] = {"guarded": float(np.median([pair[0] for pair in of_pairs])), "bare": float(np.median([pair[1] for pair in of_pairs]))}
    for side in (guarded, bare):
        found[f"{side.name}_cpu_ms_per_token"] = {kind: 1e3 * seconds / side.tokens for kind, seconds in side.cpu_s.items()}
        found[f"{side.name}_idle_cpu_percent"] = {kind: 100 * seconds / side.idle_wall_s for kind, seconds in side.idle_cpu_s.items()}
    found["target_met"] = found["guarded"]["ratio"] >= TARGET
    return found


def render(found: dict, console: Console) -> None:
    table = Table(title=f"{found['model']}, {found['stages']} stages x {found['threads']} threads, {found['sequences']} sequences x {found['tokens']} tokens", title_justify="left")
    for name in ("pairs", "median ratio", "95 % interval", "mean"):
        table.add_column(name)
    for name, key in (("with kvguard / without", "guarded"), ("without / without", "control")):
        row = found[key]
        table.add_row(f"{len(row['pairs'])} {name}", f"{row['ratio']:.4f}", f"{row['low']:.4f} .. {row['high']:.4f}", f"{row['mean']:.4f}")
    console.print(table)
    with_it, without = found["guarded_cpu_ms_per_token"], found["bare_cpu_ms_per_token"]
    console.print(f"{found['tokens_per_s']['guarded']:.1f} tokens/s with, {found['tokens_per_s']['bare']:.1f} without; load {found['load_1m_before']:.2f} -> {found['load_1m']:.2f}")
    console.print(f"CPU-ms per token with: {', '.join(f'{kind} {ms:.3f}' for kind, ms in with_it.items())}")
    console.print(f"CPU-ms per token without: {', '.join(f'{kind} {ms:.3f}' for kind, ms in without.items() if ms)}")
    for name in ("guarded", "bare"):
        console.print(f"% of a core while idle, {name}: {', '.join(f'{kind} {share:.2f}' for kind, share in found[f'{name}_idle_cpu_percent'].items())}")


@click.command()
@click.option("--pairs", default=60, show_default=True)
@click.option("--sequences", default=8, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens of each sequence and run.")
@click.option("--stages", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Compute threads of each stage.")
@click.option("--model", help="A model directory; without it the default model.")
@click.option("-o", "output", type=click.Path(), help="Where the JSON document goes.")
def main(pairs: int, sequences: int, tokens: int, stages: int, threads: int, model: str | None, output: str | None) -> None:
    """Decode throughput with kvguard against without."""
    console = Console(highlight=False)
    options = demo.Options(stages=stages, sequences=sequences, max_tokens=tokens, model=model, kill="none")
    options.check()
    directory = demo.model_directory(options)
    prompts = demo.prompts_of(options, directory)
    root = Path(tempfile.mkdtemp(prefix="kvguard-overhead."))
    sides = [opened(name, root, options, directory, threads, name == "guarded") for name in ("guarded", "bare")]
    described = {"model": directory.name, "stages": stages, "threads": threads, "sequences": sequences, "tokens": tokens, "machine": platform.machine(),
                 "cores": os.cpu_count(), "load_1m_before": os.getloadavg()[0]}  # fmt: skip
    try:
        for side in sides:
            started(side)
        of_pairs, of_control = measured(*sides, prompts, tokens, pairs, console)
        found = document(*sides, of_pairs, of_control, described | {"load_1m": os.getloadavg()[0]})
    except KvguardError as error:
        console.print(f"[red]{error}[/red]")
        console.print(f"the logs are in {root}")
        raise SystemExit(1) from error
    finally:
        for side in sides:
            side.world.stop()
    if output:
        Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    render(found, console)
    shutil.rmtree(root)
    raise SystemExit(not found["target_met"])


if __name__ == "__main__":
    main()
