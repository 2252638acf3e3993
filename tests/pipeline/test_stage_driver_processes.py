"""The engine without kvguard, as real processes over loopback: the same tokens, logits and KV however it is split, batched or disturbed."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from kvguard.pipeline.links import Links
from kvguard.pipeline.stage import layers_of
from kvguard.pipeline.steps import STATE, STEP, Facts, Message
from kvguard.pipeline.weights import make_random
from tests.pipeline.engine_processes import Unguarded, end

PROMPTS = [[(5 * i + n) % 300 for i in range(length)] for n, length in enumerate((3, 90, 64, 17, 33, 1, 140, 7))]
TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random(tmp_path_factory.mktemp("model"), "llama", 3, layers=5)


def logits_of(driver, run: str) -> dict[tuple[int, int], str]:
    return {(event["sequence"], event["index"]): event["logits"] for event in driver.of("token", run=run)}


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict:
    """Tokens, logits and digests by number of stages."""
    found = {}
    for stages in (1, 2, 3):
        with Unguarded(tmp_path_factory.mktemp(f"engine{stages}"), model, stages) as engine:
            driver = engine.driver
            greedy = driver.run("g", PROMPTS, TOKENS)
            sampled = driver.run("s", PROMPTS, TOKENS, temperature=0.9, top_k=50, top_p=0.95, seed=7)
            found[stages] = (greedy["tokens"], sampled["tokens"], logits_of(driver, "g"), logits_of(driver, "s"), driver.digest("g"))
            assert engine.close() == [0] * (stages + 1)
    return found


@pytest.mark.e2e
def test_stages_change_nothing(runs) -> None:
    assert runs[1][:4] == runs[2][:4] == runs[3][:4]
    assert runs[1][0] != runs[1][1]
    assert all(len(tokens) == TOKENS for tokens in runs[1][0])
    assert len(runs[1][2]) == len(PROMPTS) * TOKENS


@pytest.mark.e2e
def test_digests_cover_every_position_of_every_rank(runs) -> None:
    for stages, (*_, digests) in runs.items():
        assert sorted(digests) == [f"0.{pp}.0" for pp in range(stages)]
        for by_sequence in digests.values():
            assert {int(index): len(found) for index, found in by_sequence.items()} == {n: len(prompt) + TOKENS - 1 for n, prompt in enumerate(PROMPTS)}
    assert runs[1][4]["0.0.0"]["1"] != runs[2][4]["0.0.0"]["1"]


@pytest.mark.e2e
def test_alone_late_and_among_others_is_the_same(model, tmp_path, runs) -> None:
    with Unguarded(tmp_path, model, 2) as engine:
        driver = engine.driver
        assert driver.run("alone", [PROMPTS[6]], TOKENS)["tokens"] == [runs[1][0][6]]
        driver.do(do="run", run="first", prompts=PROMPTS[:4], max_tokens=TOKENS, ignore_eos=True)
        driver.wait_for("token", run="first", index=3)
        driver.do(do="run", run="late", prompts=PROMPTS[4:], max_tokens=TOKENS, ignore_eos=True)
        late = driver.wait_for("finished", run="late")["tokens"]
        (first,) = driver.of("finished", run="first") or [driver.wait_for("finished", run="first")]
        assert first["tokens"] + late == runs[1][0]
        assert logits_of(driver, "first") == {key: value for key, value in runs[1][2].items() if key[0] < 4}


@pytest.mark.e2e
def test_events_in_order_and_prompts_in_chunks(model, tmp_path) -> None:
    with Unguarded(tmp_path, model, 1) as engine:
        driver = engine.driver
        driver.run("a", [PROMPTS[6]], 4)
        assert [event["position"] for event in driver.of("prefill", run="a")] == [64, 128, 140]
        tokens = driver.of("token", run="a")
        assert [(event["index"], event["position"]) for event in tokens] == [(0, 139), (1, 140), (2, 141), (3, 142)]
        assert all(earlier["t_ns"] <= later["t_ns"] for earlier, later in zip(driver.events, driver.events[1:], strict=False))


@pytest.mark.e2e
def test_bad_commands_are_named_and_change_nothing(model, tmp_path) -> None:
    with Unguarded(tmp_path, model, 1, blocks=16) as engine:
        driver = engine.driver
        for command in ({"do": "dance"}, {"do": "run", "run": "x"}, {"do": "digest", "run": "none"}, {"do": "release", "run": "none"}):
            driver.do(**command)
            assert driver.wait_for("error")["message"]
        driver.do(do="run", run="t", prompts=["text"], max_tokens=3)
        assert "no tokenizer" in driver.wait_for("error")["message"]
        driver.process.stdin.write("not json\n")
        finished = driver.run("big", [[1, 2, 3], [1] * 250, [4, 999999]], 8)
        assert [len(tokens) for tokens in finished["tokens"]] == [8, 0, 0]
        assert {event["sequence"] for event in driver.of("error", run="big")} == {1, 2}
        driver.do(do="release", run="big")
        driver.wait_for("released", run="big")
        assert len(driver.run("after", [[1, 2, 3]], 8)["tokens"][0]) == 8


@pytest.mark.e2e
def test_guarded_ranks_without_a_daemon_run_the_same(model, tmp_path, runs) -> None:
    with Unguarded(tmp_path, model, 2, guarded=True) as engine:
        assert engine.driver.run("g", PROMPTS, TOKENS)["tokens"] == runs[1][0]
        assert engine.driver.digest("g") == runs[2][4]
        engine.driver.do(do="release", run="g")
        engine.driver.wait_for("released", run="g")
        assert engine.driver.run("g", PROMPTS[:2], TOKENS)["tokens"] == runs[1][0][:2]
        assert engine.close() == [0, 0, 0]


def raw_garbage(endpoint: str) -> None:
    host, port = endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)


@pytest.mark.e2e
def test_garbage_on_a_stage_port_changes_nothing(model, tmp_path, runs) -> None:
    with Unguarded(tmp_path, model, 2) as engine:
        raw_garbage(engine.endpoints[0])
        raw_garbage(engine.endpoints[-1])
        links = Links("tcp://127.0.0.1:*")
        try:
            route = tuple(engine.endpoints)
            fact = Facts("s", 0, 4, True, 1, (0,), 0, (1, 2, 3, 4))
            bad = [
                Message(STEP, 0, 1, route, 0, (fact, fact)),
                Message(STEP, 0, 1, route, 0, (Facts("s", 5, 9, True, 1, (0,), 0, (1, 2, 3, 4)),)),
                Message(STEP, 0, 1, route, 0, (Facts("s", 0, 4, True, 1, (9999,), 0, (1, 2, 3, 4)),)),
                Message(STEP, 0, 1, route, 0, (Facts("s", 0, 4, True, 1, (0,), 0, (1, 2, 3, 4_000_000)),)),
                Message(STEP, 0, 1, route, 0, (Facts("s", 0, 40, True, 1, (0,), 0, (1, 2, 3, 4)),)),
                Message(STEP, 0, 1, route, 1, (fact,)),
                Message("dance", 0, 1, route, 0),
                Message(STATE, 0, 1, route[:1], 0),
                Message(STEP, 9, 1, route, 0, (fact,)),
            ]
            for message in bad:
                assert links.send(engine.endpoints[0], message)
            links._socket(engine.endpoints[0]).send(b"\x93\x01")
            links._socket(engine.endpoints[0]).send_multipart([b"\xc1" * 40, b""])
            assert engine.driver.run("a", PROMPTS[:2], TOKENS)["tokens"] == runs[1][0][:2]
        finally:
            links.close()
        engine.close()
        log = (tmp_path / "stage0.log").read_text()
        assert "garbage on the stage port" in log and log.count("dropped step") >= 5


@pytest.mark.e2e
def test_a_dead_next_stage_blocks_nobody(model, tmp_path) -> None:
    with Unguarded(tmp_path, model, 2) as engine:
        engine.driver.run("a", [[1, 2, 3]], 3)
        engine.stages[1].send_signal(signal.SIGKILL)
        engine.stages[1].wait()
        engine.driver.do(do="run", run="b", prompts=[[1, 2, 3]], max_tokens=3)
        engine.driver.do(do="dance")  # answered: the driver isn't stuck in a send
        assert "not a command" in engine.driver.wait_for("error")["message"]
        assert end(engine.stages[0]) == 0 and engine.driver.close() == 0


@pytest.mark.e2e
def test_bad_settings_are_named(tmp_path) -> None:
    import subprocess
    import sys

    path = tmp_path / "bad.toml"
    path.write_text('instance = "x"\nstages = "two"\nunheard = 1\n')
    for module in ("stage", "driver"):
        found = subprocess.run([sys.executable, "-m", f"kvguard.pipeline.{module}", str(path)], capture_output=True, text=True, timeout=60)
        assert found.returncode == 78
        assert "unheard" in found.stderr and "stages" in found.stderr and "model" in found.stderr


def test_layers_are_split_evenly_front_first() -> None:
    assert [layers_of(30, 4, pp) for pp in range(4)] == [range(0, 8), range(8, 16), range(16, 23), range(23, 30)]
    assert [len(layers_of(5, 3, pp)) for pp in range(3)] == [2, 2, 1]
