"""A script that generates is killed and started again, with real daemons: the ids, the logits and the KV bytes of a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import transformers_script  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("transformers_script.py")
RANK = "0.0.0"
START_S = 240.0  # importing torch and transformers on a machine that is busy
WATCHED = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 40, "temperature": 0.8}


def call(family: str, rows: int, new: int, hold_at: int, **options) -> dict:
    return {"family": family, "rows": rows, "columns": 9, "padded": rows > 1, "hold_at": hold_at, "options": {"max_new_tokens": new, **WATCHED, **options}}


class Script:
    """The user's process."""

    def __init__(self, cluster, node: str, what: dict, script: Path = SCRIPT) -> None:
        arguments = [sys.executable, str(script), json.dumps(what), str(cluster.directory / node / "kvguard.sock"), cluster.coordinator_address]
        with open(cluster.directory / f"script-{time.monotonic_ns()}.log", "ab") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "bufsize": 0}  # unbuffered: select() sees every line
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # packages may come by it
            self.popen = subprocess.Popen(arguments, env=environment, **pipes)
        self.heard: list[dict] = []

    def hear(self) -> dict:
        ready, _, _ = select.select([self.popen.stdout], [], [], START_S)
        assert ready, f"the script says nothing after {self.heard[-3:]}"
        line = self.popen.stdout.readline()
        assert line, f"the script ended with {self.popen.wait()} after {self.heard[-3:]}"
        self.heard.append(json.loads(line))
        return self.heard[-1]

    def until(self, key: str, value=None) -> dict:
        while not (key in (said := self.hear()) and value in (None, said[key])):
            pass
        return said

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        assert self.popen.wait() == -signal.SIGKILL
        assert not any({"sequences", "answers", "end"} & said.keys() for said in self.heard), "it had answered before it was killed"

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self.popen.stdout.close()


@pytest.fixture
def scripts(cluster, request):
    started: list[Script] = []

    def start(node: str, what: dict) -> Script:
        started.append(Script(cluster, node, what))
        return started[-1]

    # Patience for a machine that is busy: importing torch alone may take a minute there. Detection is tested elsewhere.
    cluster.configure_coordinator(standby_ms=1000 if "late" in request.node.name else 600_000, emitter_ms=10_000)
    cluster.start()
    cluster.until("both nodes", lambda: len(cluster.ask("coordinator", "status")["nodes"]) == 2)
    yield start
    for script in started:
        script.close()


def undisturbed(what: dict) -> dict:
    """The stock cache's answer, here: on one thread, as the script."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return transformers_script.plain(what)
    finally:
        torch.set_num_threads(before)


def assert_undisturbed(found: dict, wanted: dict) -> None:
    """All ids, the logits of what was generated since, and every column's KV."""
    assert found["sequences"] == wanted["sequences"]
    assert found["logits"] and found["logits"] == wanted["logits"][-len(found["logits"]) :]
    assert found["kv"] == wanted["kv"]


def kill_known(cluster, script) -> None:
    """Kill it once the coordinator has heard of it, and the test may ask it at once what follows."""
    cluster.until("the rank", lambda: cluster.rank(RANK))
    script.kill()


def test_a_killed_script_goes_on_in_its_own_pool(cluster, scripts):
    what = call("llama", 2, 40, 12, **SAMPLED)
    first = scripts("a", what)
    shown = [first.until("token", n)["ids"] for n in range(1, 13)]
    kill_known(cluster, first)
    second = scripts("a", {**what, "hold_at": -1})
    assert second.until("joined") == {"joined": True, "unprotected": ""}
    found, wanted = second.until("sequences"), undisturbed(what)
    assert_undisturbed(found, wanted)
    assert [list(column) for column in zip(*(row[9:21] for row in wanted["sequences"]), strict=True)] == shown  # what the first life showed is part of it
    assert (found["rungs"], found["resumed_at"], found["recomputed"], found["unprotected"]) == (["pool"], 9 + 12 - 1, 0, "")
    assert len(found["logits"]) == 40 - 12
    [entry] = cluster.ask("coordinator", "history")["history"]
    assert (entry["error"], entry["lost"], set(entry["positions"].values())) == ("", {}, {20})


def test_killed_when_its_own_criterion_had_just_stopped_it(cluster, scripts):
    """The table has the last id; it is taken back, and chosen again."""
    what = call("llama", 1, 30, -1, **SAMPLED)
    ids = undisturbed(what)["sequences"][0][9:]
    count = next(n for n in range(6, 30) if ids[n - 1] not in ids[: n - 1])
    what = {**what, "after": ids[count - 1], "hold_at": count}
    first = scripts("a", what)
    first.until("token", count)
    kill_known(cluster, first)
    second = scripts("a", {**what, "hold_at": -1})
    found = second.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert (found["rungs"], len(found["sequences"][0]), found["unprotected"]) == (["pool"], 9 + count, "")


def test_a_lost_node_s_script_goes_on_from_the_replica(cluster, scripts):
    what = call("gpt2", 2, 60, 25)
    first = scripts("a", what)
    first.until("token", 25)
    cluster.protected(RANK, 2 * (9 + 25 - 1))
    cluster.kill("a")
    first.kill()
    second = scripts("b", {**what, "hold_at": -1, "sizes": {"sequences": 3, "positions": 120}})  # where less fits: blocks are named anew
    found = second.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert (found["rungs"], found["resumed_at"], found["recomputed"]) == (["replica"], 33, 0)


