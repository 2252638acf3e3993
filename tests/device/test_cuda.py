"""GPU memory shared by two real processes: an engine that packs its steps, and a daemon that reads them; where there is no GPU, rehearsed in host memory."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from exporter import values_of

from kvguard.device import card, gpu_pool, open_device, paced
from kvguard.device.cuda import Capturing, CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.device.ring import AT_DONE, Words
from kvguard.errors import BadConfig, DeviceLost, Refused
from kvguard.format.layout import Layout

HERE = Path(__file__).resolve().parent
KINDS = ["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {"layers": 2, "blocks": 6, "block_tokens": 4, "kv_heads": 2, "head_dim": 8}
LAYOUTS = {
    "blocks first": Layout.paged("m", "bfloat16", **SIZES, order="block,layer,kv,slot,head,dim"),
    "usual": Layout.paged("m", "bfloat16", **SIZES),
    "heads first": Layout.paged("m", "bfloat16", **SIZES, order="layer,kv,block,head,slot,dim"),
    "tensor per layer": Layout.per_layer("m", "bfloat16", **SIZES, order="block,slot,head,dim"),
    "latent": Layout.latent("m", "bfloat16", 2, 6, 4, 36),
    "opaque": Layout.opaque("m", "int8", 2, 6, 4, 208),
}


class Other:
    """The engine's process."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen([sys.executable, HERE / "exporter.py", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.line = mine
        self.word = None

    def ask(self, do: str, fds=(), **arguments):
        socket.send_fds(self.line, [json.dumps({"do": do, **arguments}).encode()], list(fds))
        packet, got, _, _ = socket.recv_fds(self.line, 1 << 20, 4)
        assert packet, "the engine's process ended"
        return json.loads(packet), list(got)

    def pool(self, kind: str, layout: Layout, **arguments) -> list[int]:
        answer, fds = self.ask("allocate", kind=kind, layout=msgspec.json.encode(layout).decode(), **arguments)
        assert "refused" not in answer, answer
        return fds

    def join(self, view) -> None:
        fds = view.welcome()
        if self.word is None:
            table = os.memfd_create("table")
            os.ftruncate(table, 4096)
            self.memory = mmap.mmap(table, 4096)
            self.word = memoryview(self.memory)[64:72].cast("Q")
            fds.append(table)
        else:
            fds.append(os.memfd_create("nothing"))
        self.ask("join", fds)
        for fd in fds:
            os.close(fd)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> None:
        self.line.close()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def other():
    made = Other()
    yield made
    made.end()


