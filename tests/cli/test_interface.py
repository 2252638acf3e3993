"""What scripts and shells rely on: every verb and option that is promised, documents with a schema, completion, NO_COLOR, watching that goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import click
import pytest

from kvguard.cli import VERBS, show, status
from kvguard.cli.asking import Reach
from kvguard.cli.group import verbs
from kvguard.errors import Unreachable

PROMISED = {
    "demo": {"--stages", "--tp", "--kill", "--at-token", "--max-tokens", "--sequences", "--seed", "--prompt", "--model", "--corrupt", "-o"},
    "node": {"--config"}, "coordinator": {"--config"}, "gateway": {"--config"}, "status": {"-o", "--watch"}, "top": set(), "replicas list": {"-o"},
    "replicas show": {"-o"}, "replicas verify": {"-o"}, "replicas export": {"-o"}, "history": {"-o"}, "failover": {"--dry-run", "--yes"},
    "handoff": {"--to", "--dry-run", "--yes"}, "pause": {"--dry-run", "--yes"}, "unpause": {"--dry-run", "--yes"}, "resync": {"--dry-run", "--yes"},
    "drain": {"--dry-run", "--yes"}, "drill list": {"-o"}, "drill run": {"--seed", "--repeat", "--dry-run", "--yes", "-o"}, "drill report": {"-o"},
    "check": {"-o"}, "config init": set(), "config validate": {"-o"}, "config show": {"--effective", "-o"}, "keys generate": set(), "keys list": {"-o"},
    "keys rotate": {"--dry-run", "--yes", "-o"}, "systemd print": {"-o"}, "systemd install": {"--root", "--dry-run"}, "bench": {"-o"},
}  # fmt: skip
CALL = "from kvguard.cli import main; main()"
STATUS = {
    "schema": "kvguard.status/1", "paused": False, "nodes": [{"node": "a", "state": "alive"}], "ranks": [],
    "instances": [{"instance": "i", "epoch": 1, "issuer": "c"}],
}  # fmt: skip


def command(words: str) -> click.Command:
    first, *rest = words.split()
    found = getattr(importlib.import_module(VERBS[first][0]), first)
    return found.commands[rest[0]] if rest else found


@pytest.mark.parametrize("words", PROMISED)
def test_every_option_that_is_promised(words: str) -> None:
    options = {name for parameter in command(words).params for name in parameter.opts}
    assert PROMISED[words] <= options


@pytest.mark.parametrize("words", PROMISED)
def test_every_verb_explains_itself(cli, words: str) -> None:
    code, out, _ = cli(*words.split(), "--help")
    assert code == 0 and command(words).help and "Usage: kvguard" in out
    undocumented = [parameter.name for parameter in command(words).params if isinstance(parameter, click.Option) and not parameter.help]
    assert not undocumented or words in ("demo", "config show"), undocumented


def completed(line: str) -> list[str]:
    """What bash would be offered after `line`."""
    environment = {**os.environ, "_KVGUARD_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False, timeout=60)
    return [said.partition(",")[2] for said in done.stdout.splitlines()]


def test_completion() -> None:
    assert completed("kvguard st") == ["status"]
    assert {"list", "show", "verify", "export"} <= set(completed("kvguard replicas "))
    assert completed("kvguard drill run kill-d") == ["kill-daemon", "kill-driver"]
    assert "--dry-run" in completed("kvguard drain --d")
    assert completed("kvguard config init co") == ["coordinator"]


def test_the_script_for_a_shell_is_there() -> None:
    environment = {**os.environ, "_KVGUARD_COMPLETE": "zsh_source"}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("#compdef kvguard")


def test_documents_that_lists_and_dry_runs_give(cli, tmp_path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[node]\nname = "a"\n[coordinator]\nreplicas = 99\n')
    reports = ("--reports", str(tmp_path / "reports"))
    for arguments, schema, key in (
        (("drill", "list"), "kvguard.drill_list/1", "drills"), (("drill", "report", *reports), "kvguard.drill_reports/1", "reports"),
        (("drill", "run", "kill-rank", "--dry-run", *reports), "kvguard.drill_dry_run/1", "would"),
        (("systemd", "print"), "kvguard.systemd/1", "files"),
        (("config", "validate", str(file)), "kvguard.validation/1", "faults"),
        (("config", "show", "--config", str(file), "--section", "node"), "kvguard.config/1", "sections"),
    ):  # fmt: skip
        code, out, _ = cli(*arguments, "-o", "json")
        found = json.loads(out)
        assert found["schema"] == schema and (found[key] or key == "reports"), arguments
        assert code == (78 if arguments[1] == "validate" else 0)


def test_watching_goes_on_while_the_coordinator_is_away(monkeypatch, capsys) -> None:
    answers = iter([STATUS, Unreachable("nobody answers. Try: later"), STATUS])

    class Asked(Reach):
        def coordinator(self, verb, arguments=None):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    pauses = iter(range(2))

    def pause(_seconds: float) -> None:
        if next(pauses, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", pause)
    status.run(Asked("tcp://127.0.0.1:1", "", False, 1.0), "json", True)
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == [STATUS, STATUS] and said.err == "kvguard: nobody answers. Try: later\n"


def test_no_color_is_obeyed_where_there_is_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for wanted, value in ((True, None), (False, "1")):
        monkeypatch.delenv("NO_COLOR", raising=False) if value is None else monkeypatch.setenv("NO_COLOR", value)
        show.table("Ranks", ["rank", "state"], [["0.0.0", "lost"]], "none")
        assert ("\x1b[31m" in capsys.readouterr().out) == wanted


def test_verbs_are_listed_without_being_imported() -> None:
    context = click.Context(verbs)
    assert verbs.list_commands(context) == sorted(VERBS) and all(said.endswith(".") or "unknown" in said for _, said in VERBS.values())


def test_a_demo_that_cannot_be_is_a_usage_error(cli):
    code, _, err = cli("demo", "--kill", "rank", "--corrupt", "replica")
    assert code == 2 and "--kill node only" in err


def test_nobody_says_where_the_coordinator_is(cli, monkeypatch):
    monkeypatch.setattr("kvguard.cli.asking.PLACES", ())
    for name in ("KVGUARD_CONFIG", "KVGUARD_COORDINATOR", "KVGUARD_KEYS"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = cli("status")
    assert code == 78 and "Try: --coordinator" in err
