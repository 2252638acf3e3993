"""One step of the GPU check in a process of its own: gpu_step.py NAME RESULT.json [--dry-run]. What it found is in the file, what it said on its outputs.

Knows: which function is which step, what of a result may be said. Must not know: deadlines, the report.
Invariants: a step that raises leaves a result that says so; one that is ended before leaves none; a dry run states no number.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_about import machine
from gpu_basics import basics
from gpu_decode import decode_overhead
from gpu_models import models
from gpu_steps import STEPS, Bench, NotRun

ALL: dict[str, Callable[[Bench], dict]] = {"basics": basics, "decode": decode_overhead, "models": models, **STEPS}


def carried_out(step: Callable[[Bench], dict], dry: bool) -> dict:
    """`step`'s result. Measured values are left out of a dry run: host memory says nothing about a GPU."""
    began = time.monotonic()
    try:
        measured = step(Bench(dry))
    except NotRun as reason:
        return {"status": "not run", "reason": str(reason)}
    except Exception as error:  # the report says it, and the next step runs
        traceback.print_exc()
        return {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:2000]}
    return {"status": "pass", "seconds": None if dry else round(time.monotonic() - began, 1), "measured": {} if dry else measured}


def main(name: str, result: str, *options: str) -> None:
    dry = "--dry-run" in options
    found = machine(dry) if name == "machine" else carried_out(ALL[name], dry)
    made = Path(result).with_suffix(".part")
    made.write_text(json.dumps(found, default=str))
    made.rename(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
