"""`kvguard gateway` as a process: no coordinator, answers under way, SIGHUP, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from kvguard import config
from kvguard.transport import keys
from tests.gateway import toy_model
from tests.gateway.conftest import ROOT, until

pytestmark = pytest.mark.e2e


def test_sigterm_drains(tmp_path, pool):
    """The answer ends whole, and the process with 0, although the coordinator was never there."""
    (backend,) = pool.take(1)
    backend.set(delay_ms=20)
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as nobody:
        url, coordinator = (f"{kind}://127.0.0.1:{one.getsockname()[1]}" for kind, one in (("http", free), ("tcp", nobody)))
    values = {"listen": url, "instances": (f"a {backend.url} node-a",), "tokenizer": str(toy_model.save(tmp_path)), "coordinator": coordinator}
    pair, key = keys.generate(), tmp_path / "gateway.key"
    keys.save(keys.Keys(pair.secret, pair.public, {"coordinator": keys.generate().public}), key)
    values["keys"] = str(key)
    (tmp_path / "gateway.toml").write_text(config.template(config.GatewayConfig, values))
    command = [sys.executable, "-m", "kvguard.cli", "gateway", "--config", str(tmp_path / "gateway.toml")]
    with open(tmp_path / "log", "ab") as log:
        gateway = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=dict(os.environ))
    try:

        def ready() -> bool:
            assert gateway.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        until("the gateway", ready)
        for content, said in ((key.read_text(), "keys read again"), ("rubbish\n", "the keys stay as they were")):
            key.write_text(content)
            gateway.send_signal(signal.SIGHUP)
            until(said, lambda said=said: said in (tmp_path / "log").read_text())
        body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30, trust_env=False) as response:
            lines = response.iter_lines()
            text = [next(lines)]
            gateway.send_signal(signal.SIGTERM)
            text += list(lines)
        assert text[-2] == "data: [DONE]" or text[-1] == "data: [DONE]"
        said = "".join(json.loads(line[6:])["choices"][0]["text"] for line in text if line.startswith("data: {"))
        assert said == toy_model.text_of(toy_model.answer(list(b"x"), 60, False))
        assert gateway.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", timeout=5, trust_env=False)
    finally:
        if gateway.poll() is None:
            gateway.kill()
            gateway.wait()
        pool.give(backend)
