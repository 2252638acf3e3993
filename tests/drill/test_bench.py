"""What a bench leaves behind: nothing, or after a failure its logs and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvguard.pipeline.bench import Cluster


class Ended:
    def __init__(self) -> None:
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


@pytest.mark.parametrize("failed", [False, True])
def test_replicas_and_pools_go_and_logs_stay_where_something_failed(tmp_path, failed) -> None:
    cluster = Cluster.__new__(Cluster)
    cluster.root, cluster.world = tmp_path / "bench", Ended()
    for name in ("logs", "node-0.0", "coordinator"):
        (cluster.root / name).mkdir(parents=True)
        (cluster.root / name / "file").write_text("x")
    (cluster.root / "supervised").write_text("")
    cluster.close(keep_logs=failed)
    assert cluster.world.stops == 1 and cluster.root.exists() == failed
    assert [path.name for path in cluster.root.glob("*")] == (["logs"] if failed else [])


def test_a_bench_that_cannot_start_says_why_and_ends() -> None:
    command = json.dumps({"do": "start", "model": "/nonexistent", "stages": 3, "sequences": 2, "max_tokens": 30})
    done = subprocess.run([sys.executable, "-m", "kvguard.pipeline.bench"], input=command + "\n", capture_output=True, text=True, timeout=120, check=False)
    answer = json.loads(done.stdout)
    assert done.returncode == 78 and answer["event"] == "error" and "config.json" in answer["message"] and "Traceback" not in done.stderr
