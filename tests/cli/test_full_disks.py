"""State on a disk without room: who starts there says so and may be started again; who runs out of it ends before anything follows from what it couldn't write."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvguard.format import messages, wire
from kvguard.pipeline.ports import free_ports
from kvguard.transport.base import Frame
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import Epoch

FULL = """
set -u
mount -t tmpfs -o size=200k tiny "$1"
head -c 1000000 /dev/zero > "$1/everything" 2> /dev/null
exec {python} -m kvguard.cli {kind} --config "$2"
"""
OUT_OF_ROOM = """
set -u
mount -t tmpfs -o size=200k tiny "$1"
{python} -m kvguard.cli coordinator --config "$2" & daemon=$!
until {python} -m kvguard.cli status --coordinator {address} --timeout 5 > /dev/null 2>&1; do kill -0 $daemon; done
head -c 1000000 /dev/zero > "$1/everything" 2> /dev/null
{python} -m kvguard.cli pause --coordinator {address} --timeout 1
echo "pause ended with $?"
wait $daemon
"""

TWO_LIVES = """
set -u
mount -t tmpfs -o size=200k tiny "$1"
{python} -m kvguard.cli node --config "$2"
echo "ended with $?"
rm "$1/everything"
exec {python} -m kvguard.cli node --config "$2"
"""


def mounting() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not mounting(), reason="needs root: it mounts a small disk in a namespace of its own")


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["unshare", "-m", "bash", "-c", script, "sh", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def configured(tmp_path, address: str, coordinator: str = "tcp://127.0.0.1:7400"):
    disk, file = tmp_path / "disk", tmp_path / "daemon.toml"
    disk.mkdir()
    file.write_text(
        f'[coordinator]\nlisten = "{address}"\nstate_dir = "{disk}/state"\n'
        f'[node]\nname = "a"\nlisten = "{address}"\ncoordinator = "{coordinator}"\nruntime_dir = "{disk}/run"\n',
    )
    return disk, file


@pytest.mark.parametrize("kind", ["coordinator", "node"])
def test_who_starts_on_a_full_disk_may_be_started_again(tmp_path, kind) -> None:
    done = run(FULL.format(python=sys.executable, kind=kind), *configured(tmp_path, "tcp://127.0.0.1:0"))
    assert done.returncode == 1, done  # 78 would tell the service manager not to try again
    assert "journal.db can't be written: database or disk is full. Try: room on its disk" in done.stderr and "Traceback" not in done.stderr


def test_a_coordinator_that_runs_out_of_room_ends_and_promises_nothing(tmp_path) -> None:
    (free_port,) = free_ports(1)
    address = f"tcp://127.0.0.1:{free_port}"
    done = run(OUT_OF_ROOM.format(python=sys.executable, address=address), *configured(tmp_path, address))
    assert done.returncode == 1 and "can't be made durable" in done.stderr and "Try: room" in done.stderr and "Traceback" not in done.stderr, done
    assert "pause ended with 5" in done.stdout or "pause ended with 3" in done.stdout, done  # it was never said to be paused


class Fencing:
    """A coordinator, as far as a node sees one: it fences, and hears what is said."""

    def __init__(self) -> None:
        self._transport = ZeromqTransport("coordinator", bulk=False)
        self.address = self._transport.listen("tcp://127.0.0.1:0")
        self._unread: list = []
        self._link = ""
        self.close = self._transport.close

    def fence(self, counter: int) -> None:
        self._say(messages.Fence("demo", Epoch(counter, "coordinator"), (), "a test"))

    def until(self, kind: type) -> list:
        """Everything that is said, up to the next message of this kind."""
        found: list = []
        deadline = time.monotonic() + 60
        while not found or type(found[-1]) is not kind:
            assert time.monotonic() < deadline, f"no {kind.__name__} after {found}"
            if not self._unread:
                self._transport.wait(1.0)
                self._unread += [(incoming.link, wire.decode(incoming.head)[0]) for incoming in self._transport.receive() if type(incoming) is Frame]
            for self._link, message in self._unread[:1]:
                found.append(message)
            del self._unread[:1]
        return found

    def _say(self, message) -> None:
        assert self._transport.send(self._link, wire.encode(message))


def test_a_node_that_runs_out_of_room_ends_without_a_report_and_has_promised_nothing_more(tmp_path) -> None:
    fencing = Fencing()
    disk, file = configured(tmp_path, "tcp://127.0.0.1:0", fencing.address)
    script = TWO_LIVES.format(python=sys.executable)
    node = subprocess.Popen(["unshare", "-m", "bash", "-c", script, "sh", disk, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        fencing.until(messages.NodeHello)
        fencing.fence(1)
        assert fencing.until(messages.Report)[-1].epoch.counter == 1  # with room it promises, and says so
        with Path(f"/proc/{node.pid}/root{disk}/everything").open("wb", buffering=0) as everything, pytest.raises(OSError, match="No space left"):
            while True:
                everything.write(bytes(1024))
        fencing.fence(2)
        *last_words, hello = fencing.until(messages.NodeHello)
        assert node.stdout.readline() == "ended with 1\n"
        assert not [message for message in last_words if type(message) is messages.Report], last_words
        assert hello.promises == (("demo", Epoch(1, "coordinator")),)
        fencing.fence(2)
        assert fencing.until(messages.Report)[-1].epoch.counter == 2  # with room again it promises as if nothing had been
    finally:
        node.terminate()
        _, log = node.communicate(timeout=30)
        fencing.close()
    assert "'promise/demo' can't be made durable" in log and "Try: room" in log and "Traceback" not in log, log
