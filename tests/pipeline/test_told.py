"""What drivers and stages are told: settings files and command lines that are wrong are named, and bounded."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from kvguard.errors import BadConfig, BadFrame
from kvguard.pipeline import commands, settings


@dataclass(frozen=True)
class Told:
    model: str
    stages: int
    threads: int = 1
    rate: float = 1.0
    warm: bool = False
    peers: tuple[str, ...] = ()


def test_settings_are_read_as_they_were_written(tmp_path) -> None:
    told = Told('a "model"', 3, rate=2, warm=True, peers=("tcp://a:1", "tcp://b:1"))
    settings.write(tmp_path / "told.toml", told)
    assert settings.read(tmp_path / "told.toml", Told) == told


def test_every_fault_of_a_settings_file_is_named(tmp_path) -> None:
    (tmp_path / "told.toml").write_text('stages = true\nthreads = "2"\nrate = 1\nwarm = 1\nwram = 1\n')
    with pytest.raises(BadConfig) as caught:
        settings.read(tmp_path / "told.toml", Told)
    said = str(caught.value)
    for fault in ("unknown key wram", "missing key model", "stages is True, not a int", "threads is '2', not a int", "warm is 1, not a bool", "Try: "):
        assert fault in said
    assert "rate" not in said


def test_a_line_without_an_end_is_dropped_and_what_follows_is_read(monkeypatch) -> None:
    monkeypatch.setattr(commands, "LINE_BYTES_MAX", 100)
    reading, writing = os.pipe()
    try:
        told = commands.Commands(reading)
        assert told.read() == [], "it waits for nothing"
        os.write(writing, b'{"do": "quit"}\n\n{"do": ')
        assert [commands.decode(line) for line in told.read()] == [commands.Quit()]
        os.write(writing, b'"quit"}\n' + bytes(101))
        whole, beyond = told.read()
        assert commands.decode(whole) == commands.Quit()
        with pytest.raises(BadFrame, match="not a command.*Try: "):
            commands.decode(beyond)
        os.write(writing, b'\n{"do": "release", "run": "one"}\n')
        assert [commands.decode(line) for line in told.read()] == [commands.Release("one")]
        os.close(writing)
        writing = -1
        assert told.read() == [] and told.ended
    finally:
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)
