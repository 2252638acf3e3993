"""Whole engines with their pools on the GPU: the reference engine (`kvguard demo`) and the transformers adapter, each killed, each compared bit by bit.

Knows: the demo's command line and document, the adapter's tests. Must not know: how a step is reported.
Invariants: nothing is fetched from anywhere: SmolLM2's own weights where they are in the cache, else random ones of the same shape from a seed, and the result
says which; ids, logits and KV must be equal, or the step fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_steps import ROOT, Bench, needed, tested

SEED = 20
DEMO_S = 70
# SmolLM2-135M's, from its config.json; a context as long as the demo needs.
SMOLLM2 = {"layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "inner": 1536, "vocab": 49152, "context": 2048}
TINY = {"layers": 4, "context": 512}
KILLS = {"rank": "pool", "node": "replica"}  # what is killed -> where the KV then comes from


def models(bench: Bench) -> dict:
    """The reference engine with a rank and with a node killed, and transformers' generate() with its process and with its node killed."""
    for package in ("torch", "safetensors", "transformers"):
        needed(package)
    with tempfile.TemporaryDirectory(prefix="kvguard-gpu-models.") as folder:
        model, weights = model_of(bench, Path(folder))
        found: dict[str, object] = {"weights": weights}
        faults: list[str] = []
        for kill, rung in KILLS.items():
            try:
                found[f"demo_kill_{kill}"] = demonstrated(bench, model, kill, rung, Path(folder))
            except AssertionError as fault:  # said at the end: the others are worth knowing, too
                faults.append(str(fault))
            print(faults[-1:] or found, flush=True)
    selection = "on_a_gpu and rehearsal" if bench.dry else "on_a_gpu and cuda"
    found["transformers"] = tested("tests/adapters/test_transformers_resume.py", "-k", selection)["pytest"]
    assert not faults, "; ".join(faults)
    return found


def model_of(bench: Bench, folder: Path) -> tuple[Path, str]:
    """A model's directory, and whose weights are in it."""
    from kvguard.pipeline.smollm2 import CACHE_NAME, default_cache
    from kvguard.pipeline.weights import make_random

    cached = default_cache() / CACHE_NAME
    if cached.is_dir() and not bench.dry:
        return cached, "SmolLM2-135M-Instruct"
    shape = TINY if bench.dry else SMOLLM2
    return make_random(folder / "model", "llama", SEED, **shape), f"random, seed {SEED}, {'a toy' if bench.dry else 'the shape of SmolLM2-135M'}"


def demonstrated(bench: Bench, model: Path, kill: str, rung: str, folder: Path) -> str:
    """One demo. Raises AssertionError with what differed, and the end of what it said."""
    arguments = ["--model", str(model), "--device", bench.kind, "--stages", "2", "--sequences", "4", "--kill", kill, "--at-token", "10", "--max-tokens", "32"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "kvguard.cli", "demo", *arguments, "-o", "json"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=None if bench.dry else DEMO_S)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"the demo with {kill} killed took longer than {DEMO_S} s: {logs(folder)}") from late
    said = done.stderr[-800:] + logs(folder)
    assert done.stdout.strip(), f"the demo with {kill} killed gave no document: {said}"
    document = json.loads(done.stdout)
    equal = {name: document[name] for name in ("identical", "logits_identical", "kv_identical")}
    assert done.returncode == 0 and set(equal.values()) == {True}, f"{kill} killed: {equal}, {document['conflicts'][:3]} {said}"
    recovery = document["recovery"]
    assert document["fault"]["fired"] and recovery["rung"] == rung and document["device"] == bench.kind, f"{kill} killed: {recovery}"
    ms = recovery["ms"]
    return f"identical, from {recovery['rung']}, rolled back {recovery['rolled_back']}, restore {ms['restore']:.0f} ms, total {ms['total']:.0f} ms"


def logs(folder: Path) -> str:
    """The end of what each process of the demo has said."""
    return "".join(f"\n{log.name}: {log.read_text(errors='replace')[-600:]}" for log in sorted(folder.glob("kvguard-demo.*/logs/*.log")))
