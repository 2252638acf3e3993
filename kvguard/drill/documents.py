"""A drill's document (`kvguard.drill/1`), and the forms in which people and test runners read it.

Knows: the document's fields, rich tables, JUnit's XML. Must not know: how a drill is carried out.
Invariants: a document says what was claimed, what was seen and what follows, run by run; nothing is left out of JSON that the table shows.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime

from kvguard.drill.judgement import HELD, INVARIANTS, VIOLATED, judge
from kvguard.drill.scenarios import Scenario

SCHEMA = "kvguard.drill/1"
COMPARISONS = ("identical", "logits_identical", "kv_identical")
PHASES = ("detect", "fence", "plan", "restore", "first_token", "total")


def judged(scenario: Scenario, seed: int, target: str, seen: dict) -> dict:
    """One run's part. `seen`: the evidence, or {"error": ...}. `target`: bench | cluster."""
    run = {"fault": None, "recovery": None, "outage": None, **dict.fromkeys(COMPARISONS), "observed": {}, **seen, "seed": seed, "target": target}
    verdict = judge(scenario, run)
    run["invariants"] = {name: verdict.invariants[name].state for name in INVARIANTS}
    run["invariant_evidence"] = {name: verdict.invariants[name].why for name in INVARIANTS}
    run["failures"], run["passed"] = list(verdict.failures), verdict.passed
    return run


def document(scenario: Scenario, seed: int, runs: list[dict], about: dict, now: datetime | None = None) -> dict:
    """`about`: model, stages, sequences of a bench, or the cluster's address."""
    now = now or datetime.now(UTC)
    passed = sum(run["passed"] for run in runs)
    return {
        "schema": SCHEMA, "id": f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}-{scenario.name}-{seed}", "name": scenario.name, "seed": seed,
        "hypothesis": scenario.hypothesis, "started": now.isoformat(timespec="milliseconds"), "about": about, "runs": runs, "passed": passed,
        "failed": len(runs) - passed,
    }  # fmt: skip


def timeline(run: dict) -> str:
    """detect -> fence -> plan -> restore -> first token in ms, or how long the outage was."""
    if run["recovery"]:
        phases = run["recovery"]["ms"]
        return " -> ".join(f"{name} {phases[name]:.0f}" if phases.get(name) is not None else f"{name} -" for name in PHASES)
    if run["outage"]:
        return f"away {run['outage']['down_ms']:.0f}, {run['outage']['tokens_meanwhile']} tokens meanwhile"
    return "-"


def equality(run: dict) -> str:
    words = {True: "yes", False: "NO", None: "-"}
    return " ".join(f"{short} {words[run[key]]}" for short, key in zip(("tokens", "logits", "kv"), COMPARISONS, strict=True))


def brief(invariants: dict[str, str]) -> str:
    """The names held, and those violated."""
    held = [name for name in INVARIANTS if invariants[name] == HELD]
    violated = [name for name in INVARIANTS if invariants[name] == VIOLATED]
    return " ".join(held) + (f"  VIOLATED: {' '.join(violated)}" if violated else "")


def render(found: dict, console) -> None:
    """For people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{found['name']}: {found['passed']} of {len(found['runs'])} passed", title_justify="left")
    for column in ("seed", "fault", "fired", "rung", "rolled back", "ms", "equal to the undisturbed run", "invariants held", "result"):
        table.add_column(column)
    for run in found["runs"]:
        fault, recovered = run["fault"] or {"kind": "-", "target": "", "fired": False}, run["recovery"]
        table.add_row(
            str(run["seed"]), escape(f"{fault['kind']} {fault['target']}"), "yes" if fault["fired"] else "[red]no[/red]",
            recovered["rung"] if recovered else "-",
            str(recovered["rolled_back"]) if recovered and recovered["rolled_back"] is not None else "-",
            timeline(run), equality(run), brief(run["invariants"]),
            "[green]passed[/green]" if run["passed"] else "[bold red]FAILED[/bold red]",
        )  # fmt: skip
    console.print(f"[bold]{escape(found['hypothesis'])}[/bold]")
    console.print(table)
    for run in found["runs"]:
        for failure in run["failures"]:
            console.print(f"[red]seed {run['seed']}: {escape(failure)}[/red]")
    console.print(f"[dim]{found['id']}[/dim]")


def junit(documents: list[dict]) -> str:
    """One suite per drill, one case per run, a failure per case that failed; the invariants as properties."""
    root = ElementTree.Element("testsuites", name="kvguard drill")
    for found in documents:
        suite = ElementTree.SubElement(
            root, "testsuite", name=found["name"], id=found["id"], timestamp=found["started"], tests=str(len(found["runs"])), failures=str(found["failed"])
        )
        for run in found["runs"]:
            total = ((run["recovery"] or {}).get("ms") or {}).get("total") or (run["outage"] or {}).get("down_ms") or 0.0
            case = ElementTree.SubElement(suite, "testcase", classname=f"kvguard.drill.{found['name']}", name=f"seed {run['seed']}", time=f"{total / 1e3:.3f}")
            properties = ElementTree.SubElement(case, "properties")
            for name, state in run["invariants"].items():
                ElementTree.SubElement(properties, "property", name=name, value=state)
            if run["failures"]:
                failure = ElementTree.SubElement(case, "failure", message=run["failures"][0])
                failure.text = "\n".join(run["failures"])
            told = ElementTree.SubElement(case, "system-out")
            told.text = "\n".join([found["hypothesis"], timeline(run), equality(run), *(f"{name}: {why}" for name, why in run["invariant_evidence"].items())])
    ElementTree.indent(root)
    out = io.BytesIO()
    ElementTree.ElementTree(root).write(out, encoding="utf-8", xml_declaration=True)
    return out.getvalue().decode()
