"""The programs that start vLLM servers: how they end at a signal, and what they have said and kept until then. A stand-in plays the servers, so that this runs
without vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.gateway import toy_model
from tests.gateway.conftest import until

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
import running  # noqa: E402
from running import Ended, Report, ending_in_order, whole  # noqa: E402
from world import living, shared_files  # noqa: E402

STAND_IN = ROOT / "tests" / "vllm" / "stand_in.py"


class Program:
    """One of tools/ as a process of its own, its stderr line by line."""

    def __init__(self, directory: Path, name: str, *arguments: str, slow: bool = False) -> None:
        model = directory / "model"
        model.mkdir()
        toy_model.save(model)
        temporary = Path(tempfile.mkdtemp(prefix="kvt-"))  # short: a socket's path is in it
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "vllm")])
        own = {"PYTHONPATH": paths, "KVGUARD_VLLM_PROGRAM": str(STAND_IN), "KVGUARD_VLLM_MODEL": str(model), "TMPDIR": str(temporary)}
        environment = {**os.environ, **own, **({"SLOW": "1"} if slow else {})}
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        self.temporary = temporary
        self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment, text=True)
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        for line in self.popen.stderr:
            self.lines.append(line)

    def said(self, words: str) -> bool:
        assert self.popen.poll() is None, "".join(self.lines)
        return any(words in line for line in self.lines)

    def started(self) -> list[psutil.Process]:
        """Everything that lives below it."""
        return psutil.Process(self.popen.pid).children(recursive=True)

    def stand_ins(self) -> list[psutil.Process]:
        return [one for one in self.started() if str(STAND_IN) in one.cmdline()]

    def memory(self) -> list[str]:
        """What its engines have in /dev/shm."""
        return [name for one in self.stand_ins() if Path(f"/dev/shm/{(name := f'psm_kvguard_test_{one.pid}')}").exists()]

    def ended(self, number: int, times: int = 1) -> tuple[int, str]:
        """Its exit code and stdout, after a signal; nothing that it had started is there any more."""
        processes, files = self.started(), self.memory()
        assert processes and files
        for _ in range(times):
            self.popen.send_signal(number)
        out = self.popen.stdout.read()
        code = self.popen.wait(60)
        self._reading.join(10)
        alive = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        left = [name for name in files if Path(f"/dev/shm/{name}").exists()]
        assert not alive and not left, (alive, left)
        assert not list(self.temporary.iterdir()), "what it had in its temporary directory"
        return code, out


@pytest.fixture
def program(tmp_path):
    made = []

    def make(name: str, *arguments: str, slow: bool = False) -> Program:
        made.append(Program(tmp_path, name, *arguments, slow=slow))
        return made[-1]

    yield make
    for one in made:
        if one.popen.poll() is None:
            for process in [*one.started(), one.popen]:
                process.kill()
            one.popen.wait()
        one.popen.stdout.close()
        one.popen.stderr.close()
        shutil.rmtree(one.temporary)


@pytest.mark.e2e
def test_a_measurement_that_is_ended_keeps_what_it_found(program, tmp_path):
    """SIGTERM twice, as `timeout` sends it, in the middle of the second pair or later."""
    output = tmp_path / "found.json"
    bench = program("bench_vllm.py", "--pairs", "1000", "--resumes", "0", "--streams", "2", "--tokens", "32", "-o", str(output))
    until("a pair", lambda: bench.said("pair 1 of 1000"), 120)
    kept = json.loads(output.read_text())
    assert kept["throughput"]["ratio"]["n"] >= 1 and kept["complete"] is False, "there before any signal"
    assert len(bench.stand_ins()) == 4, "two servers, each with its engine"
    code, out = bench.ended(signal.SIGTERM, times=2)
    assert code == 143, "".join(bench.lines)
    found = json.loads(out)
    assert found == json.loads(output.read_text())
    assert found["ended_by"] == "SIGTERM" and found["complete"] is False and found["throughput"]["tokens_per_s"]["bare"] > 0 and "start" in found["took_s"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "number", "code"), [("vllm_kills.py", signal.SIGINT, 130), ("demo_vllm.py", signal.SIGTERM, 143), ("bench_vllm.py", signal.SIGINT, 130)]
)
def test_a_signal_while_servers_start(program, tmp_path, name, number, code):
    """They never become ready; Ctrl-C is pressed twice."""
    output = tmp_path / "found.json"
    started = program(name, *(() if name == "demo_vllm.py" else ("-o", str(output))), slow=True)
    count = {"vllm_kills.py": 6, "demo_vllm.py": 4, "bench_vllm.py": 6}[name]
    until("servers with their engines", lambda: len(started.stand_ins()) == count and len(started.memory()) == count // 2, 120)
    assert started.ended(number, times=2)[0] == code, "".join(started.lines)
    if name != "demo_vllm.py":
        assert json.loads(output.read_text())["ended_by"] == signal.Signals(number).name


# ---- the parts, in this process ----


def test_a_signal_counts_when_what_is_whole_is_over(capsys):
    done = []
    with pytest.raises(SystemExit) as ended, ending_in_order():
        with whole():
            with whole():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert ended.value.code == 143 and done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGTERM) is not running._signals.on, "handlers are as they were"


def test_a_second_signal_does_not_cut_the_first_ones_end(monkeypatch):
    """At once, as `timeout` sends two; one that comes much later counts, because the first may have been lost in a finalizer."""
    done = []
    with pytest.raises(SystemExit) as ended, ending_in_order():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("cleaned")
            monkeypatch.setattr(running, "DEAF_S", 0.0)
            with pytest.raises(Ended):
                os.kill(os.getpid(), signal.SIGTERM)
            done.append("heard")
    assert ended.value.code == 130 and done == ["cleaned", "heard"]


def test_what_fails_on_the_way_out_is_said(capsys):
    with pytest.raises(SystemExit) as ended, ending_in_order():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise ValueError("a daemon did not end cleanly")
    assert ended.value.code == 143 and "a daemon did not end cleanly" in capsys.readouterr().err


def test_errors_without_a_signal_are_themselves():
    with pytest.raises(ValueError, match="mine"), ending_in_order():
        raise ValueError("mine")


def test_a_report_is_whole_at_every_moment(tmp_path, capsys):
    output = tmp_path / "report.json"

    def kept() -> dict:
        return json.loads(output.read_text())

    with pytest.raises(RuntimeError), Report(str(output), seed=7) as report:
        assert kept() == {"seed": 7, "complete": False}
        with report.part("first"):
            report.keep(rate=1)
        assert kept() == {"seed": 7, "complete": False, "rate": 1, "took_s": {"first": 0}}
        raise RuntimeError
    assert kept() == json.loads(capsys.readouterr().out) == {"seed": 7, "complete": False, "rate": 1, "took_s": {"first": 0}, "ended_by": "RuntimeError"}
    with Report(None) as report:
        report.keep(a=1)
    assert json.loads(capsys.readouterr().out) == {"a": 1, "complete": True}
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_who_lives_in_a_group():
    """Its leader may be gone long before the last of them; a zombie is none."""
    command = "import os, sys\nif os.fork():\n    sys.stdin.read()\nelse:\n    os.execlp('sleep', 'sleep', '600')"
    leader = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, start_new_session=True)
    try:
        until("both", lambda: len(living(leader.pid)) == 2)
        leader.stdin.close()
        until("the leader to end", lambda: len(living(leader.pid)) == 1)
        assert living(leader.pid) != [leader.pid], "it is a zombie, and not yet waited for"
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
    until("all to end", lambda: not living(leader.pid))


def test_what_a_group_has_in_shared_memory_is_found_under_the_name_that_stays():
    command = "import multiprocessing, sys; lock = multiprocessing.get_context('spawn').RLock(); print(lock._semlock.name, flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        name = "sem." + child.stdout.readline().strip().lstrip("/")
        assert shared_files(child.pid) == {name} and not shared_files(os.getpgid(0))
    finally:
        child.communicate()
    until("its own tracker to have removed it", lambda: not Path("/dev/shm", name).exists())


def test_servers_that_start_stand_still_while_a_kill_is_measured():
    sys.path.insert(0, str(ROOT / "tools"))
    import vllm_kills

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]

    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True)
    world = SimpleNamespace(servers={"smol-a": None, "smol-b": SimpleNamespace(popen=child)})
    try:
        with vllm_kills.Kills._without_starts(SimpleNamespace(world=world, _starting={"smol-b": 0.0})):
            until("it to stop", lambda: state(child.pid) == "T")
        until("it to go on", lambda: state(child.pid) != "T")
    finally:
        child.kill()
        child.communicate()
    with vllm_kills.Kills._without_starts(SimpleNamespace(world=world, _starting={"smol-b": 0.0})):
        assert child.poll() is not None, "that one has ended is told elsewhere"


def test_who_was_killed_is_asked_nothing_before_it_is_started_again():
    """Answers that differ are compared with what a living server says, in the round of the kill."""
    sys.path.insert(0, str(ROOT / "tools"))
    import vllm_kills

    servers = {name: SimpleNamespace(popen=SimpleNamespace(poll=lambda code=code: code)) for name, code in (("smol-a", -9), ("smol-b", None))}
    assert vllm_kills.Kills._alive(SimpleNamespace(world=SimpleNamespace(servers=servers), _starting={})) == ["smol-b"]


def test_a_stream_has_gone_on_with_an_id_that_was_not_on_its_way():
    sys.path.insert(0, str(ROOT / "tools"))
    import vllm_kills

    def gone_on(times: list[float], alive: bool = True) -> bool:
        return vllm_kills.Answer.has_gone_on(SimpleNamespace(times=times, thread=SimpleNamespace(is_alive=lambda: alive)), 10.0)

    assert not gone_on([]) and not gone_on([9.0, 10.1]) and gone_on([9.0, 10.5]) and gone_on([9.0], alive=False)


def test_stalls_are_read_from_logs():
    sys.path.insert(0, str(ROOT / "tools"))
    import vllm_kills

    request, other = f"kvg-{1:024x}", f"kvg-{2:024x}"
    gateway = (
        f"2026 INFO kvguard.gateway.journey: {request}: smol-b goes on after 500.0 ms: fence 100.0, recovery 60.0, placing 0.0, first_token 340.0\n"
        f"2026 INFO kvguard.gateway.journey: {other}: smol-b goes on after 700.0 ms: fence 100.0, recovery 80.0, placing 20.0, first_token 500.0\n"
    )
    engine = f"INFO kvguard: cmpl-{request}-1-0-abcd goes on from position 40: 1234 bytes in 7.5 ms\n"
    found = vllm_kills.stalls_ms(gateway, [engine])
    assert found["kvguard_ms"] == {"p50": 83.8, "p99": 99.7, "max": 100.0, "n": 2, "target": 200}
    assert found["stall_parts_ms"]["recovery"] == {"p50": 70.0, "p99": 79.8, "max": 80.0, "n": 2} and found["pull"]["max"] == 7.5
