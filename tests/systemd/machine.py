"""A machine of its own for tests of the services: a real systemd booted in a container over this system's root, which it can't change.

Knows: overlayfs, systemd-nspawn, nsenter. Must not know: what is tested. Invariant: `close` leaves no mount, process or control group behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
GROUPS = Path("/sys/fs/cgroup")


def unavailable() -> str:
    """Why no machine can be had here; empty where one can."""
    if os.geteuid() != 0:
        return "needs root: it boots a container"
    for tool in ("systemd-nspawn", "nsenter", "mount", "systemctl"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: systemd-container)"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "this kernel has no overlayfs"
    if any((Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"systemd-nspawn") for pid in psutil.pids() if Path(f"/proc/{pid}/cmdline").exists())):
        return "another container runs here"
    return ""


class Machine:
    """Booted when made. Commands run in all of its namespaces. Raises AssertionError with its console where it doesn't come up."""

    def __init__(self) -> None:
        self._groups = self._leftover_groups()
        self._directory = Path(tempfile.mkdtemp(prefix="kvguard-machine-"))
        self.console = self._directory / "console.log"
        self.root = self._directory / "disk/m"
        self._nspawn: subprocess.Popen | None = None
        self._leader = 0
        try:
            self._mount()
        except AssertionError:
            self.close()
            raise

    def _mount(self) -> None:
        disk = self._directory / "disk"
        disk.mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=1g,mode=0755", "kvguard-test", str(disk))
        for name in ("u", "w", "m"):
            (disk / name).mkdir()
        _run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={disk}/u,workdir={disk}/w", str(self.root))

    def boot(self) -> None:
        """After its root was prepared."""
        bound = dict.fromkeys(str(Path(path).resolve()) for path in (ROOT, sys.prefix, sys.base_prefix) if not self._on_root(path))
        command = [
            "systemd-nspawn", "-D", str(self.root), "-b", "--register=no", "--keep-unit", "--private-network", "--link-journal=no", "-M", "kvguard-test",
            "--console=passive", *(f"--bind-ro={path}" for path in bound), "systemd.unit=basic.target",
        ]  # fmt: skip
        with open(self.console, "wb") as console:
            self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        self.until("a system", self._found_leader, 60)
        self.until("a booted system", lambda: self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"), 60)
        # A boot id that nspawn invents lies over the kernel's, but not where a unit has a /proc/sys of its own: two services would be on two machines.
        self.run("umount", "/proc/sys/kernel/random/boot_id")

    def _on_root(self, path) -> bool:
        return os.stat(path).st_dev == os.stat("/").st_dev and not str(Path(path).resolve()).startswith("/tmp/")

    def _found_leader(self) -> bool:
        assert self._nspawn.poll() is None, self.console.read_text(errors="replace")[-2000:]
        found = [child.pid for child in psutil.Process(self._nspawn.pid).children() if child.name() == "systemd"]
        self._leader = found[0] if found else 0
        return bool(found)

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self._leader), "-a", *command]

    def run(self, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess:
        return subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=timeout_s, check=False)

    def popen(self, *command: str, **more) -> subprocess.Popen:
        return subprocess.Popen(self.inside(*command), **more)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        said = self.run("systemctl", "show", unit, *(f"--property={name}" for name in properties)).stdout
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "-u", unit, "--no-pager", "-o", "cat").stdout

    def ask(self, address: str, verb: str, **arguments) -> dict | None:
        """A daemon's answer; None where it doesn't answer."""
        code = (
            "import json,sys; from kvguard.transport.ask import ask; from kvguard.errors import KvguardError\n"
            "try: print(json.dumps(ask(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), timeout=5.0)))\n"
            "except KvguardError as error: print(error, file=sys.stderr); sys.exit(3)"
        )
        done = self.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code, address, verb, json.dumps(arguments))
        return json.loads(done.stdout) if done.returncode == 0 else None

    def until(self, what: str, condition, timeout_s: float = 30.0):
        """The first true value of `condition()`."""
        deadline, last = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            last = condition()
            if last:
                return last
            time.sleep(0.05)  # between two looks at a condition with a deadline
        raise AssertionError(f"{what} did not come about; last seen: {last!r}\n{self.last_words()}")

    def last_words(self) -> str:
        if not self._leader or self._nspawn.poll() is not None:
            return self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""
        return "\n".join(f"--- {unit}\n{self.journal(unit)[-3000:]}" for unit in ("kvguard-node", "kvguard-coordinator"))

    def close(self) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            if self._leader:
                self.run("systemctl", "poweroff")
            try:
                self._nspawn.wait(30)
            except subprocess.TimeoutExpired:
                for process in (*psutil.Process(self._nspawn.pid).children(), psutil.Process(self._nspawn.pid)):
                    process.kill()  # the first process of the container takes all others along
                self._nspawn.wait(10)
        for mount in (self.root, self._directory / "disk"):
            if mount.is_mount():
                _run("umount", str(mount))
        shutil.rmtree(self._directory, ignore_errors=True)
        for group in sorted(self._leftover_groups() - self._groups):
            self.until(f"{group} removed", lambda group=group: _emptied(group), 10)

    @staticmethod
    def _leftover_groups() -> set[str]:
        """What nspawn makes beside a control group of its own and leaves: empty folders."""
        return {str(path) for name in ("payload", "supervisor") for path in GROUPS.glob(f"*/{name}")} if GROUPS.is_dir() else set()


def _emptied(group: str) -> bool:
    """Remove a control group with those in it, whose processes may still be ending."""
    for folder, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            return False
    return not os.path.exists(group)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