def captured(view, slots) -> list[bytes]:
    """Each slot's bytes, as the daemon gets them."""
    unit, tokens = view.plan.unit_bytes, view.plan.block_tokens
    out = memoryview(bytearray(len(slots) * unit))
    if view.layout.addressable:
        view.capture([slot // tokens for slot in slots], [slot % tokens for slot in slots], [1] * len(slots), out)
    else:
        view.capture_blocks(slots, out)
    return [bytes(out[n * unit : (n + 1) * unit]) for n in range(len(slots))]


def until(seen, wait_s: float = 5.0) -> None:
    """Words are written in stream order: soon."""
    deadline = time.monotonic() + wait_s
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def device_of(kind: str, **capturing):
    return open_device(kind, **{"ring_bytes": 1 << 16, "staged_bytes": 1 << 17, **capturing})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", ["engine", "daemon"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_daemon_reads_what_the_engine_writes(kind, capture, layout, other):
    device = device_of(kind, capture=capture)
    view = device.open(layout, other.pool(kind, layout), writable=False)
    if capture == "engine":
        other.join(view)
    unit, random, written = view.plan.unit_bytes, np.random.default_rng(3), {}
    for step in range(1, 12):
        slots = random.choice(view.plan.blocks * view.plan.block_tokens, random.integers(1, 5), replace=False).tolist()
        other.ask("write", seed=step, slots=slots, said=step % 4 != 0, value=step if capture == "engine" else 0)
        written.update({slot: values_of(step, slot, unit) for slot in slots})
        if capture == "engine":
            until(lambda step=step: other.word[0] == step)
        assert captured(view, list(written)) == list(written.values())
    if capture == "engine":
        assert view.from_ring > 0 and view.from_pool > 0  # steps that weren't said came from the pool, the others from the ring
    view.close()
    view.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_said_comes_out_of_the_ring_alone(kind, other):
    layout = LAYOUTS["usual"]
    view = device_of(kind).open(layout, other.pool(kind, layout), writable=False)
    other.join(view)
    for step in range(1, 40):
        slots = [(step * 5 + n) % 24 for n in range(3)]
        answer, _ = other.ask("write", seed=step, slots=slots, value=step)
        until(lambda step=step: other.word[0] == step)
        assert captured(view, slots) == [values_of(step, slot, view.plan.unit_bytes) for slot in slots]
    assert (answer["packed"], answer["skipped"], view.from_pool, view.from_ring) == (39, 0, 0, 117)
    view.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_ring_costs_the_engine_nothing_and_the_daemon_catches_up_from_the_pool(kind, other):
    layout = LAYOUTS["usual"]
    view = device_of(kind, ring_bytes=1).open(layout, other.pool(kind, layout), writable=False)  # 16 rows
    other.join(view)
    for step in range(1, 30):
        answer, _ = other.ask("write", seed=step, slots=[step % 24, (step + 7) % 24], value=step)
    assert answer["packed"] == 8 and answer["skipped"] == 21 and not answer["lost"]
    until(lambda: other.word[0] == 29)
    latest = {slot: step for step in range(1, 30) for slot in (step % 24, (step + 7) % 24)}
    assert captured(view, list(latest)) == [values_of(step, slot, view.plan.unit_bytes) for slot, step in latest.items()]
    other.ask("write", seed=30, slots=[3], value=30)
    until(lambda: other.word[0] == 30)
    before = view.from_ring
    assert captured(view, [3]) == [values_of(30, 3, view.plan.unit_bytes)] and view.from_ring == before + 1
    view.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_within_the_engine_s_own_allocation_is_found_by_its_offset(kind, other):
    layout = LAYOUTS["heads first"]
    view = device_of(kind).open(layout, other.pool(kind, layout, shared=True, offset=512), writable=False)
    other.ask("write", seed=1, slots=[0, 23])
    assert captured(view, [0, 23]) == [values_of(1, slot, view.plan.unit_bytes) for slot in (0, 23)]
    view.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_daemon_that_comes_again_brings_another_ring(kind, other):
    layout = LAYOUTS["usual"]
    device = device_of(kind)
    fds = other.pool(kind, layout)
    again = [os.dup(fd) for fd in fds]
    view = device.open(layout, fds, writable=False)
    other.join(view)
    other.ask("write", seed=1, slots=[1], value=1)
    view.close()
    view = device.open(layout, again, writable=False)
    other.ask("write", seed=2, slots=[2], value=2)  # nobody reads that ring any more
    other.join(view)
    other.ask("write", seed=3, slots=[3], value=3)
    until(lambda: other.word[0] == 3)
    assert captured(view, [1, 2, 3]) == [values_of(slot, slot, view.plan.unit_bytes) for slot in (1, 2, 3)]
    assert (view.from_ring, view.from_pool) == (1, 2)
    view.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [LAYOUTS["usual"], LAYOUTS["opaque"]], ids=["usual", "opaque"])
def test_what_was_committed_is_salvaged_after_the_engine_s_death_and_adopted(kind, layout, other):
    device = device_of(kind)
    fds = other.pool(kind, layout)
    late = os.dup(fds[0])
    view = device.open(layout, fds, writable=False)
    slots = list(range(view.plan.blocks * view.plan.block_tokens))
    other.ask("write", seed=1, slots=slots)
    other.kill()
    if kind == "rehearsal":  # a handle is of no use any more, the mapping is; CUDA gives a process what it has mapped already
        with pytest.raises(Refused, match="Try:"):
            device_of(kind).open(layout, [late], writable=False)
    else:
        os.close(late)
    saved, whole = view.salvage([[1, 0], [4]], 2000)
    assert whole == 2
    with pytest.raises(Refused):
        captured(view, [0])
    adopted = device.open(layout, saved.export())
    for block in (0, 1, 4):
        wanted = [values_of(1, slot, view.plan.unit_bytes) for slot in slots if slot // view.plan.block_tokens == block]
        out = memoryview(bytearray(layout.block_bytes))
        for pool in (saved, adopted):
            pool.capture_blocks([block], out)
            assert bytes(out) == b"".join(wanted)
    adopted.capture_blocks([3], out)
    assert not any(out)  # nobody asked for it
    adopted.close()
    saved.close()


def test_an_engine_in_host_memory_is_read_where_it_writes():
    """A daemon with a GPU took a copy of such a pool at attach, and protected that, with sums that held, for ever."""
    layout = LAYOUTS["usual"]
    pool = open_device("host").allocate(layout)
    view = device_of("rehearsal").open(layout, pool.export(), writable=False)
    data, out = memoryview(os.urandom(layout.block_bytes)), memoryview(bytearray(layout.block_bytes))
    pool.scatter_blocks([2], data)
    view.capture_blocks([2], out)
    assert bytes(out) == bytes(data)
    view.close()
    pool.close()


@pytest.mark.parametrize("kind", KINDS)
def test_salvage_keeps_to_its_time(kind, other):
    layout = LAYOUTS["usual"]
    view = device_of(kind).open(layout, other.pool(kind, layout), writable=False)
    other.kill()
    saved, whole = view.salvage([[1], [2]], 0)
    assert whole == 0
    saved.close()


def test_nothing_is_read_after_a_fault_of_the_gpu(other):
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1 << 16, staged_bytes=1 << 16))
    layout = LAYOUTS["usual"]
    view = device.open(layout, other.pool("rehearsal", layout), writable=False)
    other.ask("write", seed=1, slots=[1])
    driver.lose("Xid 79: the GPU has fallen off the bus")
    for _ in range(2):
        with pytest.raises(DeviceLost, match="fallen off"):
            captured(view, [1])
    with pytest.raises(DeviceLost, match="fallen off"):
        view.salvage([[0]], 1000)
    view.close()


