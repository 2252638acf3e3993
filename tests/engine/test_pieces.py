"""What a step says that it wrote: every position that it commits, in the blocks where it stands, and only to a pool that packs."""

from __future__ import annotations

import numpy as np
import pytest

from kvguard.device import open_device
from kvguard.engine import Rank, attach
from kvguard.engine.pull import pieces_of
from kvguard.engine.telling import Row, Telling
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "float32", 1, 16, 4, 1, 2)


@pytest.mark.parametrize(
    ("first", "end", "wanted"),
    [
        (0, 0, []),
        (0, 3, [(9, 0, 3)]),
        (3, 4, [(9, 3, 1)]),
        (3, 9, [(9, 3, 1), (2, 0, 4), (5, 0, 1)]),
        (4, 8, [(2, 0, 4)]),
    ],
)
def test_positions_stand_in_blocks(first, end, wanted):
    assert pieces_of([9, 2, 5], first, end, 4) == wanted


@pytest.fixture(params=["host", "rehearsal"])
def guard(request, tmp_path):
    pool = open_device(request.param).allocate(LAYOUT)
    made = attach("toy", Rank(0, 0, 0), pool, socket=tmp_path / "nobody.sock")
    yield made
    made.detach(timeout_s=0.1)
    pool.close()


def test_a_batch_says_what_it_wrote_since_it_was_told(guard, monkeypatch):
    said: list[list[tuple[int, int, int]]] = []
    packs = hasattr(guard.pool, "wrote")
    if packs:
        monkeypatch.setattr(guard.pool, "wrote", lambda *columns: said.append(list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))))
    rows = [Row("one", 0, b"r"), Row("two", 4, b"r")]
    for row in rows:
        row.ids.extend(range(20))
    told = Telling(guard, None, rows)
    for length in (5, 6, 6, 9):  # a prompt, a token, an id without KV, three tokens whose commits waited
        told.enter(1)
        told.publish(length)
    told.release()
    wanted = [
        [(0, 0, 4), (1, 0, 1), (4, 0, 4), (5, 0, 1)],
        [(1, 1, 1), (5, 1, 1)],
        [(1, 2, 2), (2, 0, 1), (5, 2, 2), (6, 0, 1)],
    ]
    assert said == (wanted if packs else [])
