"""When each drill was last run against this cluster, and whether it passed: what the alert on a missing rehearsal looks at.

Knows: the journal. Must not know: what a drill does (kvguard/drill tells the outcome). Invariants: durable before it is answered; DRILLS_MAX names at most.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from kvguard.daemon.journal import Journal
from kvguard.errors import Refused
from kvguard.limits import NAME_BYTES_MAX

PREFIX = "drill/"
DRILLS_MAX = 64


class Outcome(NamedTuple):
    """`at_s`: seconds since 1970 by the clock of who ran it."""

    passed: bool
    at_s: float


class Drilled:
    """The last outcome of each drill by name."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.outcomes = {key.removeprefix(PREFIX): Outcome(**json.loads(value)) for key, value in journal.load().items() if key.startswith(PREFIX)}

    def told(self, arguments: dict) -> dict:
        """The verb `drilled`: {"name", "passed", "at_s"}. Raises Refused, ValueError, KeyError, TypeError."""
        name, outcome = arguments["name"], Outcome(arguments["passed"], float(arguments["at_s"]))
        if not isinstance(name, str) or not 0 < len(name.encode()) <= NAME_BYTES_MAX or type(outcome.passed) is not bool:
            raise ValueError(f"a drill's name is 1 to {NAME_BYTES_MAX} bytes, passed true or false")
        if name not in self.outcomes and len(self.outcomes) >= DRILLS_MAX:
            raise Refused(f"{DRILLS_MAX} drills are remembered already. Try: a name of `kvguard drill list`")
        self._journal.persist(PREFIX + name, json.dumps(outcome._asdict()).encode())
        self.outcomes[name] = outcome
        return {"noted": name}


def without(values: dict[str, bytes]) -> dict[str, bytes]:
    """The journal's facts that are the core's."""
    return {key: value for key, value in values.items() if not key.startswith(PREFIX)}
