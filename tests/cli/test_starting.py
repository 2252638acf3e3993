"""A service manager's way to a daemon is the command line's, without the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvguard.cli import DAEMONS, VERBS, starting
from kvguard.daemon.moments import Moments

NOT_NEEDED = ("click", "rich", "numpy", "torch", "cupy", "prometheus_client", "asyncio", "http.server")  # by a daemon that starts


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("node --config f", {"config": "f", "name": None, "log-level": None}),
        ("node --config=f --name b --log-level debug", {"config": "f", "name": "b", "log-level": "debug"}),
        ("coordinator --log-level=info --config f", {"config": "f", "log-level": "info"}),
        ("node", None),
        ("node --config", None),
        ("node --config f --name", None),
        ("node --config f --config g", None),
        ("node --config f extra", None),
        ("node --config --name b", None),
        ("node --help", None),
        ("node -h", None),
        ("coordinator --config f --name b", None),
        ("status --config f", None),
    ],
)
def test_only_what_is_plain_passes_the_command_line_by(words, values):
    assert starting.plain(words.split()) == values


def test_both_daemons_are_verbs():
    assert set(DAEMONS) == set(starting.OPTIONS) and set(DAEMONS) < set(VERBS)


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_daemon_imports_no_more_than_a_start_needs(kind):
    code = f"import kvguard.cli.starting, kvguard.daemon.{kind}, sys; print(*(name for name in {NOT_NEEDED!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_an_error_ends_a_daemon_as_it_ends_a_verb(tmp_path):
    (tmp_path / "node.toml").write_text("[node]\nname = 3\n")
    for how in (["--config", str(tmp_path / "node.toml")], ["--config", str(tmp_path / "node.toml"), "--log-level", "info", "--log-level", "info"]):
        done = subprocess.run([sys.executable, "-m", "kvguard.cli", "node", *how], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 78 and "kvguard: " in done.stderr and "Traceback" not in done.stderr


def test_of_one_moment_the_first_counts():
    ages = iter((10_000_000, 25_000_000))
    moments = Moments(lambda: next(ages), lambda: 4_000_000)
    moments.reached("ready")
    moments.reached("verified")
    moments.reached("ready")
    assert moments.document() == {"ready": {"ms": 10.0, "cpu_ms": 4.0}, "verified": {"ms": 25.0, "cpu_ms": 4.0}}


def test_a_process_knows_its_age():
    code = "import time; began = time.monotonic_ns(); from kvguard.daemon.moments import process_age; age = process_age()(); print(age, time.monotonic_ns() - began)"
    age, at_least = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.split())
    assert at_least - 20_000_000 <= age < at_least + 60_000_000_000  # the kernel tells it by ticks of 10 ms
