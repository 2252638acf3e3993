"""Reports of drills, kept: one JSON file each in a state directory.

Knows: where state belongs, documents' ids. Must not know: how drills are carried out or shown.
Invariants: a report is there whole or not at all; an id is never a path; what can't be read is named, not skipped silently.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from kvguard.drill.documents import COMPARISONS, PHASES, SCHEMA
from kvguard.errors import BadConfig, KvguardError

ID = re.compile(r"\d{8}T\d{6}\.\d{3}-[a-z-]+-\d+")
SYSTEM = Path("/var/lib/kvguard/drills")


class UnknownReport(KvguardError):
    exit_code = 2


def default_directory() -> Path:
    """KVGUARD_DRILL_DIR, else the system's state directory for root, else the user's."""
    told = os.environ.get("KVGUARD_DRILL_DIR")
    if told:
        return Path(told)
    if os.geteuid() == 0:
        return SYSTEM
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvguard" / "drills"


class Archive:
    """All reports in one directory, oldest first. Raises BadConfig where it can't be used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def keep(self, document: dict) -> Path:
        """Written beside and moved into place, so that a reader never finds half of it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"{document['id']}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise BadConfig(f"the report can't be kept in {self.directory}: {error.strerror}. Try: --reports DIR") from error
        return path

    def ids(self) -> list[str]:
        """Oldest first: ids begin with their time."""
        return sorted(path.stem for path in self.directory.glob("*.json") if ID.fullmatch(path.stem)) if self.directory.is_dir() else []

    def load(self, wanted: str) -> dict:
        """By id, or by a drill's name: its newest. Raises UnknownReport, BadConfig for a file that isn't a report."""
        named = [one for one in self.ids() if wanted in (one, name_of(one))]
        if not named:
            raise UnknownReport(f"no report {wanted!r} in {self.directory}. Try: kvguard drill report")
        path = self.directory / f"{named[-1]}.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError(f"its schema is {document['schema']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadConfig(f"{path} is not a drill's report: {error}. Try: remove it") from error
        return document

    def before(self, document: dict) -> dict | None:
        """The one of the same drill before this one."""
        earlier = [one for one in self.ids() if name_of(one) == document["name"] and one < document["id"]]
        return self.load(earlier[-1]) if earlier else None


def name_of(report: str) -> str:
    """The drill's name in an id: TIME-NAME-SEED."""
    return report.split("-", 1)[1].rpartition("-")[0]


def difference(old: dict, new: dict) -> dict:
    """What changed from one report of a drill to the next: counts, comparisons and invariants that differ, phases in ms (medians of the runs)."""
    changed: dict = {"from": old["id"], "to": new["id"], "passed": [old["passed"], new["passed"]], "failed": [old["failed"], new["failed"]]}
    changed["comparisons"] = {key: [a, b] for key in COMPARISONS if (a := _worst_of(old, key)) != (b := _worst_of(new, key))}
    names = new["runs"][0]["invariants"] if new["runs"] else {}
    changed["invariants"] = {name: [a, b] for name in names if (a := _state(old, name)) != (b := _state(new, name))}
    phases = {phase: [_median(old, phase), _median(new, phase)] for phase in PHASES}
    changed["ms"] = {phase: pair for phase, pair in phases.items() if None not in pair}
    changed["rolled_back"] = [_most(old), _most(new)]
    return changed


def _worst_of(document: dict, key: str) -> bool | None:
    values = [run[key] for run in document["runs"]]
    return False if False in values else None if None in values or not values else True


def _state(document: dict, name: str) -> str:
    states = {run["invariants"][name] for run in document["runs"]}
    return next((state for state in ("violated", "not_checked", "held") if state in states), "not_checked")


def _median(document: dict, phase: str) -> float | None:
    values = sorted(ms for run in document["runs"] if run["recovery"] and (ms := run["recovery"]["ms"].get(phase)) is not None)
    return values[len(values) // 2] if values else None


def _most(document: dict) -> int | None:
    return max((run["recovery"]["rolled_back"] for run in document["runs"] if run["recovery"] and run["recovery"]["rolled_back"] is not None), default=None)
