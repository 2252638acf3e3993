"""The unit files, judged by systemd itself where it is there, and their installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvguard import config
from kvguard.cli import systemd

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"kvguard-node.service": 20, "kvguard-coordinator.service": 20}  # exposure in tenths, at most
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)")


@pytest.fixture
def installed(tmp_path):
    """A root with both daemons installed for this very interpreter."""
    done = CliRunner().invoke(systemd.systemd, ["install", "--root", str(tmp_path), "--gpu"])
    assert done.exit_code == 0, done.output
    return tmp_path


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_installed(installed):
    found = sorted(str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file())
    assert [path for path in found if "preserve" not in path] == [
        "etc/kvguard/coordinator.toml", "etc/kvguard/node.toml", "etc/systemd/system/kvguard-coordinator.service",
        "etc/systemd/system/kvguard-node.service", "etc/systemd/system/kvguard-node.service.d/gpu.conf", "etc/sysusers.d/kvguard.conf",
        "etc/tmpfiles.d/kvguard.conf",
    ]  # fmt: skip
    for daemon in ("node", "coordinator"):
        unit = (installed / f"etc/systemd/system/kvguard-{daemon}.service").read_text()
        (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
        program = start.split(f" {daemon} --config ")[0]
        assert run(*program.split(), "--version").returncode == 0, start
        assert "/usr/bin/kvguard" not in unit
        config.load(config.KINDS[daemon], installed / f"etc/kvguard/{daemon}.toml", environ={})


def test_what_is_there_is_respected(installed):
    configuration, unit = installed / "etc/kvguard/node.toml", installed / "etc/systemd/system/kvguard-node.service"
    configuration.write_text("# mine\n")
    unit.write_text("# changed\n")
    arguments = ["install", "node", "--root", str(installed)]
    refused = CliRunner().invoke(systemd.systemd, arguments, input="n\n")
    assert refused.exit_code == 1 and unit.read_text() == "# changed\n"
    dry = CliRunner().invoke(systemd.systemd, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and f"would replace {unit}" in dry.output and f"keeps {configuration}" in dry.output and unit.read_text() == "# changed\n"
    done = CliRunner().invoke(systemd.systemd, [*arguments, "--yes"])
    assert done.exit_code == 0 and "[Service]" in unit.read_text() and configuration.read_text() == "# mine\n"
    printed = CliRunner().invoke(systemd.systemd, ["print", "node"])
    assert unit.read_text() in printed.output and "coordinator.service" not in printed.output


def test_a_sandbox_does_not_hide_the_program(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/somebody/venv")
    assert "ProtectHome=read-only" in systemd.unit("kvguard-node.service")
    monkeypatch.setattr(sys, "prefix", "/tmp/venv")
    assert "BindReadOnlyPaths=/tmp/venv" in systemd.unit("kvguard-node.service")


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_units(installed, name):
    for extra in (installed / "etc/systemd/system").glob("*.d/*"):
        extra.unlink()  # gpu.conf is judged below
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(installed / "etc/systemd/system" / name))
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr


@needs_systemd
def test_systemd_understands_the_drop_in_for_gpus(installed):
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(installed / "etc/systemd/system/kvguard-node.service"))
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr


@needs_systemd
@pytest.mark.parametrize(("name", "tenths"), UNITS.items())
def test_exposure(name, tenths, tmp_path):
    alone = tmp_path / name  # without drop-ins
    alone.write_text(systemd.unit(name))
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={tenths}", str(alone))
    assert done.returncode == 0, done.stdout[-400:]


@needs_systemd
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("systemd-sysusers") is None, reason="needs root and systemd-sysusers: it makes a user in a directory")
def test_the_user_is_made(installed):
    done = run("systemd-sysusers", f"--root={installed}")
    assert done.returncode == 0, done.stderr
    assert "kvguard:" in (installed / "etc/passwd").read_text()


def test_modules_are_compiled_for_a_user_who_could_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", None)
    (tmp_path / "one.py").write_text("A = 1\n")
    assert systemd.compiled(tmp_path) and list(tmp_path.glob("__pycache__/one.*.pyc"))
    (tmp_path / "two.py").write_text("A =\n")
    assert not systemd.compiled(tmp_path)


def test_every_file_comes_with_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "systemd").rglob("*"):
        if path.is_file():
            folder = path.parent.relative_to(ROOT)
            assert f'"{folder}/*' in listed and (folder.name != "systemd" or f'"systemd/*{path.suffix}"' in listed), path
