"""kvguard keys: a pair made, listed without its secret, never overwritten; demo and failover check what they are asked."""

from __future__ import annotations

import json

from kvguard.transport import keys
from tests.cli.test_config_verbs import run


def test_generate_and_list(tmp_path, capsys):
    peer = keys.generate().public.decode()
    code, out, _ = run(capsys, "keys", "generate", str(tmp_path / "key"), "--allow", f"b={peer}")
    assert code == 0 and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    public = out.split()[1]
    code, out, _ = run(capsys, "keys", "list", str(tmp_path / "key"), "-o", "json")
    assert json.loads(out) == {"schema": "kvguard.keys/1", "public": public, "allowed": [{"node": "b", "public": peer}]}
    code, _, err = run(capsys, "keys", "generate", str(tmp_path / "key"))
    assert code == 78 and "exists already" in err
    assert run(capsys, "keys", "generate", str(tmp_path / "other"), "--allow", "b")[0] == 2


def test_a_demo_that_cannot_be_is_a_usage_error(capsys):
    code, _, err = run(capsys, "demo", "--kill", "rank", "--corrupt", "replica")
    assert code == 2 and "--kill node only" in err


def test_nobody_says_where_the_coordinator_is(capsys, monkeypatch):
    monkeypatch.setattr("kvguard.cli.asking.PLACES", ())
    for name in ("KVGUARD_CONFIG", "KVGUARD_COORDINATOR", "KVGUARD_KEYS"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run(capsys, "status")
    assert code == 78 and "Try: --coordinator" in err
