"""Debian's real Prometheus scrapes a running cluster, and the alert fires when a node is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from kvguard.pipeline.ports import free_ports

pytestmark = pytest.mark.e2e
RULES = Path(__file__).resolve().parents[2] / "docs" / "monitoring" / "alerts.yml"


@pytest.fixture
def prometheus(cluster, tmp_path):
    """Asks a Prometheus that scrapes the cluster's daemons every second; waiting times of the rules are a second each."""
    program = shutil.which("prometheus")
    if program is None:
        wanted = os.environ.get("KVGUARD_REQUIRE_ALL") and "prometheus" not in os.environ.get("KVGUARD_UNOBTAINABLE", "")
        assert not wanted, "Prometheus isn't installed. Try: apt-get install prometheus"
        pytest.skip("Prometheus isn't installed (Debian: prometheus)")
    (tmp_path / "rules.yml").write_text(re.sub(r"for: \w+", "for: 1s", RULES.read_text()))
    targets = [address.removeprefix("tcp://") for address in cluster.metrics.values()]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "kvguard", "static_configs": [{"targets": targets}]}],
    }  # fmt: skip
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    (port,) = free_ports(1)
    words = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with open(tmp_path / "prometheus.log", "wb") as log:
        running = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)

    def ask(query: str) -> list[dict] | None:
        address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.loads(answer.read())["data"]["result"]
        except urllib.error.URLError:
            return None  # it doesn't listen yet

    try:
        yield ask
    finally:
        running.terminate()
        running.wait(20)


def test_a_killed_node_fires_the_alert(cluster, prometheus):
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40]])
    cluster.protected("0.0.0", 40)
    cluster.until("three targets up", lambda: len(prometheus('up{job="kvguard"} == 1') or ()) == 3, 60.0)
    cluster.until("the rank's sequences", lambda: prometheus('kvguard_sequences{state="protected"} == 1'), 60.0)
    assert prometheus('ALERTS{alertname=~"KvguardDaemonDown|KvguardUnprotected"}') == []
    cluster.kill("b")
    [fired] = cluster.until("the alert on the daemon", lambda: prometheus('ALERTS{alertname="KvguardDaemonDown", alertstate="firing"}'), 60.0)
    assert fired["metric"]["instance"] == cluster.metrics["b"].removeprefix("tcp://")
    [fired] = cluster.until("the alert on the rank", lambda: prometheus('ALERTS{alertname="KvguardUnprotected", alertstate="firing"}'), 60.0)
    assert (fired["metric"]["serving_instance"], fired["metric"]["rank"]) == ("llama", "0.0.0")
    cluster.start("b")
    cluster.protected("0.0.0", 40)
    cluster.until("the alerts' end", lambda: prometheus('ALERTS{alertname=~"KvguardDaemonDown|KvguardUnprotected", alertstate="firing"}') == [], 60.0)
