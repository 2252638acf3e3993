"""kvguard demo as a user runs it, in real processes with a small random model: every kind of kill, every comparison, the negative control.

Knows: interfaces.md's document and exit codes. Must not know: how the demo works.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvguard.pipeline import demo as demos
from kvguard.pipeline.weights import make_random

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random(tmp_path_factory.mktemp("model"), "llama", seed=1, layers=6, context=2048)


def demo(model: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "kvguard.cli", "demo", "--model", str(model), "-o", "json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, check=False)
    if not done.stdout.strip():
        return done.returncode, {}, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def equal_in_all(document: dict) -> bool:
    return document["identical"] is True and document["logits_identical"] is True and document["kv_identical"] is True


@pytest.mark.parametrize(
    "kill, arguments, rung",
    [
        ("node", ("--stages", "3", "--sequences", "8", "--at-token", "8"), "replica"),
        ("node", ("--stages", "2", "--seed", "5", "--at-token", "20"), "replica"),
        ("rank", ("--stages", "4", "--sequences", "3", "--at-token", "12", "--seed", "3"), "pool"),
        ("driver", ("--stages", "2", "--sequences", "8", "--at-token", "15"), "pool"),
    ],
)
def test_what_was_killed_comes_back_identical(model, tmp_path, kill, arguments, rung) -> None:
    code, document, err = demo(model, tmp_path, "--kill", kill, "--max-tokens", "40", *arguments)
    assert code == 0, err + json.dumps(document, indent=1)[:4000]
    assert document["fault"]["fired"] and document["fault"]["kind"] == kill and equal_in_all(document)
    recovery = document["recovery"]
    assert recovery["rung"] == rung and recovery["epoch"] >= 1 and recovery["lost_sequences"] == 0
    assert recovery["rolled_back"] <= (1 if kill == "node" else 0)
    assert all(len(tokens) == 40 for tokens in document["tokens_after"]) and document["tokens_before"] == document["tokens_after"]
    assert set(recovery["ms"]) == {"detect", "fence", "plan", "restore", "first_token", "total"} and None not in recovery["ms"].values()
    assert not os.listdir(tmp_path), "the demo leaves nothing behind"


@pytest.mark.parametrize("device", ["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_node_s_pool_on_a_gpu_comes_back_identical(model, tmp_path, device) -> None:
    """Every process in its usual place, pools by the CUDA device's code: packed, captured, pulled layer by layer."""
    arguments = ("--device", device, "--kill", "node", "--stages", "2", "--sequences", "2", "--at-token", "8", "--max-tokens", "24")
    code, document, err = demo(model, tmp_path, *arguments)
    assert code == 0, err + json.dumps(document, indent=1)[:4000]
    assert document["device"] == device and document["fault"]["fired"] and equal_in_all(document)
    assert document["recovery"]["rung"] == "replica" and not os.listdir(tmp_path)


@pytest.mark.parametrize("kill", ["daemon", "coordinator"])
def test_an_outage_of_kvguard_itself_raises_no_epoch(model, tmp_path, kill) -> None:
    code, document, err = demo(model, tmp_path, "--kill", kill, "--max-tokens", "1800", "--at-token", "10", "--stages", "2", "--sequences", "2")
    assert code == 0, err + json.dumps(document, indent=1)[:4000]
    assert document["recovery"] is None and equal_in_all(document)
    outage = document["outage"]
    assert outage["kind"] == kill and outage["tokens_meanwhile"] > 0 and outage["epoch_before"] == outage["epoch_after"]
    assert outage["acked_after"] > outage["acked_before"]


def test_killed_between_the_chunks_of_a_long_prompt(model, tmp_path) -> None:
    code, document, err = demo(model, tmp_path, "--kill", "node", "--at-token", "0", "--stages", "2", "--max-tokens", "6", "--prompt-ids", "1000")
    assert code == 0, err + json.dumps(document, indent=1)[:4000]
    assert document["prompt_tokens"] == 1000 and document["fault"]["fired"] and document["identical"] and document["logits_identical"]
    assert document["kv_identical"] in (True, None)  # null where nothing had been protected yet


def test_the_negative_control_is_told(model, tmp_path) -> None:
    code, document, _ = demo(model, tmp_path, "--kill", "node", "--corrupt", "replica", "--max-tokens", "30", "--at-token", "10", "--stages", "2")
    assert code == 1 and document["corruption"]["fired"] and document["kv_identical"] is False


def test_a_damaged_frame_is_detected_and_sent_again(model, tmp_path) -> None:
    code, document, err = demo(model, tmp_path, "--kill", "none", "--corrupt", "frame", "--max-tokens", "30", "--stages", "2")
    assert code == 0, err
    assert document["corruption"] == {"kind": "frame", "fired": True, "detected": True} and equal_in_all(document)
    assert document["fault"] is None and document["recovery"] is None


@pytest.mark.parametrize(
    "arguments, code",
    [
        (("--kill", "rank", "--corrupt", "replica"), 2),
        (("--at-token", "60", "--max-tokens", "60"), 2),
        (("--tp", "2"), 2),
        (("--stages", "7"), 2),  # the model has six layers
    ],
)
def test_wrong_use_is_told_before_anything_starts(model, tmp_path, arguments, code) -> None:
    found, document, err = demo(model, tmp_path, *arguments)
    assert (found, document) == (code, {}) and err and not os.listdir(tmp_path)


def test_a_directory_that_is_no_model(tmp_path) -> None:
    code, document, err = demo(tmp_path, tmp_path)
    assert code == 78 and "config.json" in err and "Try:" in err


@pytest.mark.parametrize("fault", ["no JSON", "no object", "another family", "truncated", "no weights"])
def test_a_model_that_cannot_be_run_is_bad_configuration(model, tmp_path, fault) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    described, weights = broken / "config.json", broken / "model.safetensors"
    if fault in ("no JSON", "no object"):
        described.write_text("{" if fault == "no JSON" else "[]")
    elif fault == "another family":
        described.write_text(described.read_text().replace("llama", "mamba"))
    elif fault == "truncated":
        os.truncate(weights, weights.stat().st_size - 1000)
    else:
        weights.unlink()
    code, _, err = demo(broken, tmp_path, "--stages", "2")
    assert code == 78 and "Try: " in err and "Traceback" not in err, err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_stopped_leaves_nothing_behind(model, tmp_path, monkeypatch, number) -> None:
    """What SIGKILL gave no time to remove, the next demo removes."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "KVGUARD_STOPPED_DEMO": str(tmp_path)}
    command = [sys.executable, "-m", "kvguard.cli", "demo", "--model", str(model), "--stages", "2", "--max-tokens", "500", "--kill", "none"]
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background may have it ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeding)
    until("the first run", lambda: "the undisturbed run" in process.stderr.readline())
    assert len(alive(tmp_path)) > 5
    process.send_signal(number)
    process.communicate(timeout=60)
    until("no process", lambda: not alive(tmp_path))
    if number == signal.SIGKILL:
        (left,) = os.listdir(tmp_path)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        demos.own_directory()
        (fresh,) = os.listdir(tmp_path)
        assert fresh != left
    else:
        assert os.listdir(tmp_path) == [] and process.returncode == (143 if number == signal.SIGTERM else 1)


def alive(tmp_path: Path) -> list[int]:
    """Processes whose environment has this test's mark."""
    mark, found = f"KVGUARD_STOPPED_DEMO={tmp_path}".encode(), []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
        except OSError:
            continue  # it has just ended, or is another user's
    return found


def until(what: str, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # between two looks at a condition with a deadline
