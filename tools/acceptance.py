"""Many seeded kills against one living cluster, each compared with the undisturbed run: the claim of the README, tried a hundred times.

Knows: the reference engine's world, its faults, its comparisons. Must not know: how recovery works.
Invariants: a kill is drawn from its seed alone (kind, stage, token, greedy or sampled); a fault that did not fire, or a cluster that does not become
whole again, fails the campaign. Writes one JSON document, prints a table.

    python tools/acceptance.py --kills 100 --first-seed 1 [--model DIR] [-o FILE]
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvguard.errors import KvguardError
from kvguard.pipeline import demo
from kvguard.pipeline.client import Client
from kvguard.pipeline.load import Load, strike_run
from kvguard.pipeline.world import World, WorldSettings

SAMPLED_SEED = 7
PROTECTED_MS = 300  # a kill within this time of a prompt's last chunk meets prompts that are still being protected: counted apart


@dataclass(frozen=True)
class Kill:
    """What one seed stands for."""

    seed: int
    kind: str
    stage: int
    at_token: int
    sampled: bool

    @classmethod
    def drawn(cls, seed: int, stages: int, max_tokens: int) -> Kill:
        draw = random.Random(seed)
        kind = draw.choices(("rank", "node", "driver"), (45, 45, 10))[0]
        return cls(seed, kind, draw.randrange(stages), draw.randrange(0, max_tokens - 1), draw.random() < 0.5)


class Campaign:
    """One world, a reference run per way of sampling, then a run per kill."""

    def __init__(self, world: World, prompts: list, max_tokens: int):
        self.world, self.client = world, Client(world)
        self.load = Load(self.client, prompts, max_tokens)

    def start(self) -> None:
        self.world.start()
        self.world.wait_ready()
        self.client.connect("ready")
        for seed in (None, SAMPLED_SEED):
            self.load.reference(seed)

    def strike(self, kill: Kill) -> dict:
        """One run with its kill; what came of it."""
        load, seed = self.load, SAMPLED_SEED if kill.sampled else None

        def moment() -> bool:
            return self.client.last("prefill", load.wave.run) is not None and load.reached(kill.at_token)

        struck = strike_run(load, f"kill-{kill.seed}", seed, kill.kind, kill.stage, moment)
        prefilled_ns = max(mark["t_ns"] for mark in self.client.marks["prefill"] if mark["run"] == load.wave.run and mark["t_ns"] <= struck.fault.struck_ns)
        found = {
            "seed": kill.seed, "kind": kill.kind, "target": struck.fault.target, "at_token": kill.at_token, "sampled": kill.sampled, "fired": struck.fault.fired,
            "identical": struck.identical, "logits_identical": struck.logits_identical, "kv_identical": struck.kv_identical,
            "since_prefill_ms": (struck.fault.struck_ns - prefilled_ns) / 1e6, "rung": struck.recovery["rung"], "rolled_back": struck.recovery["rolled_back"],
            "ms": struck.recovery["ms"], "bytes_by_rung": struck.recovery["bytes_by_rung"],
        }  # fmt: skip
        equal = struck.identical and struck.logits_identical is True and struck.kv_identical is not False
        found["passed"] = struck.fault.fired and not struck.recovery["lost_sequences"] and equal
        return found


def percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(kills: list[dict]) -> dict:
    """Counts and, by kind, rolled back positions and detection."""
    document = {"kills": len(kills), "passed": sum(kill["passed"] for kill in kills), "kinds": {}}
    for kind in dict.fromkeys(kill["kind"] for kill in kills):
        of_kind = [kill for kill in kills if kill["kind"] == kind]
        decoding = [kill["rolled_back"] for kill in of_kind if kill["since_prefill_ms"] > PROTECTED_MS]
        detect = [kill["ms"]["detect"] for kill in of_kind if kill["ms"]["detect"] is not None]
        resume = [kill["ms"]["fence"] + kill["ms"]["plan"] + kill["ms"]["restore"] for kill in of_kind if kill["ms"]["restore"] is not None]
        document["kinds"][kind] = {
            "kills": len(of_kind), "rolled_back_decoding_p99": percentile(decoding, 0.99), "rolled_back_decoding_max": max(decoding, default=None),
            "detect_ms_p50": percentile(detect, 0.5), "detect_ms_max": max(detect, default=None), "fence_to_resume_ms_p50": percentile(resume, 0.5),
            "fence_to_resume_ms_max": max(resume, default=None),
        }  # fmt: skip
    return document


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--first-seed", default=1, show_default=True)
@click.option("--stages", default=3, show_default=True)
@click.option("--sequences", default=8, show_default=True)
@click.option("--max-tokens", default=24, show_default=True)
@click.option("--model", help="A model directory; without it the default model.")
@click.option("-o", "output", type=click.Path(), help="Where the JSON document goes.")
def main(kills: int, first_seed: int, stages: int, sequences: int, max_tokens: int, model: str | None, output: str | None) -> None:
    """Seeded kills, all compared."""
    console = Console()
    options = demo.Options(stages=stages, sequences=sequences, max_tokens=max_tokens, model=model)
    directory = demo.model_directory(options)
    root = Path(tempfile.mkdtemp(prefix="kvguard-acceptance."))
    # Hundreds of failovers in minutes is what this is for; the bound on them and the waits between them have tests of their own.
    world = World(WorldSettings(root=root, model=directory, stages=stages, coordinator_overrides={"failovers_per_window": 10_000, "backoff_ms": 0}))
    campaign = Campaign(world, demo.prompts_of(options, directory), max_tokens)
    found: list[dict] = []
    began = time.monotonic()
    try:
        campaign.start()
        for seed in track(range(first_seed, first_seed + kills), "kills", console=console, disable=not console.is_terminal):
            found.append(campaign.strike(Kill.drawn(seed, stages, max_tokens)))
            if not console.is_terminal:
                print(json.dumps(found[-1]), flush=True)
    except KvguardError as error:
        console.print(f"[red]ended after {len(found)} kills: {error}[/red]")
        console.print(f"the logs are in {root}/logs")
        raise SystemExit(1) from error
    finally:
        world.stop()
    document = {"schema": "kvguard.acceptance/1", "machine": platform.machine(), "stages": stages, "sequences": sequences, "max_tokens": max_tokens,
                "model": directory.name, "elapsed_s": time.monotonic() - began, "summary": summary(found), "runs": found}  # fmt: skip
    if output:
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{document['summary']['passed']} of {len(found)} kills: tokens, logits and KV identical")
    for name in ("kind", "kills", "rolled back p99 / max", "detect ms p50 / max", "fence to resume ms p50 / max"):
        table.add_column(name)
    for kind, row in document["summary"]["kinds"].items():
        table.add_row(
            kind, str(row["kills"]), f"{row['rolled_back_decoding_p99']} / {row['rolled_back_decoding_max']}",
            f"{row['detect_ms_p50']:.1f} / {row['detect_ms_max']:.1f}", f"{row['fence_to_resume_ms_p50']:.1f} / {row['fence_to_resume_ms_max']:.1f}",
        )  # fmt: skip
    console.print(table)
    for kill in found:
        if not kill["passed"]:
            console.print(f"[red]seed {kill['seed']}: {json.dumps(kill)}[/red]")
    shutil.rmtree(root)
    raise SystemExit(document["summary"]["passed"] != len(found))


if __name__ == "__main__":
    main()
