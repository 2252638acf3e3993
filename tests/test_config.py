"""Settings: layers in order, and every fault of a configuration told at once with file, line and key."""

from __future__ import annotations

import pytest

from kvguard import config
from kvguard.errors import BadConfig

GOOD = '[node]\nname = "a"\nruntime_dir = "/tmp/a"\n'


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_layers_in_order(tmp_path):
    file = write(tmp_path / "node.toml", GOOD + "poll_ms = 1\nheartbeat_ms = 11\nhang_ms = 101\nids_retention_s = 1\n")
    write(tmp_path / "conf.d" / "10.toml", "[node]\nheartbeat_ms = 12\nhang_ms = 102\nids_retention_s = 2\n[coordinator]\nreplicas = 2\n")
    write(tmp_path / "conf.d" / "20.toml", "[node]\nhang_ms = 103\nids_retention_s = 3\n")
    environ = {"KVGUARD_NODE_IDS_RETENTION_S": "4", "KVGUARD_NODE_WINDOW_BYTES": "32MiB", "KVGUARD_NODE_UIDS": "1,2", "KVGUARD_NODE_INSECURE": "yes"}
    node, origins = config.load_with_origins(config.NodeConfig, file, {"name": "b", "listen": None}, environ)
    assert (node.poll_ms, node.heartbeat_ms, node.hang_ms, node.ids_retention_s) == (1, 12, 103, 4)
    assert (node.name, node.window_bytes, node.uids, node.insecure) == ("b", 32 << 20, (1, 2), True)
    assert origins["name"] == "flag --name"
    assert origins["hang_ms"] == f"{tmp_path}/conf.d/20.toml:2"
    assert origins["ids_retention_s"] == "environment KVGUARD_NODE_IDS_RETENTION_S"
    assert origins["device"] == "default"
    assert config.load(config.CoordinatorConfig, file, {}, {}).replicas == 2


def test_every_fault_at_once(tmp_path):
    file = write(
        tmp_path / "node.toml",
        '[node]\nname = "a/b"\n\nlisten = "tcp://10.0.0.1:7420"\nheartbeat_ms = 1\nwindow = 3\ndevice = "tpu"\narena_bytes = "1XB"\nruntime_dir = "here"\n[nodes]\n',
    )
    with pytest.raises(BadConfig) as caught:
        config.load(config.NodeConfig, file, {}, {"KVGUARD_NODE_POLLMS": "3", "KVGUARD_NODE_POLL_MS": "soon"})
    lines = str(caught.value).splitlines()
    wanted = [
        (f"{file}:2", "name"), (f"{file}:4", "listen"), (f"{file}:5", "heartbeat_ms"), (f"{file}:6", "window"), (f"{file}:7", "device"),
        (f"{file}:8", "arena_bytes"), (f"{file}:9", "runtime_dir"), (f"{file}:10", "nodes"), ("environment KVGUARD_NODE_POLLMS", "pollms"),
        ("environment KVGUARD_NODE_POLL_MS", "poll_ms"),
    ]  # fmt: skip
    assert len(lines) == len(wanted)
    for where, key in wanted:
        assert any(line.startswith(f"{where}: {key}: ") and "Try: " in line for line in lines), (where, key, lines)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("heartbeat_ms = 300\n", 2, "suspect_ms"),
        ("suspect_ms = 2000\n", 2, "dead_ms"),
        ("exclude_ms = 20000\n", 2, "seal_ms"),
        ('\nlisten = "tcp://0.0.0.0:7400"\n', 3, "listen"),
        ("replicas = 0\n", 2, "replicas"),
        ("replicas = true\n", 2, "replicas"),
    ],
)
def test_relations_and_bounds(tmp_path, text, line, key):
    file = write(tmp_path / "coordinator.toml", "[coordinator]\n" + text)
    with pytest.raises(BadConfig, match=rf"^{file}:{line}: {key}: .*Try: .") as caught:
        config.load(config.CoordinatorConfig, file, {}, {})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "where", "attempt"),
    [
        ('transport = "nixl"\n', "3: transport: needs nixl_devices", "nixl_devices = "),
        ("nixl_quarantine_s = 1\nnixl_stuck_ms = 5500\n", "3: nixl_quarantine_s: is less than nixl_stuck_ms", "nixl_quarantine_s = 6, or 0"),
    ],
)
def test_relations_of_a_node(tmp_path, text, where, attempt):
    with pytest.raises(BadConfig) as caught:
        config.load(config.NodeConfig, write(tmp_path / "node.toml", f'[node]\nname = "a"\n{text}'), {}, {})
    (fault,) = str(caught.value).splitlines()
    assert where in fault and f"Try: {attempt}" in fault


def test_three_hosts_need_keys_or_a_written_word(tmp_path):
    text = '[node]\nname = "a"\nlisten = "tcp://0.0.0.0:7420"\nadvertise = "tcp://10.0.0.1:7420"\ncoordinator = "tcp://10.0.0.9:7400"\n'
    with pytest.raises(BadConfig) as caught:
        config.load(config.NodeConfig, write(tmp_path / "a.toml", text), {}, {})
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["listen", "advertise", "coordinator"]
    assert config.load(config.NodeConfig, write(tmp_path / "b.toml", text + "insecure = true\n"), {}, {}).insecure
    assert config.load(config.NodeConfig, write(tmp_path / "c.toml", text + 'keys = "/etc/keys"\n'), {}, {}).keys == "/etc/keys"


def test_wildcard_must_be_advertised(tmp_path):
    text = '[node]\nname = "a"\nlisten = "tcp://0.0.0.0:7420"\ninsecure = true\n'
    with pytest.raises(BadConfig, match=":3: advertise: .*wildcard"):
        config.load(config.NodeConfig, write(tmp_path / "a.toml", text), {}, {})


@pytest.mark.parametrize(
    ("text", "wanted"), [("[node]\nname = \n", ":2: -: isn't TOML"), ("", r"\[node\]: name: is missing"), ("node = 3\n", ":1: node: is not a section")]
)
def test_not_a_configuration(tmp_path, text, wanted):
    with pytest.raises(BadConfig, match=wanted):
        config.load(config.NodeConfig, write(tmp_path / "x.toml", text), {}, {})


def test_missing_file(tmp_path):
    for cls in config.KINDS.values():
        with pytest.raises(BadConfig, match=f"no such file. Try: kvguard config init {cls.SECTION} > "):
            config.load(cls, tmp_path / "x.toml", {}, {})


def test_what_is_proposed_for_a_path_is_one_for_this_setting(tmp_path):
    file = write(tmp_path / "x.toml", '[gateway]\ninstances = ["a http://h:1 n"]\ntokenizer = "here"\n[coordinator]\nstate_dir = "here"\n')
    with pytest.raises(BadConfig, match='Try: tokenizer = "/path/to/tokenizer"'):
        config.load(config.GatewayConfig, file, {}, {})
    with pytest.raises(BadConfig, match='Try: state_dir = "/var/lib/kvguard"'):
        config.load(config.CoordinatorConfig, file, {}, {})


def test_the_template_is_a_configuration(tmp_path):
    for cls in (config.NodeConfig, config.CoordinatorConfig):
        file = write(tmp_path / f"{cls.SECTION}.toml", config.template(cls, {"name": "a"}))
        assert config.load(cls, file, {}, {}) == cls(name="a")
