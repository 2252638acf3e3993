"""A state directory on a disk without room: who starts there says so and may be started again; who runs out of it ends before it has promised anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvguard.pipeline.ports import free_ports

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


def mounting() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not mounting(), reason="needs root: it mounts a small disk in a namespace of its own")


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["unshare", "-m", "bash", "-c", script, "sh", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def configured(tmp_path, address: str):
    disk, file = tmp_path / "disk", tmp_path / "daemon.toml"
    disk.mkdir()
    file.write_text(
        f'[coordinator]\nlisten = "{address}"\nstate_dir = "{disk}/state"\n[node]\nname = "a"\nlisten = "{address}"\nruntime_dir = "{disk}/run"\n',
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
