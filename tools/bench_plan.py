"""How long recovery.plan() takes: one instance of 16 ranks, 2 of them lost with their nodes, 10,000 sequences (or as asked).

Every report is packed and unpacked first, so that no two columns share an object, as after a real fence. Prints a table, or JSON with `-o json`.
"""

from __future__ import annotations

import json
import random
import statistics
import time

import click

from kvguard.core.recovery import Plan, Situation, plan
from kvguard.format import messages
from kvguard.format.messages import Holding, Report, StandbyBeat
from kvguard.types import Epoch, Fork, Rank, StreamId

INSTANCE = "bench"


def situation(ranks: int, lost: int, sequences: int, shuffled: bool, seed: int) -> Situation:
    """Each rank on a node of its own, its replica on the next, a standby everywhere; positions differ by a few between ranks."""
    draw = random.Random(seed)
    names = tuple(f"sequence-{i:06d}" for i in range(sequences))
    base = [draw.randrange(1, 8192) for _ in names]
    birth = [random.Random(name).getrandbits(64) for name in names]
    members = {Rank(0, stage, 0): f"node{stage:02d}" for stage in range(ranks)}
    stages = sorted(draw.sample(range(ranks), lost))
    gone = tuple(Rank(0, stage, 0) for stage in stages)
    lineage = (Fork(0, 0), Fork(3, 1))

    def holding(stage: int, kind: str, behind: int) -> Holding:
        order = list(range(sequences))
        if shuffled:
            random.Random(stage).shuffle(order)
        positions = tuple([max(0, base[i] - draw.randrange(behind + 1)) for i in order])
        stream = StreamId(INSTANCE, Rank(0, stage, 0), 1000 + stage)
        ids = tuple([base[i] + 1 for i in order])
        births = tuple([birth[i] for i in order])
        return Holding(stream, kind, kind == "pool", tuple([names[i] for i in order]), (1,) * sequences, (lineage,) * sequences, positions, ids, 0, births)

    reports = []
    for stage in range(ranks):
        if stage in stages:
            continue
        held = (holding(stage, "pool", 1), holding((stage - 1) % ranks, "replica", 2))
        report = Report(INSTANCE, Epoch(4, "bench"), f"node{stage:02d}", held)
        reports.append(messages.unpack(messages.pack(report)))
    texts = {str(rank): 0 for rank in members}
    standbys = tuple((report.node, StandbyBeat(INSTANCE, 100 + i, "", texts)) for i, report in enumerate(reports))
    return Situation(INSTANCE, Epoch(4, "bench"), members, gone, tuple(reports), standbys)


def measure(given: Situation, repeat: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each run by the clock and of the CPU (what a busy machine doesn't blur). Raises SystemExit when the plan is not one."""
    spent, busy = [], []
    for _ in range(repeat):
        start, start_cpu = time.perf_counter_ns(), time.process_time_ns()
        answer = plan(given)
        spent.append((time.perf_counter_ns() - start) / 1e6)
        busy.append((time.process_time_ns() - start_cpu) / 1e6)
        if not isinstance(answer, Plan):
            raise SystemExit(f"no plan: {answer.reasons}")
    return spent, busy


@click.command()
@click.option("--ranks", default=16)
@click.option("--lost", default=2)
@click.option("--sequences", default=10_000)
@click.option("--repeat", default=15)
@click.option("--seed", default=1)
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table")
def main(ranks: int, lost: int, sequences: int, repeat: int, seed: int, output: str) -> None:
    rows = []
    for name, shuffled in (("same order in every report", False), ("every report in its own order", True)):
        spent, busy = measure(situation(ranks, lost, sequences, shuffled, seed), repeat)
        rows.append({"case": name, "median_ms": round(statistics.median(spent), 2), "max_ms": round(max(spent), 2),
                     "cpu_median_ms": round(statistics.median(busy), 2), "runs": repeat})  # fmt: skip
    document = {"schema": "kvguard.bench_plan/1", "ranks": ranks, "lost": lost, "sequences": sequences, "target_ms": 100, "cases": rows}
    if output == "json":
        click.echo(json.dumps(document))
        return
    click.echo(f"plan(): {lost} lost ranks of {ranks}, {sequences} sequences, target 100 ms")
    for row in rows:
        click.echo(f"  {row['case']:32} median {row['median_ms']:7.2f} ms   max {row['max_ms']:7.2f} ms   cpu {row['cpu_median_ms']:7.2f} ms   of {row['runs']}")


if __name__ == "__main__":
    main()
