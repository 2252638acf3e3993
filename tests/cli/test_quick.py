"""status and check as monitors call them: what is plain goes without the command line's library, and means the same."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import click
import pytest

from kvguard.cli import QUICK, check, looks, quick

NOT_NEEDED = ("click", "rich", "numpy", "torch", "tomllib", "kvguard.config")  # where an address is given
ALL = {
    "status": "--coordinator tcp://127.0.0.1:1 --config f --keys k --insecure --timeout 2.5 -o wide --watch",
    "check": "--coordinator=tcp://127.0.0.1:1 --config f --keys k --insecure --timeout 2.5 -o json --lag-tokens 3 --arena-percent 70",
}


@pytest.fixture
def taken(monkeypatch):
    """What a verb was called with, whichever way it was reached; nobody is asked."""
    seen = []
    monkeypatch.setattr("kvguard.cli.asking.found", lambda file, address, keys, insecure: (f"{file} {address}", keys or "", insecure))
    monkeypatch.setattr("kvguard.cli.options.found", lambda file, address, keys, insecure: (f"{file} {address}", keys or "", insecure))
    monkeypatch.setattr("kvguard.cli.status.run", lambda *given: seen.append(given))
    monkeypatch.setattr("kvguard.cli.check.run", lambda *given: seen.append(given) or 0)
    return seen


@pytest.mark.parametrize("verb", QUICK)
@pytest.mark.parametrize("words", [None, "", "--timeout 7 -o json", "-o table"])
@pytest.mark.parametrize("environment", [{}, {"KVGUARD_CONFIG": "c", "KVGUARD_COORDINATOR": "tcp://a:1", "KVGUARD_KEYS": "k"}, {"KVGUARD_CONFIG": ""}])
def test_both_ways_mean_the_same(taken, monkeypatch, verb, words, environment) -> None:
    for name in ("KVGUARD_CONFIG", "KVGUARD_COORDINATOR", "KVGUARD_KEYS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = [verb, *(ALL[verb] if words is None else words).split()]
    quick.run(verb, quick.asked(arguments))
    command = getattr(looks, verb)
    command.main(arguments[1:], standalone_mode=False) if verb == "status" else pytest.raises(SystemExit, command.main, arguments[1:], standalone_mode=False)
    assert len(taken) == 2 and taken[0] == taken[1]


def test_every_option_is_known_both_ways() -> None:
    for verb in QUICK:
        options = {name for parameter in getattr(looks, verb).params if isinstance(parameter, click.Option) for name in parameter.opts}
        assert options == {*quick.VALUED[verb], *quick.FLAGS[verb]}
    assert inspect.signature(check.Limits).parameters.keys() == {"lag_tokens", "arena_percent"}


@pytest.mark.parametrize(
    "words",
    [
        "status --help", "status -o yaml", "status extra", "status --timeout 0", "status --timeout", "status --timeout nan", "status --timeout 1e2",
        "check --watch", "check -o wide", "check --lag-tokens -1", "check --lag-tokens 1.5", "status --keys --insecure", "status --watch --watch",
        "status -ojson", "check --arena-percent 101",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_the_command_line(words) -> None:
    assert quick.asked(words.split()) is None


def test_nothing_is_imported_that_is_not_needed() -> None:
    code = (
        "import sys; from kvguard.cli import main\n"
        "try: main(['check', '--coordinator', 'tcp://127.0.0.1:1', '--timeout', '0.1'])\n"
        f"except SystemExit as ended: print(ended.code, *(name for name in {NOT_NEEDED!r} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split() == ["3"] and "nobody answers" in done.stdout


def test_who_reads_no_further_is_no_traceback(tmp_path) -> None:
    command = f"{sys.executable} -m kvguard.cli check --coordinator tcp://127.0.0.1:1 --timeout 0.1 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "address", ["x", "tcp://", "tcp://:7400", "tcp://a:99999", "tcp://a:0", "http://a:7400", "tcp://a b:7400", "tcp://a/b:7400", "ipc:///tmp/a", "tcp://a:x"],
)  # fmt: skip
def test_what_is_no_address_is_said_to_be_none(cli, address) -> None:
    code, _, err = cli("status", "--coordinator", address)
    assert code == 78 and "is not where a coordinator can be. Try: tcp://HOST:7400" in err
    assert cli("history", "--coordinator", address)[0] == 78
    code, out, err = cli("check", "--coordinator", address)
    assert code == 3 and out.startswith("KVGUARD UNKNOWN") and not err, "a monitor reads exit codes of its own"
    for words in (("-o", "json"), ("-ojson",)):
        code, out, err = cli("check", "--coordinator", address, *words)
        assert code == 3 and json.loads(out)["state"] == "unknown" and not err
