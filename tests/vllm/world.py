"""Two vLLM servers of one model, a kvguard node beside each, a coordinator: real processes on loopback. For tests, and by hand:

    PYTHONPATH=. $(tools/setup_vllm.sh) tests/vllm/world.py DIRECTORY     prints one JSON line with all addresses when everything is ready, ends with its stdin

Knows: command lines, configuration files. Must not know: what is tested. Nothing of it outlives `stop`: not a process, nor what killed engines leave in /dev/shm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from kvguard import config
from kvguard.errors import KvguardError
from kvguard.pipeline.ports import free_ports
from kvguard.transport.ask import ask

sys.path.insert(0, str(Path(__file__).resolve().parent))
from running import ending_in_order, whole

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smol"
READY_S = 600.0
GONE_S = 30.0  # how long the memory of killed processes takes to be torn down, on a machine that has no time for it
# How a server is started; another program with the same options stands in for it in test_programs.py.
PROGRAM = os.environ.get("KVGUARD_VLLM_PROGRAM", "-m vllm.entrypoints.openai.api_server").split()
LEFT_BY_ENGINES = ("psm_", "vllm_dist_", "sem.mp-")
MAPPED = re.compile(r"(\d+)\s+/dev/shm/")  # a file's inode


def model_directory() -> str:
    """SmolLM2's: $KVGUARD_VLLM_MODEL (tools/test_vllm.sh sets it), else the cache's."""
    given = os.environ.get("KVGUARD_VLLM_MODEL")
    if given:
        return given
    from kvguard.pipeline.smollm2 import CACHE_NAME, default_cache

    return str(default_cache() / CACHE_NAME)


def shared_files(group: int) -> set[str]:
    """What the processes of a group have mapped of engines' files in /dev/shm: other engines on this machine have theirs there, too.

    Told by inode: the C library maps a semaphore before it gives it its name.
    """
    mapped: set[str] = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                mapped.update(MAPPED.findall((entry / "maps").read_text()))
    with os.scandir("/dev/shm") as files:
        return {file.name for file in files if file.name.startswith(LEFT_BY_ENGINES) and str(file.inode()) in mapped}


def living(group: int) -> list[int]:
    """The processes of a group that have not ended: one that is killed lives until its memory is torn down."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                state, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(its) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def weighted(pid: int) -> None:
    """What the units' CPUWeight=1000 gives a daemon beside engines that take every core, where this user may give it, and this kernel weighs sessions.

    The session must be the process's own: whatever else is in it (a user's shell) would get the weight, too, and keep it.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-10")


class Server:
    """One vLLM server of an instance, in a process group of its own."""

    def __init__(self, popen: subprocess.Popen, url: str, log: Path) -> None:
        self.popen, self.url, self.log = popen, url, log
        self._shared: set[str] = set()

    def kill_worker(self, pid: int) -> None:
        """SIGKILL to one of its processes alone. What becomes of the others is not ours to do."""
        self._shared |= shared_files(self.popen.pid)
        os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to all of its processes, until none is left (GONE_S at most); what only they had in /dev/shm goes with them."""
        theirs = self._shared | shared_files(self.popen.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        deadline = time.monotonic() + GONE_S
        while living(self.popen.pid) and time.monotonic() < deadline:
            time.sleep(0.02)  # between two looks at a condition with a deadline
        for name in theirs:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/{name}")

    def end(self) -> None:
        """As kill(), but stopped first: one that is starting could make another file between the look and its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGSTOP)
        self.kill()

    def post(self, path: str, body: dict, headers: dict | None = None, timeout_s: float = 120.0):
        """The open response of a POST."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})
        return urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310 (loopback)

    def complete(self, prompt: list[int] | str, tokens: int, name: str, **more) -> dict:
        """One greedy completion, whole, with token ids."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
        with self.post("/v1/completions", body, {"X-Request-Id": name}) as answer:
            return json.load(answer)

    def stream(self, prompt: list[int] | str, tokens: int, name: str, silent_s: float = 120.0, **more):
        """Yields (ids, text) as they come; ends when the server does, or has said nothing for `silent_s`."""
        body = {
            "model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True, **more,
        }  # fmt: skip
        with contextlib.suppress(OSError, ValueError), self.post("/v1/completions", body, {"X-Request-Id": name}, silent_s) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    yield choices[0].get("token_ids") or [], choices[0].get("text") or ""


class World:
    """`nodes`: daemon by name, `servers`: vLLM by instance. The instance smol-a lives beside node a, and so on."""

    def __init__(self, directory: Path, names: tuple[str, ...] = ("a", "b"), arena_bytes: int = 1 << 30, **coordinator) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        ports = free_ports(1 + 2 * len(names))
        self.coordinator = f"tcp://127.0.0.1:{ports[0]}"
        self.addresses = {name: f"tcp://127.0.0.1:{port}" for name, port in zip(names, ports[1:], strict=False)}
        self._http = dict(zip(names, ports[1 + len(names) :], strict=True))
        self.running: dict[str, subprocess.Popen] = {}
        self.servers: dict[str, Server] = {}
        self.fronts: list = []  # whatever stands before the servers, and is to be stopped before them
        # On a machine that runs other things, too, a daemon may be silent for seconds; what is killed here is seen by its process, not by silence.
        patient = {"suspect_ms": 2000, "dead_ms": 10_000, "emitter_ms": 20_000}
        own = {"listen": self.coordinator, "state_dir": str(self.directory / "coordinator"), **patient, **coordinator}
        self._write(config.CoordinatorConfig, "coordinator", own)
        for name, address in self.addresses.items():
            values = {"name": name, "listen": address, "coordinator": self.coordinator, "runtime_dir": str(self.directory / name)}
            # A machine that runs other things, too, may need long for a step.
            self._write(config.NodeConfig, name, {**values, "arena_bytes": arena_bytes, "fault_injection": True, "hang_ms": 300_000})

    def _write(self, cls, name: str, values: dict) -> None:
        (self.directory / f"{name}.toml").write_text(config.template(cls, values))

    # ---- daemons ------------------------------------------------------------------------------------------------------------------

    def start_daemons(self, *names: str) -> None:
        """The named ones (all without names); waits until the coordinator knows the nodes."""
        for name in names or ("coordinator", *self.addresses):
            verb = "coordinator" if name == "coordinator" else "node"
            with open(self.directory / f"{name}.log", "ab") as log, whole():
                arguments = [sys.executable, "-m", "kvguard.cli", verb, "--config", str(self.directory / f"{name}.toml")]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                self.running[name] = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
                )
                weighted(self.running[name].pid)
        self.until("nodes", lambda: len([one for one in self.status()["nodes"] if one["state"] == "alive"]) >= len(self.addresses))

    def status(self) -> dict:
        return ask(self.coordinator, "status", {}, timeout=5.0)

    def rank(self, instance: str) -> dict | None:
        """The instance's rank in the coordinator's status."""
        return next((one for one in self.status()["ranks"] if one["instance"] == instance and one["state"] != "standby"), None)

    # ---- servers ------------------------------------------------------------------------------------------------------------------

    def start_server(
        self, name: str, *arguments: str, wait: bool = True, kvguard: bool = True, extra: dict | None = None, env: dict | None = None,
        python: str = sys.executable, model: str = "",
    ) -> Server:  # fmt: skip
        """vLLM for the instance smol-`name` beside node `name`. `kvguard` false: without the connector. `python`: of another environment that has vLLM.
        `model`: a directory, instead of SmolLM2's."""
        port = self._http[name]
        url = f"http://127.0.0.1:{port}"
        command = [
            python, *PROGRAM, "--model", model or model_directory(), "--served-model-name", MODEL, "--host", "127.0.0.1",
            "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "8", "--block-size", "32",
            "--disable-uvicorn-access-log", "--enable-request-id-headers", "--enable-prompt-tokens-details",
        ]  # fmt: skip
        if kvguard:
            settings = {"instance": f"smol-{name}", "socket": str(self.directory / name / "kvguard.sock"), "endpoint": url, **(extra or {})}
            transfer = {"kv_connector": "KvguardConnector", "kv_connector_module_path": "kvguard.engine.vllm", "kv_role": "kv_both",
                        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": settings}  # fmt: skip
            command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(sorted(os.sched_getaffinity(0))[list(self._http).index(name) % os.cpu_count()]), **(env or {}),
        }  # fmt: skip
        log = self.directory / f"vllm-{name}.log"
        with open(log, "ab") as out, whole():
            popen = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=ROOT, start_new_session=True)
            server = self.servers[f"smol-{name}"] = Server(popen, url, log)
        if wait:
            self.wait_ready(server)
        return server

    def wait_ready(self, server: Server) -> None:
        def ready() -> bool:
            assert server.popen.poll() is None, f"vLLM ended with {server.popen.returncode}\n{self.last_words()}"
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:  # noqa: S310
                return answer.status == 200
            return False

        self.until(f"vLLM at {server.url}", ready, READY_S, 0.25)

    # ---- waiting and ending -------------------------------------------------------------------------------------------------------

    def until(self, what: str, condition, timeout_s: float = 30.0, pause_s: float = 0.02):
        """The first true value of `condition()`; where a daemon can't be asked yet, it is asked again."""
        deadline, last = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            try:
                last = condition()
            except KvguardError as error:
                last = error
            else:
                if last:
                    return last
            time.sleep(pause_s)  # between two looks at a condition with a deadline
        raise AssertionError(f"{what} did not come about; last seen: {last!r}\n{self.last_words()}")

    def last_words(self) -> str:
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]) for log in sorted(self.directory.glob("*.log")))

    def stop(self) -> None:
        """End everything that was started here; daemons in order. Not to be cut short by a signal."""
        with whole():
            self._stop()

    def _stop(self) -> None:
        for front in self.fronts:
            front.stop()
        for server in self.servers.values():
            server.end()
        for process in self.running.values():
            process.terminate()
        codes = {}
        for name, process in self.running.items():
            try:
                codes[name] = process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        assert set(codes.values()) <= {0}, f"a daemon did not end cleanly: {codes}\n{self.last_words()}"
        left = {name: pids for name, server in self.servers.items() if (pids := living(server.popen.pid))}
        assert not left, f"killed, and not gone within {GONE_S:g} s: {left}"


def main() -> int:
    world = World(Path(sys.argv[1]))
    try:
        world.start_daemons()
        for name in world.addresses:
            world.start_server(name, wait=False)
        for server in world.servers.values():
            world.wait_ready(server)
        said = {"coordinator": world.coordinator, "nodes": world.addresses, "servers": {name: server.url for name, server in world.servers.items()}}
        print(json.dumps({**said, "pids": {name: server.popen.pid for name, server in world.servers.items()}}), flush=True)
        select.select([sys.stdin], [], [])
    finally:
        world.stop()
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
