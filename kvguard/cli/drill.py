"""kvguard drill list | run NAME... | report [ID].

Knows: scenarios, how reports are kept and shown, where a drill is carried out: on a bench of its own, or with --config or --coordinator on a live cluster.
Must not know: how faults are fired. Invariant: a live cluster is struck only where it was named on this very command line, after a yes or --yes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach, found
from kvguard.cli.options import output_option
from kvguard.errors import BadConfig, KvguardError

reports_option = click.option("--reports", type=click.Path(file_okay=False), envvar="KVGUARD_DRILL_DIR", help="Where reports are kept.")


def archive(reports: str | None):
    from kvguard.drill.archive import Archive, default_directory

    return Archive(Path(reports) if reports else default_directory())


@click.group()
def drill() -> None:
    """Faults fired on purpose, proved, and judged by what was seen."""


@drill.command("list")
@output_option
def list_(output: str) -> None:
    """All drills, and what each claims."""
    from kvguard.drill.scenarios import SCENARIOS

    if output == "json":
        names = ("name", "does", "hypothesis", "outcome", "live")
        told = [{name: getattr(one, name) for name in names} | {"proves": list(one.proves)} for one in SCENARIOS.values()]
        show.document({"schema": "kvguard.drill_list/1", "drills": told})
        return
    show.table("Drills", ["name", "what happens", "hypothesis", "live"], [[one.name, one.does, one.hypothesis, one.live] for one in SCENARIOS.values()], "none")


def drills_named(_context, _parameter, incomplete: str) -> list[str]:
    """For shell completion."""
    from kvguard.drill.scenarios import SCENARIOS

    return [name for name in ("all", *SCENARIOS) if name.startswith(incomplete)]


@drill.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=drills_named)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Which rank, when, and whatever else a fault has to choose.")
@click.option("--repeat", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Runs with so many seeds, from --seed on.")
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="The bench's model directory; without it the default model.")
@click.option("--stages", type=click.IntRange(2, 8), default=3, show_default=True, help="Of the bench.")
@click.option("--sequences", type=click.IntRange(1, 16), default=6, show_default=True, help="Of the bench's load.")
@click.option("--max-tokens", type=click.IntRange(20), default=40, show_default=True, help="Of each sequence in each wave of the bench's load.")
@click.option("--config", "file", type=click.Path(), help="Strike the live cluster that this configuration names, instead of a bench.")
@click.option("--coordinator", "address", help="Strike the live cluster of the coordinator at tcp://HOST:PORT.")
@click.option("--keys", help="File with this user's key, for a live cluster.")
@click.option("--insecure", is_flag=True, help="Ask an address off loopback without keys.")
@click.option("--timeout", type=click.FloatRange(0.1, 3600.0), default=5.0, show_default=True, help="Seconds to wait for an answer of a live cluster.")
@click.option("--dry-run", is_flag=True, help="Say what would happen.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@reports_option
@click.option("-o", "output", type=click.Choice(["table", "json", "junit"]), default="table", help="Form of the output.")
def run(names: tuple[str, ...], seed: int, repeat: int, dry_run: bool, yes: bool, reports: str | None, output: str, **given) -> None:
    """Carry out drills ("all" for every one), compare with the undisturbed run, judge, keep a report. Exit code 1 where one failed."""
    from kvguard.drill.scenarios import SCENARIOS, named

    scenarios = list(SCENARIOS.values()) if "all" in names else [named(name) for name in names]
    live = given["file"] or given["address"]
    if live and given["model"]:
        raise click.UsageError("--model is the bench's: a live cluster has its own")
    shelf = archive(reports)
    found_ = on_cluster(scenarios, seed, repeat, dry_run, yes, given) if live else on_bench(scenarios, seed, repeat, dry_run, given)
    if dry_run:
        if output == "json":
            show.document({"schema": "kvguard.drill_dry_run/1", "would": found_})
        else:
            for one in found_:
                click.echo(f"{one['name']}, seed {one['seed']}: {one['does']}")
        return
    for document in found_:
        shelf.keep(document)
    shown(found_, output)
    sys.exit(1 if any(document["failed"] for document in found_) else 0)


def on_bench(scenarios: list, seed: int, repeat: int, dry_run: bool, given: dict) -> list[dict]:
    from kvguard.drill import runner

    options = runner.Options(given["model"], given["stages"], given["sequences"], given["max_tokens"])
    if dry_run:
        said = [one for scenario in scenarios for one in runner.would(scenario, seed, repeat, options)]
        return [one | {"does": f"{one['does']}, stage {one['stage']}, after {one['at_token']} tokens of every sequence"} for one in said]
    return runner.run(scenarios, seed, repeat, options, say=lambda line: click.echo(line, err=True))


def on_cluster(scenarios: list, seed: int, repeat: int, dry_run: bool, yes: bool, given: dict) -> list[dict]:
    from kvguard.drill import cluster, documents

    reach = Reach(*found(given["file"], given["address"], given["keys"], given["insecure"]), given["timeout"])

    def confirm(consequence: str) -> None:
        if not yes:
            click.confirm(f"{consequence}. Do it?", abort=True, err=True)

    told = []
    for scenario in scenarios:
        if dry_run:
            status = cluster.demand_whole(reach)
            targets = [(number, cluster.choose(reach, scenario, number, status)) for number in range(seed, seed + repeat)]
            told += [{"name": scenario.name, "seed": number, "does": cluster.consequence(scenario, target, status)} for number, target in targets]
            continue
        runs = [documents.judged(scenario, number, "cluster", seen) for number, seen in cluster.run(reach, scenario, seed, repeat, confirm)]
        told.append(documents.document(scenario, seed, runs, {"target": "cluster", "coordinator": reach.address}))
        try:
            cluster.tell(reach, told[-1])
        except KvguardError as error:  # the drill is done and its report is worth more than this note
            click.echo(f"the coordinator could not be told of {scenario.name}: {error}", err=True)
    return told


def shown(found_: list[dict], output: str) -> None:
    """One document as it is, several under one roof."""
    from kvguard.drill import documents

    if output == "junit":
        click.echo(documents.junit(found_))
    elif output == "json":
        show.document(found_[0] if len(found_) == 1 else {"schema": "kvguard.drills/1", "drills": found_})
    else:
        for document in found_:
            documents.render(document, console())


def console():
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(width=show.WIDTH_IN_PIPES, no_color=True, highlight=False)


@drill.command()
@click.argument("wanted", required=False, metavar="[ID]")
@reports_option
@click.option("-o", "output", type=click.Choice(["table", "json", "junit"]), default="table", help="Form of the output.")
def report(wanted: str | None, reports: str | None, output: str) -> None:
    """All reports; or one, by its id or a drill's name (its newest), and what changed since the one before it."""
    from kvguard.drill.archive import difference

    shelf = archive(reports)
    if wanted is None:
        listed(shelf, output)
        return
    document = shelf.load(wanted)
    before = shelf.before(document)
    changed = difference(before, document) if before else None
    if output == "json":
        click.echo(json.dumps({**document, "difference": changed}))
        return
    shown([document], output)
    if output == "table":
        compared(changed)


def listed(shelf, output: str) -> None:
    if output == "junit":
        raise BadConfig("a list has no JUnit form. Try: kvguard drill report NAME -o junit")
    rows = [shelf.load(one) for one in shelf.ids()]
    if output == "json":
        keys = ("id", "name", "seed", "started", "passed", "failed")
        show.document({"schema": "kvguard.drill_reports/1", "reports": [{key: one[key] for key in keys} for one in rows]})
        return
    columns = ["id", "name", "started", "passed", "failed"]
    show.table("Reports", columns, [[one[key] for key in columns] for one in rows], f"none in {shelf.directory}")


def compared(changed: dict | None) -> None:
    if changed is None:
        click.echo("No earlier report of this drill.")
        return
    rows = [["passed", *changed["passed"]], ["failed", *changed["failed"]], ["rolled back, at most", *changed["rolled_back"]]]
    rows += [[f"{phase}, ms", *values] for phase, values in changed["ms"].items()]
    rows += [[name, *values] for part in ("comparisons", "invariants") for name, values in changed[part].items()]
    show.table(f"Since {changed['from']}", ["what", "then", "now"], rows, "nothing changed")
