"""Alerts and the dashboard: they name metrics that exist, each alert has its entry in the runbook, promtool plays each one's fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
MONITORING = DOCS / "monitoring"
PACKAGE = DOCS.parent / "kvguard"
METRIC = re.compile(r"\bkvguard_[a-z_]+")
SUFFIXES = ("_total", "_bucket", "_sum", "_count")
ALERT = re.compile(r"- alert: (\w+)")


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        wanted = os.environ.get("KVGUARD_REQUIRE_ALL") and "prometheus" not in os.environ.get("KVGUARD_UNOBTAINABLE", "")
        assert not wanted, "promtool isn't installed. Try: apt-get install prometheus"
        pytest.skip("promtool isn't installed (Debian: prometheus)")
    done = subprocess.run([program, *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def existing() -> set[str]:
    """Families as the daemons name them."""
    source = (PACKAGE / "daemon" / "metrics.py").read_text()
    return set(re.findall(r'MetricFamily\("(kvguard_[a-z_]+)"', source)) | {f"kvguard_{name}" for name in ("ranks", "nodes")}


def family(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


@pytest.mark.parametrize("file", ["alerts.yml", "dashboard.json"])
def test_every_metric_that_is_named_exists(file: str) -> None:
    named = {family(name) for name in METRIC.findall((MONITORING / file).read_text())}
    assert named and named <= existing(), f"unknown: {sorted(named - existing())}"


def test_every_alert_has_its_entry_in_the_runbook_and_its_fault_in_the_tests() -> None:
    alerts = ALERT.findall((MONITORING / "alerts.yml").read_text())
    entries = re.findall(r"^## (\w+)$", (DOCS / "runbook.md").read_text(), re.MULTILINE)
    assert alerts == sorted(set(alerts), key=alerts.index) and set(alerts) == set(entries)
    tests = "".join(path.read_text() for path in MONITORING.glob("alerts*_test.yml"))
    assert all(f'alertname="{alert}"' in tests for alert in alerts)


def test_the_rules_are_rules() -> None:
    promtool("check", "rules", "alerts.yml")


@pytest.mark.parametrize("file", ["alerts_test.yml", "alerts_slow_test.yml"])
def test_every_alert_fires_on_its_fault_and_not_before(file: str) -> None:
    promtool("test", "rules", file)


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert dashboard["title"] and len({panel["id"] for panel in panels}) == len(panels) >= 8
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
