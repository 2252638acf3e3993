"""What Prometheus reads, from real daemons: the names others rely on, and figures that agree with the status, the history and what happened."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvguard import config
from kvguard.errors import BadConfig

pytestmark = pytest.mark.e2e
RANK = {"serving_instance": "llama", "rank": "0.0.0"}
NODE = {
    "kvguard_lag_tokens", "kvguard_lag_bytes", "kvguard_lag_seconds", "kvguard_time_to_protected_seconds", "kvguard_sequences", "kvguard_epoch",
    "kvguard_frames", "kvguard_replicated_bytes", "kvguard_captures", "kvguard_checksum_failures", "kvguard_stale_epoch_rejections", "kvguard_handshake_failures",
    "kvguard_arena_bytes", "kvguard_window_bytes", "kvguard_build_info",
}  # fmt: skip
COORDINATOR = {
    "kvguard_epoch", "kvguard_frames", "kvguard_recovery_seconds", "kvguard_recoveries", "kvguard_tokens_recomputed", "kvguard_stale_epoch_rejections",
    "kvguard_handshake_failures", "kvguard_build_info", "kvguard_last_drill_success", "kvguard_last_drill_timestamp_seconds",
}  # fmt: skip


class Scraped:
    """One scrape: families by name, samples by name and labels."""

    def __init__(self, address: str) -> None:
        with urllib.request.urlopen(f"http://{address.removeprefix('tcp://')}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        self.families = {family.name for family in families}
        self.samples = {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))


def test_a_scrape_says_what_the_status_says_and_a_recovery_is_counted(cluster):
    ports = cluster.metrics
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    standby = cluster.engine("standby", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected("0.0.0", 45)
    first = cluster.until("a scrape of node a", lambda: Scraped(ports["a"]))
    assert NODE <= first.families
    assert first.value("kvguard_lag_tokens", **RANK) == 0
    assert first.value("kvguard_sequences", **RANK, state="protected") == 2 and first.value("kvguard_sequences", **RANK, state="unprotected") == 0
    assert first.value("kvguard_replicated_bytes_total") == cluster.ask("a", "stats")["replicated_bytes"] > 0
    assert first.value("kvguard_time_to_protected_seconds_count") == 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(cluster.directory / "b" / "kvguard.sock"))
        stranger.send(b"what nobody understands")
        assert stranger.recv(1) == b"", "it is hung up on"
    held = Scraped(ports["b"])
    assert held.value("kvguard_handshake_failures_total", reason="socket_garbage") == 1 == cluster.ask("b", "stats")["transport"]["socket_garbage"]
    assert held.value("kvguard_arena_bytes", state="used") == cluster.ask("b", "status")["arena_bytes"] > 0
    before = Scraped(ports["coordinator"])
    assert COORDINATOR <= before.families
    assert before.value("kvguard_recoveries_total", rung="pool", result="done") is None

    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    engine.kill()
    assert standby.hear(30.0)["claimed"]
    [entry] = cluster.until("the recovery told", lambda: cluster.ask("coordinator", "history")["history"])
    after = Scraped(ports["coordinator"])
    assert after.value("kvguard_recoveries_total", rung="pool", result="done") == 1
    assert after.value("kvguard_epoch", serving_instance="llama") == entry["epoch"] == 1
    assert after.value("kvguard_recovery_seconds_count", phase="restore") == 1
    assert after.value("kvguard_recovery_seconds_sum", phase="restore") == pytest.approx(entry["timing_ms"]["restore"] / 1000)
    assert after.value("kvguard_recovery_seconds_bucket", phase="restore", le="+Inf") == 1
    assert after.value("kvguard_tokens_recomputed_total") == entry["recomputed"] == 0

    cluster.ask("coordinator", "drilled", name="kill-rank", passed=True, at_s=1_800_000_000.5)
    cluster.kill("coordinator")  # recoveries are counted from what is durable
    cluster.start("coordinator")
    again = cluster.until("a scrape of the new coordinator", lambda: _scraped(ports["coordinator"]))
    assert again.value("kvguard_recoveries_total", rung="pool", result="done") == 1
    assert again.value("kvguard_last_drill_success", drill="kill-rank") == 1
    assert again.value("kvguard_last_drill_timestamp_seconds", drill="kill-rank") == 1_800_000_000.5


def _scraped(address: str) -> Scraped | None:
    try:
        return Scraped(address)
    except urllib.error.URLError:
        return None  # it doesn't listen yet


def test_a_damaged_frame_is_counted_once(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40]])
    cluster.protected("0.0.0", 40)
    assert cluster.ask("a", "corrupt_frame")["armed"] == 1
    engine.tell("step", commits=[["one", 10]])
    cluster.until("the damage found", lambda: cluster.ask("b", "stats")["checksum_failures"])
    cluster.protected("0.0.0", 50)
    assert cluster.ask("a", "stats")["frames_corrupted"] == 1
    assert Scraped(cluster.metrics["b"]).value("kvguard_checksum_failures_total") == cluster.ask("b", "stats")["checksum_failures"] == 1


def test_a_port_that_is_taken_is_bad_configuration(cluster):
    ports = cluster.metrics
    cluster.start()
    cluster.until("a scrape of node a", lambda: _scraped(ports["a"]))
    file = cluster.directory / "b.toml"
    file.write_text(file.read_text().replace(ports["b"], ports["a"]))
    cluster.kill("b")
    cluster.start("b")
    assert cluster.running.pop("b").wait(20) == BadConfig.exit_code
    assert "metrics can't be served" in (cluster.directory / "b.log").read_text()


def test_settings_know_the_port():
    assert "metrics" in config.template(config.NodeConfig, {}) and "metrics" in config.template(config.CoordinatorConfig, {})
