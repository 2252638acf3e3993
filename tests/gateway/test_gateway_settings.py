"""The gateway's section: bounds, the instances' lines, the command line."""

from __future__ import annotations

import pytest

from kvguard import config
from kvguard.errors import BadConfig

GOOD = '[gateway]\ninstances = ["a http://127.0.0.1:8001 node-a", "b  https://h.example/base node-b"]\ntokenizer = "/models/toy"\n'


def load(tmp_path, text: str, environ=None) -> config.GatewayConfig:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    return config.load(config.GatewayConfig, file, {}, environ or {})


def test_a_section(tmp_path):
    found = load(tmp_path, GOOD)
    assert found.instances == ("a http://127.0.0.1:8001 node-a", "b https://h.example/base node-b")
    assert load(tmp_path, GOOD, {"KVGUARD_GATEWAY_INSTANCES": "c http://h:1 n,d http://h:2 m"}).instances == ("c http://h:1 n", "d http://h:2 m")
    values = {"instances": ("a http://h:1 n",), "tokenizer": "/t"}
    assert load(tmp_path, config.template(config.GatewayConfig, values)) == config.GatewayConfig(instances=("a http://h:1 n",), tokenizer="/t")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('instances = ["a http://h:1"]', "is not .INSTANCE URL NODE"), ('instances = ["a ftp://h n"]', "is not .INSTANCE"), ("instances = []", "is not a list"),
        ('instances = "a http://h:1 n"', "is not a list"), ('instances = ["a http://h:1 n", "a http://h:2 m"]', "listed twice"),
        ('listen = "http://127.0.0.1"', "is not an address for clients"), ('listen = "https://h:1"', "is not an address for clients"),
        ('listen = "http://h:99999"', "is not an address for clients"), ('chat = "maybe"', "none of"), ("attempts = 0", "outside"),
        ('tokenizer = "here"', "absolute"), ('coordinator = "tcp://10.0.0.1:7400"', "without keys"),
    ],
)  # fmt: skip
def test_faults(tmp_path, line, what):
    name = line.split(" ")[0]
    with pytest.raises(BadConfig, match=rf":4: {name}: .*{what}.*Try: .") as caught:
        lines = GOOD.splitlines() + [line]
        kept = [one for one in lines[:-1] if not one.startswith(f"{name} ")]
        load(tmp_path, "\n".join([*kept, *["# "] * (3 - len(kept)), line]) + "\n")
    assert len(str(caught.value).splitlines()) == 1


def test_no_tokenizer_ends_with_78(tmp_path, monkeypatch, capsys):
    from kvguard.cli import main

    file = tmp_path / "gateway.toml"
    file.write_text(GOOD.replace("/models/toy", str(tmp_path)))
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "--config", str(file)])
    assert ended.value.code == 78 and "is not a tokenizer" in capsys.readouterr().err