def test_an_engine_whose_gpu_fails_commits_nothing_more_and_goes_on(other):
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUTS["usual"])
    word = memoryview(bytearray(4096)).cast("Q")[8:9]
    pool.publish(word, 7)
    driver.lose("Xid 63")
    pool.publish(word, 8)
    pool.wrote([0], [0], [1])
    pool.publish(word, 9)
    assert word[0] == 7 and "Xid 63" in pool.lost
    pool.close()


def test_a_word_waits_for_what_was_launched_before_it():
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUTS["usual"])
    word = memoryview(bytearray(4096)).cast("Q")[8:9]
    driver.held = True
    pool.publish(word, 5)
    assert word[0] == 0
    driver.run()
    assert word[0] == 5
    driver.held = False
    pool.close()


def test_memory_that_has_neither_handle_nor_descriptor_is_refused():
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).share(LAYOUTS["usual"], driver.allocate(1 << 16, exportable=False))
    with pytest.raises(Refused, match="expandable_segments:False"):
        pool.export()
    pool.close()


@pytest.mark.parametrize("damage", ["uuid", "size", "offset", "handle", "kind", "garbage", "unsealed"])
def test_a_card_is_not_believed(damage, other):
    layout = LAYOUTS["usual"]
    fds = other.pool("rehearsal", layout)
    good = card.read(fds[0])
    changed = {
        "uuid": {"uuid": "GPU-elsewhere"}, "size": {"size": layout.pool_bytes - 1}, "offset": {"offset": 1 << 30}, "handle": {"handle": b"short"},
        "kind": {"kind": "ring"},
    }  # fmt: skip
    if damage == "garbage":
        fd = os.memfd_create("card", os.MFD_ALLOW_SEALING)
        os.write(fd, card.MAGIC + b"\xff" * 40)
    elif damage == "unsealed":
        fd = os.memfd_create("card")
        os.write(fd, card.MAGIC + msgspec.msgpack.encode(good))
    else:
        fd = card.write(msgspec.structs.replace(good, **changed[damage]))
    os.close(fds[0])
    with pytest.raises(Refused, match="Try:"):
        device_of("rehearsal").open(layout, [fd], writable=False)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_two_pools_in_one_allocation_are_one_mapping(other):
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    layout = LAYOUTS["usual"]
    fds = other.pool("rehearsal", layout)
    views = [device.open(layout, [os.dup(fds[0])], writable=False) for _ in range(2)]
    os.close(fds[0])
    assert views[0].address == views[1].address
    other.ask("write", seed=1, slots=[2])
    views[0].close()
    assert captured(views[1], [2]) == [values_of(1, 2, views[1].plan.unit_bytes)]
    views[1].close()


