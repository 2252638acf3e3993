"""Copies that no one feels: pieces of 1 MiB, two in flight, no faster than configured, never waited for without an end."""

from __future__ import annotations

import pytest

from kvguard.device.extents import PIECE_BYTES_MAX
from kvguard.device.paced import IN_FLIGHT, Paced
from kvguard.errors import TimedOut

MIB = 1 << 20


class Engine:
    """A copy engine that finishes a unit for every nap of whoever waits. `flying`: bytes between two events, in order."""

    def __init__(self) -> None:
        self.now, self.naps = 100.0, []
        self.copied: list[tuple[int, int, int]] = []
        self.flying: list[int] = []
        self.ended = self.most = 0
        self.stuck = False

    def copy_rows(self, to, to_pitch, at, at_pitch, width, rows, stream) -> None:
        self.copied.append((to, at, width * rows))

    def record(self, stream) -> int:
        self.flying.append(sum(size for _, _, size in self.copied) - sum(self.flying))
        self.most = max(self.most, len(self.flying) - self.ended)
        return len(self.flying)

    def is_done(self, event: int) -> bool:
        return event <= self.ended

    def nap(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds
        self.ended += 0 if self.stuck else 1


def paced(engine: Engine, bytes_per_s: int = 0) -> Paced:
    return Paced(engine, "stream", bytes_per_s, clock=lambda: engine.now, nap=engine.nap)


def test_a_long_copy_goes_in_pieces_two_at_a_time():
    engine = Engine()
    one = paced(engine)
    one.copy(1000, 5000, 5 * MIB + 7)
    one.finish()
    assert [size for _, _, size in engine.copied] == [MIB] * 5 + [7]
    assert engine.copied[1][:2] == (1000 + MIB, 5000 + MIB) and engine.copied[5][:2] == (1000 + 5 * MIB, 5000 + 5 * MIB)
    assert max(engine.flying) <= PIECE_BYTES_MAX and engine.most == IN_FLIGHT and engine.ended == len(engine.flying)


def test_small_pieces_share_an_event():
    engine = Engine()
    one = paced(engine)
    for n in range(20):
        one.rows(n, 0, n, 0, 100 * 1024, 1)
    one.finish()
    assert len(engine.flying) == 2 and max(engine.flying) <= PIECE_BYTES_MAX


def test_it_is_no_faster_than_configured():
    engine = Engine()
    began = engine.now
    one = paced(engine, bytes_per_s=MIB)
    one.copy(0, 0, 4 * MIB)
    one.finish()
    assert engine.now - began >= 3.0  # the last piece begins when the three before it were due


def test_what_never_ends_is_given_up():
    engine = Engine()
    engine.stuck = True
    one = paced(engine)
    one.copy(0, 0, 10)
    with pytest.raises(TimedOut, match="Try:"):
        one.finish(0.01)
