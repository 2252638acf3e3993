"""kvguard config: a configuration made, checked and shown through the real entry point."""

from __future__ import annotations

import json
import os

import pytest


def test_init_validates(tmp_path, cli):
    code, out, _ = cli("config", "init", "node", "--name", "a")
    assert code == 0
    (tmp_path / "node.toml").write_text(out)
    code, out, _ = cli("config", "validate", str(tmp_path / "node.toml"))
    assert (code, out) == (0, f"{tmp_path}/node.toml: [node] is good\n")


def test_init_writes_what_is_set_and_refuses_what_is_wrong(tmp_path, cli):
    settings = ("--set", "listen=tcp://127.0.0.2:7420", "--set", "arena_bytes=2MiB", "--set", "insecure=no", "--set", "uids=5,6")
    code, out, _ = cli("config", "init", "node", "--name", "a", *settings)
    (tmp_path / "node.toml").write_text(out)
    code, out, _ = cli("config", "show", "--config", str(tmp_path / "node.toml"))
    assert (code, out) == (0, '[node]\nname = "a"\nlisten = "tcp://127.0.0.2:7420"\narena_bytes = 2097152\ninsecure = false\nuids = [5, 6]\n')
    code, out, err = cli("config", "init", "node", "--set", "listne=x", "--set", "bulk_port=99999")
    assert (code, out) == (78, "") and "listne=x" in err and "bulk_port: 99999 is outside 0..65535" in err


def test_validate_names_everything(tmp_path, cli):
    file = tmp_path / "both.toml"
    file.write_text('[node]\nname = 3\n[coordinator]\ndead_ms = "soon"\n')
    code, _, err = cli("config", "validate", str(file))
    assert code == 78
    assert f"{file}:2: name: " in err and f"{file}:4: dead_ms: " in err


def test_show_effective(tmp_path, cli, monkeypatch):
    file = tmp_path / "node.toml"
    file.write_text('[node]\nname = "a"\n')
    monkeypatch.setenv("KVGUARD_NODE_POLL_MS", "7")
    code, out, _ = cli("config", "show", "--config", str(file), "--effective", "-o", "json")
    shown = json.loads(out)["sections"]["node"]
    assert code == 0
    assert shown["name"] == {"value": "a", "origin": f"{file}:2"}
    assert shown["poll_ms"] == {"value": 7, "origin": "environment KVGUARD_NODE_POLL_MS"}
    assert shown["device"]["origin"] == "default"
    code, out, _ = cli("config", "show", "--config", str(file))
    assert out == '[node]\nname = "a"\npoll_ms = 7\n'


def test_usage_is_exit_2(cli):
    assert cli("config", "init", "gpu")[0] == 2
    assert cli("nonsense")[0] == 2


def unreadables(directory) -> dict[str, str]:
    """Files that no settings can be read from, and what is said of each."""
    (directory / "rubbish.toml").write_bytes(bytes(range(128, 256)))
    (directory / "folder.toml").mkdir()
    os.mkfifo(directory / "pipe.toml")
    (directory / "loop.toml").symlink_to("loop.toml")
    (directory / "deep.toml").write_text(f"a = {'[' * 5000}{']' * 5000}\n")
    (directory / "twice.toml").write_text('[node]\nname = "a"\nname = "b"\n')
    (directory / "below").mkdir()
    (directory / "below" / "node.toml").write_text('[node]\nname = "a"\n')
    (directory / "below" / "conf.d" / "x.toml").mkdir(parents=True)
    return {
        "rubbish.toml": "isn't UTF-8", "folder.toml": "isn't a file", "pipe.toml": "isn't a file", "loop.toml": "no such file", "deep.toml": "too deeply",
        "twice.toml": "isn't TOML", "nowhere.toml": "no such file", "below/node.toml": "Is a directory", "rubbish.toml/node.toml": "no such file",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", ["config validate {}", "config show --config {}", "node --config {}", "coordinator --config {}", "gateway --config {}", "status --config {}",
              "history --config {}", "drill run kill-rank --yes --config {}", "wait-salvaged llama --config {}"],
)  # fmt: skip
def test_files_that_are_none_are_named_and_nothing_else(cli, tmp_path, words) -> None:
    for name, said in unreadables(tmp_path).items():
        code, _, err = cli(*(str(tmp_path / name) if word == "{}" else word for word in words.split()))
        assert code == 78 and len(err.splitlines()) == 1 and "Try: " in err and "is missing" not in err, (name, err)
        assert said in err, (name, err)
