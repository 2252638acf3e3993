"""The journal: durable before it returns, one process at a time, and never repaired."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvguard.daemon.journal import Journal, NotDurable
from kvguard.errors import BadConfig


def test_values_survive(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.db")
    journal.persist("epoch/a", b"\x00\x01")
    journal.persist("epoch/b", b"2")
    journal.persist("epoch/a", b"3")
    journal.persist("epoch/b", None)
    first = journal.next_incarnation()
    assert first > 0 and journal.next_incarnation() == first + 1
    journal.close()
    again = Journal(tmp_path / "deep" / "journal.db")
    assert again.load() == {"epoch/a": b"3"}
    assert again.next_incarnation() == first + 2
    again.close()


def test_what_was_persisted_survives_a_kill(tmp_path):
    code = (
        "import sys, pathlib; from kvguard.daemon.journal import Journal; j = Journal(pathlib.Path(sys.argv[1]));\n"
        "n = 0\nwhile True:\n n += 1; j.persist('epoch', str(n).encode()); print(n, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "journal.db")], stdout=subprocess.PIPE, text=True)
    said = [int(child.stdout.readline()) for _ in range(20)]
    os.kill(child.pid, signal.SIGKILL)
    said += [int(line) for line in child.stdout.read().split()]
    child.wait()
    journal = Journal(tmp_path / "journal.db")
    assert int(journal.load()["epoch"]) in (said[-1], said[-1] + 1)
    journal.close()


def test_every_fact_is_synced(tmp_path):
    """A kill can't tell: what a dead process wrote is still the kernel's to write. A machine that loses power can."""
    journal = Journal(tmp_path / "journal.db")
    settings = [journal._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2], "in a write-ahead log each commit is synced with FULL alone"
    journal.close()


def test_one_process_at_a_time(tmp_path):
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(BadConfig, match="belongs to a process that runs.*Try:"):
        Journal(tmp_path / "journal.db")
    journal.persist("still", b"mine")
    journal.close()


@pytest.mark.parametrize("damage", ["garbage", "page"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "journal.db"
    journal = Journal(path)
    for number in range(400):
        journal.persist(f"key/{number}", bytes(64))
    journal.close()
    whole = bytearray(path.read_bytes())
    if damage == "garbage":
        whole[:] = os.urandom(len(whole))
    else:
        whole[4096 : 4096 * 2] = b"\xff" * 4096
    path.write_bytes(whole)
    with pytest.raises(BadConfig, match="damaged.*Try:"):
        Journal(path)


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="Try:"):
        Journal(tmp_path / "file" / "journal.db")


def test_what_cannot_be_written_raises_and_the_old_value_stays(tmp_path):
    journal = Journal(tmp_path / "journal.db")
    journal.persist("epoch", b"1")
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")  # the disk is full
    with pytest.raises(NotDurable, match="'epoch' can't be made durable.*Try:"):
        journal.persist("epoch", bytes(1 << 16))
    assert journal.load() == {"epoch": b"1"}
    journal.close()
