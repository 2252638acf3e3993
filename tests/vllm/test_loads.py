"""Moved sequences' KV on its way into vLLM's blocks, and what is asked for: needs no vLLM. Part of the default suite."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from test_parts import request_of

from kvguard.engine import vllm_loads
from kvguard.engine.fetch import Fetched
from kvguard.engine.vllm_facts import Load, LoadEnd
from kvguard.engine.vllm_loads import AT_ONCE_MAX, Loads
from kvguard.engine.vllm_moves import Moves
from kvguard.errors import Refused
from kvguard.format.moves import encode, ids_sum
from kvguard.types import Epoch, MovedToken

TOKEN = encode(MovedToken("dead", "s", Epoch(3, "coordinator"), 6, b"\1" * 32))


def all_ends(loads: Loads, count: int) -> dict:
    ends, turn = {}, threading.Event()
    for _ in range(2000):
        ends |= {end.request_id: end for end in loads.ended()}
        if len(ends) == count:
            return ends
        turn.wait(0.005)
    raise AssertionError(f"{len(ends)} of {count} loads ended")


def test_every_load_ends_and_none_after_its_deadline_begins(monkeypatch):
    gate, begun, now = threading.Event(), threading.Semaphore(0), [100.0]
    monkeypatch.setattr(vllm_loads, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def fetch(moved, blocks, timeout_s, ids):
        begun.release()
        assert timeout_s == 5.0 and gate.wait(20)
        return Fetched(6, 100, 1.0)

    loads = Loads(fetch, 5.0)
    for n in range(AT_ONCE_MAX + 1):
        loads.begin(Load(f"r{n}", TOKEN, [1, 2], 6))
    assert all(begun.acquire(timeout=20) for _ in range(AT_ONCE_MAX))
    now[0] += 5.0  # the deadline of the one that waits
    gate.set()
    ends = all_ends(loads, AT_ONCE_MAX + 1)
    late = [name for name, end in ends.items() if end.error]
    assert late == [f"r{AT_ONCE_MAX}"] and "its turn came after" in ends[late[0]].error and not begun.acquire(blocking=False)
    loads.close()


def test_loads_that_come_together_run_at_once_also_where_one_thread_is_idle():
    """The idle one was counted for each of them: it took all, one behind the other, while their deadlines ran."""
    gate, together = threading.Event(), threading.Semaphore(0)

    def fetch(moved, blocks, timeout_s, ids):
        if blocks == [0]:
            return Fetched(6, 100, 1.0)
        together.release()
        assert gate.wait(20)
        return Fetched(6, 100, 1.0)

    loads = Loads(fetch, 20.0)
    loads.begin(Load("first", TOKEN, [0], 6))
    all_ends(loads, 1)
    for _ in range(4000):
        if loads._idle:
            break
        gate.wait(0.005)
    with loads._changed:  # none of them is taken before all are there
        assert loads._idle == 1
        for n in range(AT_ONCE_MAX):
            loads.begin(Load(f"r{n}", TOKEN, [1, 2], 6))
    assert all(together.acquire(timeout=5) for _ in range(AT_ONCE_MAX))
    gate.set()
    assert not any(end.error for end in all_ends(loads, AT_ONCE_MAX).values())
    loads.close()


def test_a_process_that_has_no_room_for_a_thread_computes(monkeypatch):
    """vLLM's step must not end of it, and the request must not wait for ever."""

    def full(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    loads = Loads(lambda *_: Fetched(6, 100, 1.0), 5.0)
    for n in range(3):
        loads.begin(Load(f"r{n}", TOKEN, [1, 2], 6))
    ends = loads.ended(60.0)
    assert [end.request_id for end in ends] == ["r0", "r1", "r2"] and all("can't start new thread" in end.error for end in ends)
    assert loads.ended(60.0) == [], "none is under way"
    loads.close()


def test_who_has_nothing_else_to_do_waits_for_a_load_only_while_one_is_under_way():
    gate, waits = threading.Event(), threading.Event()

    def fetch(moved, blocks, timeout_s, ids):
        assert gate.wait(20)
        return Fetched(6, 100, 1.0)

    class Watched(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            if timeout == 60.0:
                waits.set()
            return super().wait_for(predicate, timeout)

    loads = Loads(fetch, 5.0)
    loads._changed = Watched()
    assert loads.ended(60.0) == [] and not waits.is_set(), "nothing will ever end"
    loads.begin(Load("slow", TOKEN, [1, 2], 6))
    assert loads.ended() == [], "with something else to do nobody waits"
    threading.Thread(target=lambda: waits.wait(20) and gate.set()).start()
    assert [end.request_id for end in loads.ended(60.0)] == ["slow"], "it ends while somebody waits for it"
    waits.clear()
    assert loads.ended(60.0) == [] and not waits.is_set()
    loads.close()


def test_a_load_that_is_refused_or_has_no_token_ends_with_the_reason():
    def fetch(moved, blocks, timeout_s, ids):
        raise Refused("gone")

    loads = Loads(fetch, 60.0)
    loads.begin(Load("refused", TOKEN, [1, 2], 6))
    loads.begin(Load("no token", {"instance": 1}, [1, 2], 6))
    ends = all_ends(loads, 2)
    assert ends["refused"].error == "gone" and "moved token" in ends["no token"].error
    loads.close()


def test_a_load_in_parts_is_restored_where_every_part_is():
    moves = Moves(True, False)
    for name, error in (("whole", ""), ("half", "gone")):
        request = request_of(name, [1] * 9)
        request.kv_transfer_params, request.num_tokens = {"kvguard": TOKEN}, 9
        moves.arrived(request)
        assert moves.matched(request, 0) == (6, True)
        moves.allocated(request, [3, 4], 6)
        assert moves.taken()[0].ids_sum == ids_sum(b"\1\0\0\0" * 6)
        moves.ended(LoadEnd(name, 6, 100, 1.0))
        moves.ended(LoadEnd(name, 0 if error else 6, 50, 2.0, error))
        moves.ended_everywhere(name)
    assert moves.finished(request_of("whole", []))["kvguard"] == {"restored": 6, "bytes": 150, "restore_ms": 2.0}
    assert moves.finished(request_of("half", []))["kvguard"] == {"restored": 0, "why": "gone"}
    assert moves.counts == {"restored": 1, "computed": 1, "refused": 0}


@pytest.mark.parametrize(
    ("token", "local", "counted", "why"),
    [(TOKEN, 4, "computed", "4 positions are here already"), (encode(MovedToken("dead", "s", Epoch(3, "c"), 0, b"\1" * 32)), 0, "computed", "position 0"),
     ({**TOKEN, "proof": "forged"}, 0, "refused", "whose proof is not")],
)  # fmt: skip
def test_a_token_that_comes_to_no_load_is_counted_and_said(token, local, counted, why, caplog):
    moves, request = Moves(True, False), request_of("a", [1] * 9)
    request.kv_transfer_params, request.num_tokens = {"kvguard": token}, 9
    moves.arrived(request)
    assert [moves.matched(request, local) for _ in range(2)] == [(0, False)] * 2
    assert {what: count for what, count in moves.counts.items() if count} == {counted: 1}
    assert [why in record.getMessage() for record in caplog.records] == [True]
    assert why in moves.finished(request)["kvguard"]["why"]