def test_a_daemon_s_view_writes_nothing(other):
    layout = LAYOUTS["usual"]
    view = device_of("rehearsal").open(layout, other.pool("rehearsal", layout), writable=False)
    word = memoryview(bytearray(8))
    for forbidden in (lambda: view.scatter([0], [0], [1], b""), lambda: view.scatter_blocks([0], b""), lambda: view.publish(word, 1), view.export):
        with pytest.raises(Refused, match="Try:"):
            forbidden()
    view.close()


def test_another_gpu_than_there_is_is_told():
    with pytest.raises(BadConfig, match="CUDA_VISIBLE_DEVICES"):
        open_device("rehearsal").driver(3)


def test_host_pages_are_registered_once_and_given_back_with_their_ring(other):
    """An engine here, whose daemon comes three times: what a ring's words were mapped at may be mapped to other words next."""
    driver = Rehearsal()
    driver.open_handle = lambda handle: driver.allocate(1 << 20)  # this process is on both sides, where no handle opens
    device = CudaDevice(lambda: (driver,))
    pool = device.allocate(LAYOUTS["usual"])
    daemon = Rehearsal()
    word = memoryview(mmap.mmap(-1, 4096)).cast("Q")[24:25]
    for value in range(1, 4):
        words = Words.create(16)
        memory = daemon.allocate(16 * pool.plan.unit_bytes)
        terms = card.Card("ring", daemon.uuid, daemon.handle_of(memory), 0, 16 * pool.plan.unit_bytes, 16)
        pool.join([card.write(terms), words.fd])
        assert pool.joined
        pool.wrote([0], [0], [1])
        pool.publish(word, value)
        assert word[0] == value and words.words[AT_DONE] == 1 and len(driver.held_pages) == 2
        daemon.free(memory)
    pool.close()
    assert not driver.held_pages


def test_a_ring_that_makes_no_sense_is_no_ring(caplog):
    pool = CudaDevice(lambda: (Rehearsal(),)).allocate(LAYOUTS["usual"])
    empty = os.memfd_create("nothing")
    for descriptors in ([], [empty], [os.memfd_create("a"), os.memfd_create("b")]):
        pool.join(descriptors)
        assert not pool.joined and "no ring" in caplog.text
        caplog.clear()
    pool.close()


def test_a_ring_whose_memory_is_gone_leaves_nothing_behind(caplog):
    driver, daemon = Rehearsal(), Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUTS["usual"])
    words = Words.create(16)
    handle = daemon.handle_of(daemon.allocate(16 * pool.plan.unit_bytes))  # of this very process: it opens nowhere here
    pool.join([card.write(card.Card("ring", daemon.uuid, handle, 0, 16 * pool.plan.unit_bytes, 16)), words.fd])
    assert not pool.joined and "can't be opened in the process that exported it" in caplog.text and not driver.held_pages
    with pytest.raises(OSError):
        os.fstat(words.fd)
    pool.close()


def test_a_gpu_that_never_answers_is_lost(other, monkeypatch):
    driver = Rehearsal()
    layout = LAYOUTS["usual"]
    view = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1)).open(layout, other.pool("rehearsal", layout), writable=False)
    driver.held = True
    clock = iter(range(10**6))
    monkeypatch.setattr(view._paced, "_clock", lambda: next(clock))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="in time"):
            captured(view, [1])
    driver.held = False
    driver.run()
    view.close()


