"""kvguard keys: a pair made, listed without its secret, never overwritten, rotated without locking anybody out."""

from __future__ import annotations

import json

import pytest

from kvguard.errors import BadConfig, NotAuthorised
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

    code, out, _ = cli("keys", "rotate", str(theirs), "--finish", "--unasked", "--dry-run", "-o", "json")
    assert code == 0 and old.public.decode() in json.loads(out)["would"] and theirs.read_bytes() == both
    for file in (mine, theirs):
        assert cli("keys", "rotate", str(file), "--finish", "--yes", "--unasked")[0] == 0
        assert keys.load(file).of("a") == (new,) and file.read_text().startswith("# of the operators\n") and file.stat().st_mode & 0o777 == 0o600
    code, _, err = cli("keys", "rotate", str(mine), "--finish", "--yes")
    assert code == 78 and "nothing to finish" in err
    assert cli("keys", "rotate", str(mine), "--finish", "--switch")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "b.key"]


@pytest.mark.parametrize("uses", ["old", "new", "nothing"])
@pytest.mark.parametrize("whose", ["a", "coordinator", "driver"])
def test_old_keys_go_only_when_nobody_uses_them(tmp_path, cli, monkeypatch, whose, uses):
    """Where a peer finished first, whose key it was could connect to nobody any more."""
    theirs, old, new = tmp_path / "b.key", keys.generate().public, keys.generate().public
    made(theirs, "b", **{whose: old})
    assert cli("keys", "rotate", str(theirs), "--allow", f"{whose}={new.decode()}")[0] == 0
    both = theirs.read_bytes()

    def ask(address, verb, arguments, timeout, known, *, node, insecure):
        if set(known.of(node)) == {old, new}:
            return {"schema": "kvguard.status/1", "coordinator": {"issuer": "c"}, "paused": False, "instances": [], "ranks": [], "nodes": [
                {"node": "a", "address": "tcp://a:1", "state": "alive", "reason": "", "heartbeat_age_ms": 1.0, "arena_bytes": 0, "arena_bytes_max": 1,
                 "standbys": 0}]}  # fmt: skip
        if (old if uses == "old" else new if uses == "new" else b"") not in known.of(node) and node == whose:
            raise NotAuthorised(f"{address} refused us. Try: another key")
        return {"nodes": []}

    monkeypatch.setattr("kvguard.cli.superseded.ask", ask)
    monkeypatch.setattr("kvguard.cli.superseded.Reach.coordinator", lambda reach, verb: ask("", verb, {}, 1.0, keys.load(theirs), node=whose, insecure=False))
    code, _, err = cli("keys", "rotate", str(theirs), "--finish", "--yes", "--coordinator", "tcp://127.0.0.1:1")
    if uses == "new" and whose != "driver":
        assert code == 0 and keys.load(theirs).of(whose) == (new,), err
        return
    said = "can't be asked" if whose == "driver" else "still uses an older key" if uses == "old" else "answers with none"
    assert code == 4 and said in err and "--unasked" in err and "Try: " in err and theirs.read_bytes() == both
    assert cli("keys", "rotate", str(theirs), "--finish", "--yes", "--unasked")[0] == 0 and keys.load(theirs).of(whose) == (new,)


def test_where_nobody_can_be_asked_nothing_is_finished(tmp_path, cli):
    theirs, new = tmp_path / "b.key", keys.generate().public.decode()
    made(theirs, "b", a=keys.generate().public, coordinator=keys.generate().public)
    cli("keys", "rotate", str(theirs), "--allow", f"a={new}")
    code, _, err = cli("keys", "rotate", str(theirs), "--finish", "--yes", "--coordinator", "tcp://127.0.0.1:1", "--timeout", "0.3")
    assert code == 3 and "nobody can say" in err and "--unasked" in err and len(keys.load(theirs).of("a")) == 2


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
