"""kvguard keys: a pair made, listed without its secret, never overwritten; demo and failover check what they are asked."""

from __future__ import annotations

import json

from kvguard.transport import keys


def test_generate_and_list(tmp_path, cli):
    peer = keys.generate().public.decode()
    code, out, _ = cli("keys", "generate", str(tmp_path / "key"), "--allow", f"b={peer}")
    assert code == 0 and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    public = out.split()[1]
    code, out, _ = cli("keys", "list", str(tmp_path / "key"), "-o", "json")
    assert json.loads(out) == {"schema": "kvguard.keys/1", "public": public, "allowed": [{"node": "b", "public": peer}]}
    code, _, err = cli("keys", "generate", str(tmp_path / "key"))
    assert code == 78 and "exists already" in err
    assert cli("keys", "generate", str(tmp_path / "other"), "--allow", "b")[0] == 2


def test_a_demo_that_cannot_be_is_a_usage_error(cli):
    code, _, err = cli("demo", "--kill", "rank", "--corrupt", "replica")
    assert code == 2 and "--kill node only" in err


def test_nobody_says_where_the_coordinator_is(cli, monkeypatch):
    monkeypatch.setattr("kvguard.cli.asking.PLACES", ())
    for name in ("KVGUARD_CONFIG", "KVGUARD_COORDINATOR", "KVGUARD_KEYS"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = cli("status")
    assert code == 78 and "Try: --coordinator" in err