@pytest.fixture(params=["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_a_gpu(request, cluster) -> str:
    """The kind of device that the daemons' and scripts' pools are on; asked for before `scripts` starts the daemons."""
    (cluster.directory / "conf.d").mkdir()
    (cluster.directory / "conf.d" / "gpu.toml").write_text(f'[node]\ndevice = "{request.param}"\nring_bytes = 1048576\n')
    return request.param


@pytest.mark.parametrize("lost", ["process", "node"])
def test_what_was_on_a_gpu_comes_back(cluster, on_a_gpu, scripts, lost):
    """Salvaged, or pulled layer by layer. Compared with an undisturbed life of the same script; a rehearsed one with the stock cache."""
    what = {**call("llama", 2, 40, 12, **SAMPLED), "device": on_a_gpu}
    first = scripts("a", what)
    first.until("token", 12)
    cluster.protected(RANK, 2 * (9 + 12 - 1))
    if lost == "node":
        cluster.kill("a")
    first.kill()
    second = scripts("b" if lost == "node" else "a", {**what, "hold_at": -1})
    found = second.until("sequences")
    wanted = undisturbed(what) if on_a_gpu == "rehearsal" else scripts("b", {**what, "hold_at": -1, "instance": "calm"}).until("sequences")
    assert_undisturbed(found, wanted)
    assert found["rungs"] == ["replica" if lost == "node" else "pool"]
    assert (found["resumed_at"], found["recomputed"], found["unprotected"]) == (20, 0, "")


def test_killed_at_any_moment_and_twice(cluster, scripts):
    """Not at rest: whatever it was doing when the signal came."""
    what = call("llama", 3, 150, -1, **SAMPLED)
    first = scripts("a", what)
    first.until("token", 30)
    first.kill()
    second = scripts("a", {**what, "hold_at": 20})
    second.until("token", 20)
    second.kill()
    third = scripts("a", {**what, "hold_at": -1})
    found = third.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert found["recomputed"] == 0 and found["rungs"] == ["pool"]
    assert [entry["epoch"] for entry in cluster.ask("coordinator", "history")["history"]] == [1, 2]


def test_a_clean_end_leaves_nothing_and_a_second_process_takes_nothing(cluster, scripts):
    what = call("llama", 1, 12, 6)
    first = scripts("a", what)
    first.until("token", 6)
    second = scripts("b", {**what, "hold_at": -1, "wait_s": 1.0})  # the same name, while the first one lives
    joined = second.until("joined")
    assert not joined["joined"] and "lives as 'essay'" in joined["unprotected"]
    wanted = undisturbed(what)
    assert_undisturbed(second.until("sequences"), wanted)
    first.popen.stdin.write(b"go on\n")
    first.popen.stdin.flush()
    found = first.until("sequences")
    assert_undisturbed(found, wanted)
    assert found["unprotected"] == "" and first.popen.wait(60) == 0
    cluster.until("nobody left", lambda: not cluster.ask("coordinator", "status")["ranks"])
    assert cluster.ask("coordinator", "history")["history"] == []
    third = scripts("a", {**what, "hold_at": -1})
    assert third.until("joined") == {"joined": False, "unprotected": ""}
    assert_undisturbed(third.until("sequences"), wanted)


def test_another_model_takes_nothing_over(cluster, scripts):
    what = call("llama", 1, 30, 10)
    first = scripts("a", what)
    first.until("token", 10)
    kill_known(cluster, first)
    other = scripts("a", {**what, "family": "gpt2", "hold_at": -1, "wait_s": 4.0})
    joined = other.until("joined")
    assert not joined["joined"] and "can't be taken over" in joined["unprotected"]
    assert_undisturbed(other.until("sequences"), undisturbed({**what, "family": "gpt2"}))  # it answers all the same
    again = scripts("a", {**what, "hold_at": -1})
    found = again.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert found["rungs"] == ["pool"]


def test_killed_before_anything_was_computed(cluster, scripts):
    """There is a former life to follow, and nothing to go on with."""
    what = call("llama", 1, 10, 0)  # stands still when it is shown the prompt
    first = scripts("a", what)
    first.until("joined")
    kill_known(cluster, first)
    second = scripts("a", {**what, "hold_at": -1})
    assert second.until("joined") == {"joined": False, "unprotected": ""}
    found = second.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert found["unprotected"] == "" and found["resumed_at"] is None


def test_a_script_that_comes_back_late_orders_its_own_recovery(cluster, scripts):
    """Its recovery waited for a standby for `standby_ms`, and had failed."""
    what = call("gpt2", 2, 30, 8, **SAMPLED)
    first = scripts("a", what)
    first.until("token", 8)
    kill_known(cluster, first)

    def failed() -> bool:
        return [instance["state"] for instance in cluster.ask("coordinator", "status")["instances"]] == ["failed"]

    cluster.until("the recovery given up", failed, 60.0)
    second = scripts("a", {**what, "hold_at": -1})
    found = second.until("sequences")
    assert_undisturbed(found, undisturbed(what))
    assert (found["rungs"], found["recomputed"]) == (["pool"], 0)
    failed_entry, entry = cluster.ask("coordinator", "history")["history"]
    assert failed_entry["error"] and not entry["error"]
