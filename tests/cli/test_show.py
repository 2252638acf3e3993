"""Tables: what is written without rich is what rich would have written."""

from __future__ import annotations

import pytest

from kvguard.cli import show

COLUMNS = ["rank", "state", "holders", "lag_ms"]
ROWS = [["0.0.0", "protected", ["host-2", "host-3"], 1.25], ["", "standby [x]", [], None]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [["a longer cell than its title", "alive", "-", 0]]])
def test_the_quick_way_and_rich_agree(capsys, rows) -> None:
    show.table("Ranks", COLUMNS, rows, "none")
    quick = capsys.readouterr().out
    show.wrapped("Ranks", COLUMNS, [[show.text(cell) for cell in row] for row in rows])
    assert quick == capsys.readouterr().out and len(quick.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("cell", ["ü" * 3, "x" * 300, "\x1b[31mred"])
def test_what_does_not_fit_or_is_not_plain_goes_to_rich(capsys, cell, monkeypatch) -> None:
    monkeypatch.setattr(show, "ruled", lambda *_: pytest.fail("written without rich"))
    show.table("Ranks", COLUMNS, [["0.0.0", "lost", cell, 0]], "none")
    assert "lost" in capsys.readouterr().out
    show.table("Ranks", COLUMNS, [], "none is attached")
    assert capsys.readouterr().out == "Ranks: none is attached\n"
