"""`kvguard gateway` in front of a world's servers, as a process of its own, and what can be asked of it. For tests, the demonstration and measurements.

Knows: the gateway's command line, its settings and metrics. Must not know: what is tested. Invariant: nothing of it outlives `stop`, nor
its world's.
"""

from __future__ import annotations

import subprocess
import sys

import httpx
from running import whole
from world import ROOT, World, model_directory, weighted

from kvguard import config
from kvguard.pipeline.ports import free_ports


class Gateway:
    """Made when it takes requests for all servers of the world. Restarting a server takes half a minute: that is how long an answer waits for an instance."""

    def __init__(self, world: World, **settings) -> None:
        self.world, self.url = world, f"http://127.0.0.1:{free_ports(1)[0]}"
        lines = tuple(f"{name} {server.url} {name.removeprefix('smol-')}" for name, server in world.servers.items())
        values = {"listen": self.url, "instances": lines, "tokenizer": model_directory(), "coordinator": world.coordinator, "resume_ms": 120_000, **settings}
        file = world.directory / "gateway.toml"
        file.write_text(config.template(config.GatewayConfig, values))
        self.log = world.directory / "gateway.log"
        with open(self.log, "ab") as log, whole():
            arguments = [sys.executable, "-m", "kvguard.cli", "gateway", "--config", str(file)]
            self.popen = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
            weighted(self.popen.pid)
            world.fronts.append(self)
        try:
            world.until("the gateway with its instances", lambda: self.active() == len(lines), 120)
        except BaseException:
            self.stop()
            raise

    def active(self) -> int:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).json()["active_instances"]
        except httpx.HTTPError:
            return 0

    def metrics(self, name: str) -> dict[str, float]:
        """Samples whose names begin so, without those that are zero."""
        lines = [line.rsplit(" ", 1) for line in httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text.splitlines() if line.startswith(name)]
        return {sample: float(value) for sample, value in lines if float(value)}

    def metric(self, name: str) -> float:
        return sum(self.metrics(name).values())

    def rungs(self) -> dict[str, int]:
        """Resumed answers by what the engines say that they restored from."""
        return {sample.split('"')[1]: int(value) for sample, value in self.metrics("kvguard_gateway_resumed_total").items()}

    def stop(self) -> int:
        """Its exit code. What is under way may end. Not to be cut short by a signal."""
        with whole():
            self.popen.terminate()
            try:
                return self.popen.wait(60)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                return self.popen.wait()