def test_whoever_attaches_to_a_lost_gpu_is_refused_and_what_was_mapped_closes_quietly(other):
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    layout = LAYOUTS["usual"]
    fds = other.pool("rehearsal", layout)
    again = [os.dup(fd) for fd in fds]
    view = device.open(layout, fds, writable=False)
    driver.lose("Xid 79")
    for descriptor in view.welcome():  # it asks nothing of the GPU: an engine that comes again is answered at once
        os.close(descriptor)
    with pytest.raises(Refused, match="Xid 79"):
        device.open(layout, again, writable=False)
    view.close()
    view.close()


def test_nothing_is_given_back_to_a_gpu_that_hangs(other, monkeypatch):
    """A copy may still be on its way into what would be unmapped: it is not waited for without a bound, and goes with this process."""
    monkeypatch.setattr(paced, "HANG_S", 0.0)
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    view = device.open(LAYOUTS["usual"], other.pool("rehearsal", LAYOUTS["usual"]), writable=False)
    mapped, driver.held = dict(driver._mapped), True
    monkeypatch.setattr(driver, "synchronise", None)
    view.close()
    view.close()
    assert driver._mapped == mapped and paced._stranded[-1] is view
    with pytest.raises(Refused, match="closed"):
        view.capture([0], [0], [1], memoryview(bytearray(LAYOUTS["usual"].token_bytes)))


def test_nor_is_what_a_kernel_of_the_daemon_s_own_may_still_read(other, monkeypatch):
    """It runs on another stream than the copies, which may be through."""
    monkeypatch.setattr(paced, "HANG_S", 0.0)
    monkeypatch.setattr(gpu_pool, "WORK_S_MAX", 0.0)
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(capture="daemon"))
    view = device.open(LAYOUTS["usual"], other.pool("rehearsal", LAYOUTS["usual"]), writable=False)
    driver.held = True
    with pytest.raises(DeviceLost):
        view.capture([0], [0], [1], memoryview(bytearray(LAYOUTS["usual"].token_bytes)))
    mapped = dict(driver._mapped)
    monkeypatch.setattr(view._paced, "settle", lambda: None)
    view.close()
    assert driver._mapped == mapped and paced._stranded[-1] is view


class BothSides(Rehearsal):
    """Engine and daemon in one process. `meanwhile`: called while a handle is opened."""

    meanwhile = staticmethod(lambda: None)

    def open_handle(self, handle: bytes) -> int:
        self.meanwhile()
        _, number, _, size = (int(part) for part in handle.split())
        return self._map(os.dup(number), size, False)


def test_steps_that_are_packed_while_the_engine_joins_again_are_not_written_over():
    """Its line was down; the daemon is the same, and so is its ring."""
    layout = LAYOUTS["usual"]
    driver = BothSides()
    pool = CudaDevice(lambda: (driver,)).allocate(layout)
    view = CudaDevice(lambda: (BothSides(),), Capturing(ring_bytes=1 << 20, staged_bytes=1 << 20)).open(layout, pool.export(), writable=False)
    unit, said = view.plan.unit_bytes, []

    def write(slot: int, late: bool = False) -> None:
        said.append(bytes([slot + 1]) * unit)
        pool.scatter([0], [slot], [1], memoryview(said[-1]))
        driver.held = late
        pool.wrote([0], [slot], [1])

    def looked_at() -> None:
        driver.meanwhile = lambda: None
        captured(view, [0])
        write(1, late=True)
        captured(view, [0])  # its daemon knows of the step before the GPU has come to it
        driver.held = False
        driver.run()

    pool.join(view.welcome())
    write(0)
    driver.meanwhile = looked_at
    pool.join(view.welcome())
    write(2)
    assert captured(view, [0, 1, 2]) == said
    write(3)
    from_ring = view.from_ring
    assert captured(view, [3]) == said[3:] and view.from_ring == from_ring + 1
    pool.join([])  # this time there is no ring for it
    pool.scatter([0], [3], [1], memoryview(said[0]))
    pool.wrote([0], [3], [1])
    assert captured(view, [2, 3]) == [said[2], said[0]]
    pool.close()
    view.close()
