"""From rates to tokens: arithmetic alone, and a receiver that bounds what it is asked for."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from kvguard.capacity import asked, link, meaning
from kvguard.capacity import receiver as receiving
from kvguard.capacity.machine import layout_of
from kvguard.capacity.receiver import Receiver
from kvguard.errors import BadConfig, Unreachable
from kvguard.limits import PAYLOAD_BYTES_MAX
from kvguard.transport.keys import Keys, generate

DEEDS = {"memcpy": 10.0, "checksum": 6.0, "capture, decode": 3.0, "capture, whole blocks": 9.0, "arena append": 1.0}


def rates(bulk_gb_s: float) -> tuple[dict, dict]:
    machine = {"rows": [{"what": what, "gb_s": rate} for what, rate in DEEDS.items()]}
    return machine, {"rows": [{"frame_bytes": 65536, "bulk_gb_s": 99.0}, {"frame_bytes": 1 << 20, "bulk_gb_s": bulk_gb_s}]}


def test_a_side_does_its_deeds_one_after_the_other_and_the_slower_side_decides() -> None:
    told = meaning.means(*rates(2.0), 1000)
    assert told["sender_gb_s"] == pytest.approx(1.0) and told["holder_gb_s"] == pytest.approx(2 / 3) == told["gb_s"]
    assert told["bound_by"] == "holder"
    (row,) = told["rows"]
    assert row["tokens_per_s"] == pytest.approx(2 / 3 * 1e6) and row["prompt_ms"] == pytest.approx(4096 / row["tokens_per_s"] * 1e3)
    assert meaning.means(*rates(0.01), None)["gb_s"] < 0.01
    assert [row["bytes_per_token"] for row in meaning.means(*rates(2.0), None)["rows"]] == [size for _, size in meaning.SHAPES]


@pytest.mark.parametrize("wanted", [1, 4096, 40_000, 131_072, 1 << 26])
def test_a_layout_comes_near_and_its_pool_stays_small(wanted: int) -> None:
    layout = layout_of(wanted)
    assert layout.pool_bytes <= 128 << 20
    assert wanted > 512 * 4096 or abs(layout.token_bytes - wanted) <= 4096


@pytest.fixture
def receiver():
    made = Receiver("tcp://127.0.0.1:0")
    yield made
    made.close()


TOO_MUCH = b'{"way": "raw", "frames": 1, "bytes": %d}\n' % (PAYLOAD_BYTES_MAX + 1)
HALF = b'{"way": "bulk", "frames": 1.5, "bytes": 1}\n'


@pytest.mark.parametrize("said", [b"{}\n", b"rubbish\n", TOO_MUCH, b'{"way": "x", "frames": 1, "bytes": 1}\n', HALF, b"[" * 4000 + b"\n", b""])
def test_what_makes_no_sense_ends_the_conversation_and_not_the_receiver(receiver, said) -> None:
    host, port = receiver.address.removeprefix("tcp://").split(":")
    served: list[bool] = []
    for _ in range(2):
        serving = threading.Thread(target=lambda: served.append(receiver.serve_one(10.0)))
        serving.start()
        with socket.create_connection((host, int(port)), 10.0) as stranger:
            lines = stranger.makefile("rwb")
            assert set(json.loads(lines.readline())) == {"name", "raw", "bulk", "control"}
            lines.write(said)
            lines.flush()
            stranger.shutdown(socket.SHUT_WR)
            assert lines.readline() == b""
        serving.join(10.0)
        assert not serving.is_alive()
    assert served == [True, True], "no conversation ended with an error of ours"


def test_a_sender_that_asks_and_sends_nothing_keeps_nobody_out(receiver, monkeypatch) -> None:
    monkeypatch.setattr(receiving, "IDLE_S", 0.5)
    host, port = receiver.address.removeprefix("tcp://").split(":")
    serving = threading.Thread(target=receiver.serve_one, args=(10.0,))
    serving.start()
    with socket.create_connection((host, int(port)), 10.0) as sender, sender.makefile("rwb") as lines:
        lines.readline()
        lines.write(b'{"way": "bulk", "frames": 5, "bytes": 10}\n')
        lines.flush()
        serving.join(20.0)
        assert not serving.is_alive()


def test_a_sender_that_goes_away_in_the_middle_ends_its_conversation(receiver) -> None:
    host, port = receiver.address.removeprefix("tcp://").split(":")
    for way in ("raw", "bulk"):
        serving = threading.Thread(target=receiver.serve_one, args=(10.0,))
        serving.start()
        with socket.create_connection((host, int(port)), 10.0) as sender:
            lines = sender.makefile("rwb")
            greeting = json.loads(lines.readline())
            lines.write(json.dumps({"way": way, "frames": 9, "bytes": 1000}).encode() + b"\n")
            lines.flush()
            if way == "raw":
                socket.create_connection((host, greeting["raw"]), 10.0).close()
            lines.close()
        serving.join(20.0)
        assert not serving.is_alive(), way


def test_with_keys_both_ends_list_each_other_or_it_is_said() -> None:
    pairs = {name: generate() for name in ("host-1", "host-2")}
    listed = {name: pair.public for name, pair in pairs.items()}
    keys = {name: Keys(pair.secret, pair.public, listed) for name, pair in pairs.items()}
    receiver = Receiver("tcp://127.0.0.1:0", keys["host-2"])
    serving = threading.Thread(target=lambda: [receiver.serve_one(20.0) for _ in range(2)])
    serving.start()
    try:
        measured = link.measure(receiver.address, (65536,), 1, 1 << 20, keys["host-1"])
        assert measured["to"] == receiver.address and [row["pairs"] for row in measured["rows"]] == [1]
        with pytest.raises(BadConfig, match="no key is listed for 'peer:host-2'"):
            link.measure(receiver.address, (65536,), 1, 1 << 20, Keys(pairs["host-1"].secret, listed["host-1"], {"host-1": listed["host-1"]}))
    finally:
        serving.join(30.0)
        receiver.close()


def test_answers_of_a_daemon_are_counted_and_sorted() -> None:
    asked_for = []
    told = asked.answers(lambda: asked_for.append(1))
    assert len(asked_for) == told["asked"] and 0 <= told["p50_ms"] <= told["p99_ms"] <= told["max_ms"]


def test_nobody_there_and_no_such_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}"
        for offset in range(5):  # whichever of a receiver's ports it is that somebody has
            with pytest.raises(BadConfig, match="Try: an address of this host, and five free ports in a row"):
                Receiver(f"tcp://127.0.0.1:{port - offset}")
    with pytest.raises(Unreachable, match="kvguard bench --listen"):
        link.measure(address)
    with pytest.raises(BadConfig, match="without keys"):
        Receiver("tcp://192.0.2.1:0")
