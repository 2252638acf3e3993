"""kvguard keys: a pair made, listed without its secret, never overwritten; demo and failover check what they are asked."""

from __future__ import annotations

import json

import pytest

from kvguard.errors import BadConfig
from kvguard.transport import keys


def test_generate_and_list(tmp_path, cli):
    peer = keys.generate().public.decode()
    code, out, _ = cli("keys", "generate", str(tmp_path / "key"), "--allow", f"b={peer}")
    assert code == 0 and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    public = out.split()[1]
    code, out, _ = cli("keys", "list", str(tmp_path / "key"), "-o", "json")
    listed = [{"node": "b", "public": peer, "superseded": False}]
    assert json.loads(out) == {"schema": "kvguard.keys/1", "public": public, "next": None, "allowed": listed}
    code, _, err = cli("keys", "generate", str(tmp_path / "key"))
    assert code == 78 and "exists already" in err
    assert cli("keys", "generate", str(tmp_path / "other"), "--allow", "b")[0] == 2


def made(path, name: str, **others: bytes) -> keys.Keys:
    """A key file that lists itself, with a comment that must stay."""
    pair = keys.generate()
    keys.save(keys.Keys(pair.secret, pair.public, {name: pair.public, **others}), path)
    path.write_text("# of the operators\n" + path.read_text())
    return keys.load(path)


def test_a_rotation_step_by_step(tmp_path, cli):
    mine, theirs = tmp_path / "a.key", tmp_path / "b.key"
    old = made(mine, "a")
    made(theirs, "b", a=old.public)
    code, out, err = cli("keys", "rotate", str(mine))
    new = out.split("a=")[1].strip().encode()
    begun = keys.load(mine)
    assert code == 0 and begun.coming[1] == new and begun.public == old.public and begun.of("a") == (old.public, new) and "Reload" in err
    assert begun.coming[0].decode() not in out + err
    code, out, _ = cli("keys", "list", str(mine))
    assert new.decode() in out and "goes with --finish" in out and begun.coming[0].decode() not in out
    for arguments, said in (((), "under way already"), (("--finish", "--yes"), "not in use yet")):
        assert (code := cli("keys", "rotate", str(mine), *arguments))[0] == 78 and said in code[2]

    assert cli("keys", "rotate", str(theirs), "--allow", f"a={new.decode()}")[0] == 0
    both = theirs.read_bytes()
    assert keys.load(theirs).of("a") == (old.public, new)
    assert cli("keys", "rotate", str(theirs), "--allow", f"a={new.decode()}")[0] == 0 and theirs.read_bytes() == both, "said twice is said once"
    code, _, err = cli("keys", "rotate", str(theirs), "--allow", f"b={new.decode()}")
    assert code == 78 and "listed as the key of a" in err

    assert cli("keys", "rotate", str(mine), "--switch")[0] == 0
    switched = keys.load(mine)
    assert (switched.secret, switched.public) == begun.coming and switched.coming is None and old.secret.decode() not in mine.read_text()
    code, _, err = cli("keys", "rotate", str(mine), "--switch")
    assert code == 78 and "no new pair" in err

    code, out, _ = cli("keys", "rotate", str(theirs), "--finish", "--dry-run", "-o", "json")
    assert code == 0 and old.public.decode() in json.loads(out)["would"] and theirs.read_bytes() == both
    for file in (mine, theirs):
        assert cli("keys", "rotate", str(file), "--finish", "--yes")[0] == 0
        assert keys.load(file).of("a") == (new,) and file.read_text().startswith("# of the operators\n") and file.stat().st_mode & 0o777 == 0o600
    code, _, err = cli("keys", "rotate", str(mine), "--finish", "--yes")
    assert code == 78 and "nothing to finish" in err
    assert cli("keys", "rotate", str(mine), "--finish", "--switch")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "b.key"]


def test_a_key_file_that_is_wrong_in_mid_rotation_is_named(tmp_path):
    file = tmp_path / "a.key"
    pair, other = made(file, "a"), keys.generate()
    sound = file.read_text()
    for lines, said in (
        (f"next-secret {other.secret.decode()}\n", "no line `next-public KEY`"),
        (f"next-secret {pair.secret.decode()}\nnext-public {other.public.decode()}\n", "the next-public key doesn't belong to the next-secret one"),
        (f"allow b {pair.public.decode()}\n", "listed twice"),
        ("".join(f"allow a {keys.generate().public.decode()}\n" for _ in range(4)), "more than 4"),
    ):
        file.write_text(sound + lines)
        with pytest.raises(BadConfig, match=said):
            keys.load(file)


def test_a_demo_that_cannot_be_is_a_usage_error(cli):
    code, _, err = cli("demo", "--kill", "rank", "--corrupt", "replica")
    assert code == 2 and "--kill node only" in err


def test_nobody_says_where_the_coordinator_is(cli, monkeypatch):
    monkeypatch.setattr("kvguard.cli.asking.PLACES", ())
    for name in ("KVGUARD_CONFIG", "KVGUARD_COORDINATOR", "KVGUARD_KEYS"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = cli("status")
    assert code == 78 and "Try: --coordinator" in err
