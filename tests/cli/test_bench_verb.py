"""kvguard bench: the document's structure, the tables of a known one, the other end, and whom it refuses to ask. No figure is judged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from kvguard.cli import bench

ROW = {"bytes_each", "gb_s", "memcpy_gb_s", "ratio", "ratio_low", "ratio_high", "rounds", "what"}
FRAMES = {"frame_bytes", "frames", "pairs", "ratio", "ratio_low", "ratio_high", "raw_gb_s", "bulk_gb_s", "control_gb_s"}
KNOWN = {
    "schema": "kvguard.bench/1",
    "machine": {
        "cores": 2, "layout": {"layers": 32, "block_tokens": 16, "token_bytes": 131072},
        "rows": [
            {"what": "checksum", "bytes_each": 1 << 20, "gb_s": 31.31, "memcpy_gb_s": 7.85, "ratio": 3.96, "ratio_low": 3.64, "ratio_high": 4.13, "rounds": 5},
        ],
    },
    "link": {"to": "tcp://10.77.0.12:7440", "loopback": False, "round_trip_us": 83.2, "rows": [
        {"frame_bytes": 1 << 20, "frames": 48, "pairs": 5, "ratio": 0.97, "ratio_low": 0.9, "ratio_high": 1.0, "raw_gb_s": 1.18, "bulk_gb_s": 1.14,
         "control_gb_s": 0.9},
    ]},
    "node": {"node": "host-2", "address": "tcp://10.77.0.12:7420", "asked": 50, "p50_ms": 3.21, "p99_ms": 9.0, "max_ms": 9.0},
    "means": {"sender_gb_s": 0.9, "holder_gb_s": 0.91, "gb_s": 0.9, "bound_by": "sender", "rows": [
        {"model": "yours", "bytes_per_token": 131072, "tokens_per_s": 6866.4, "prompt_tokens": 4096, "prompt_ms": 596.5},
    ]},
}  # fmt: skip
SHOWN = """\
This machine, 2 cores, tokens of 128.0 KiB
one thread  bytes each  GB/s   memcpy GB/s  ratio
checksum    1.0 MiB     31.31  7.85         3.96 (3.64..4.13)
Link: 10.77.0.12:7440; round trip 83 us
frames of  raw TCP GB/s  kvguard  ZeroMQ alone  kvguard / raw
1.0 MiB    1.18          1.14     0.90          0.97 (0.90..1.00)
Daemon of host-2 at tcp://10.77.0.12:7420: answers in 3.2 ms (p99 9.0), a new connection each time
Protects at most (sender 0.90, holder 0.91 GB/s)
model  KV a token  tokens/s  prompt of 4096, ms
yours  128.0 KiB   6866      596
"""


def test_a_known_document_as_tables(capsys) -> None:
    bench.render(KNOWN)
    assert "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n" == SHOWN


def judged(found: dict) -> None:
    assert found["schema"] == "kvguard.bench/1" and set(found) == set(KNOWN)
    deeds = found["machine"]["rows"]
    assert [row["what"] for row in deeds] == ["memcpy", "checksum", "capture, decode", "capture, whole blocks", "arena append"]
    assert all(set(row) == ROW and row["gb_s"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in deeds)
    frames = found["link"]["rows"]
    assert [row["frame_bytes"] for row in frames] == list(bench.SIZES)
    assert all(set(row) == FRAMES and min(row["raw_gb_s"], row["bulk_gb_s"], row["control_gb_s"]) > 0 for row in frames)
    assert set(found["means"]) == set(KNOWN["means"]) and all(set(row) == set(KNOWN["means"]["rows"][0]) for row in found["means"]["rows"])


def test_the_document_of_this_machine(cli) -> None:
    code, out, err = cli("bench", "--quick", "--bytes-per-token", "40000", "-o", "json")
    found = json.loads(out)
    judged(found)
    assert code == 0 and not err, "progress belongs to terminals"
    assert found["link"]["loopback"] and found["node"] is None and [row["bytes_per_token"] for row in found["means"]["rows"]] == [40000]


def test_the_other_end(cli) -> None:
    command = [sys.executable, "-m", "kvguard.cli", "bench", "--listen", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
        try:
            address = other.stderr.readline().split("--to ")[1].split()[0]
            for _ in range(2):  # one measurement after the other
                code, out, _ = cli("bench", "--quick", "--to", address, "-o", "json")
                found = json.loads(out)
                judged(found)
                assert code == 0 and not found["link"]["loopback"] and found["link"]["to"] == address
        finally:
            other.send_signal(signal.SIGINT)
            assert other.wait(20.0) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "tcp://127.0.0.1:1"), 3, "kvguard bench --listen"),
        (("--to", "host-9", "--coordinator", "tcp://127.0.0.1:1", "--timeout", "0.2"), 3, "nobody"),
        (("--listen", "tcp://0.0.0.0:7440"), 78, "of this host"), (("--listen", "here"), 2, "is not an address"), (("--bytes-per-token", "0"), 2, "range"),
    ],
)  # fmt: skip
def test_what_it_refuses(cli, monkeypatch, arguments, code, said) -> None:
    monkeypatch.setattr("kvguard.capacity.machine.measure", lambda *_, **__: {"rows": []})
    ended, _, err = cli("bench", *arguments)
    assert ended == code and said in err
