"""Memory by descriptor between two real processes: virtual memory in one or many pieces, kept memory that a successor goes on in. Rehearsed without a GPU."""

from __future__ import annotations

import os
import socket

import msgspec
import pytest
from exporter import in_chunks, values_of
from test_cuda import KINDS, LAYOUTS, Other, captured, device_of, until

from kvguard.device import card, exports, pouch
from kvguard.device.cuda import Capturing, CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.device.rehearsed_virtual import RehearsedVirtual
from kvguard.device.virtual import Segment, chunks_of, created
from kvguard.errors import DeviceLost, Refused
from kvguard.format.layout import Layout

USUAL = LAYOUTS["usual"]
WIDE = Layout.paged("m", "bfloat16", 2, 400, 16, 4, 32)  # 6.25 MiB


@pytest.fixture
def other():
    made = Other()
    yield made
    made.end()


@pytest.fixture
def third():
    made = Other()
    yield made
    made.end()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- virtual memory of the engine's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", ["engine", "daemon"])
def test_a_pool_across_two_pieces_of_virtual_memory_is_read_and_survives_its_engine(kind, capture, other):
    """As torch's expandable segments are made."""
    device = device_of(kind, capture=capture)
    view = device.open(USUAL, other.pool(kind, USUAL, chunks=2, offset=512), writable=False)
    slots = list(range(24))
    if capture == "engine":
        other.join(view)
    other.ask("write", seed=1, slots=slots, value=1 if capture == "engine" else 0)
    if capture == "engine":
        until(lambda: other.word[0] == 1)
    wanted = [values_of(1, slot, view.plan.unit_bytes) for slot in slots]
    assert captured(view, slots) == wanted
    other.ask("write", seed=2, slots=[0, 23], said=False)
    other.kill()
    saved, whole = view.salvage([[0], [5]], 2000)
    assert whole == 2
    out = memoryview(bytearray(2 * USUAL.block_bytes))
    saved.capture_blocks([0, 5], out)
    assert bytes(out) == b"".join(values_of(2 if slot in (0, 23) else 1, slot, view.plan.unit_bytes) for slot in (0, 1, 2, 3, 20, 21, 22, 23))
    saved.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_of_many_pieces_comes_with_a_pouch(kind, other):
    device, before = device_of(kind), open_files()
    count = -(-WIDE.pool_bytes // device.driver().virtual.granularity) + 1 if kind == "rehearsal" else 12
    layout = WIDE if kind == "rehearsal" else Layout.paged("m", "bfloat16", 2, 1300, 16, 4, 32)
    fds = other.pool(kind, layout, chunks=count, offset=4096)
    assert len(fds) == 2
    view = device.open(layout, fds, writable=False)
    slots = [0, 17, layout.blocks * 16 - 1]
    other.ask("write", seed=3, slots=slots)
    assert captured(view, slots) == [values_of(3, slot, view.plan.unit_bytes) for slot in slots]
    view.close()
    view.close()
    assert open_files() <= before or kind == "cuda"


def test_memory_that_was_not_made_to_be_shared_is_refused_with_what_to_set():
    driver = Rehearsal()
    virtual = driver.virtual
    address = virtual.reserve(virtual.granularity)
    handle = virtual.create(virtual.granularity, shareable=False)
    virtual.map(address, virtual.granularity, handle)
    virtual.release(handle)
    device = CudaDevice(lambda: (driver,))
    pool = device.share(USUAL, address)
    with pytest.raises(Refused, match="expandable_segments:False"):
        pool.export()
    with pytest.raises(Refused, match="nothing is mapped"):
        device.share(USUAL, address + virtual.granularity - 512)
    pool.close()


def test_two_pools_of_one_name_are_one_mapping_which_the_last_one_closes(other):
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    fds = other.pool("rehearsal", USUAL, chunks=2, offset=512)
    views = [device.open(USUAL, [os.dup(fd) for fd in fds], writable=False) for _ in range(2)]
    for fd in fds:
        os.close(fd)
    assert views[0].address == views[1].address and driver.virtual.handles == 0
    other.ask("write", seed=1, slots=[2])
    views[0].close()
    assert driver.virtual.reserved_bytes == 2 * driver.virtual.granularity
    assert captured(views[1], [2]) == [values_of(1, 2, views[1].plan.unit_bytes)]
    views[1].close()
    assert driver.virtual.reserved_bytes == 0


@pytest.mark.parametrize("damage", ["fewer", "more", "another thing", "larger chunks", "odd chunks", "many", "negative"])
def test_what_comes_by_descriptor_is_not_believed(damage):
    driver, before = Rehearsal(), open_files()
    device = CudaDevice(lambda: (driver,))
    granule = driver.virtual.granularity
    fd, _ = created(driver.virtual, granule)
    good = card.Card("pool", driver.uuid, exports.new_name(), 0, USUAL.pool_bytes, chunks=((granule, 1),))
    behind = [] if damage == "fewer" else [os.open("/dev/null", os.O_RDWR)] if damage == "another thing" else [fd]
    behind += [os.dup(fd)] if damage == "more" else []
    runs = {"larger chunks": ((2 * granule, 1),), "odd chunks": ((granule - 4096, 1),), "many": ((granule, 1 << 40),)}
    runs["negative"] = ((granule, -1), (granule, 1))
    fds = [card.write(msgspec.structs.replace(good, chunks=runs.get(damage, good.chunks))), *behind]
    with pytest.raises(Refused, match="Try:"):
        device.open(USUAL, fds, writable=False)
    if fd not in behind:
        os.close(fd)
    assert driver.virtual.reserved_bytes == 0 and driver.virtual.handles == 0 and open_files() == before


def test_a_piece_that_fails_half_way_leaves_nothing():
    virtual, before = RehearsedVirtual(), open_files()
    good = [created(virtual, virtual.granularity)[0] for _ in range(2)]
    with pytest.raises(Refused, match="can't be mapped"):
        Segment(virtual, [virtual.granularity, 2 * virtual.granularity], [good])
    assert (virtual.reserved_bytes, virtual.handles, open_files()) == (0, 0, before)


def test_pieces_are_found_from_any_address_within_them():
    driver = Rehearsal()
    virtual, address = driver.virtual, in_chunks(driver, 3)
    granule = virtual.granularity
    assert [chunk.address - address for chunk in chunks_of(virtual, address + granule + 5, granule)] == [granule, 2 * granule]
    assert chunks_of(virtual, address - 1, 10) is None


# ---- pouches ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 250, 251, 700])
def test_a_pouch_holds_its_descriptors_in_order(count):
    before = open_files()
    kept = [os.memfd_create(f"{n}") for n in range(count)]
    fd = pouch.filled([os.dup(one) for one in kept])
    with pouch.emptied(fd) as lots:
        found = [one for lot in lots for one in lot]
    assert len(found) == count and all(os.path.sameopenfile(*pair) for pair in zip(kept, found, strict=True))
    for one in (*kept, *found):
        os.close(one)
    assert open_files() == before


def test_what_is_no_pouch_is_refused_and_never_waited_for():
    before = open_files()
    with pytest.raises(Refused, match="no pouch"), pouch.emptied(os.memfd_create("a")):
        pass
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pytest.raises(Refused, match="can't be emptied"), pouch.emptied(mine.detach()) as lots:
        next(lots)  # its other end is open: somebody could still put something in
    theirs.close()
    assert open_files() == before


def test_a_pouch_that_nobody_empties_goes_with_its_descriptor():
    before = open_files()
    os.close(pouch.filled([os.memfd_create("a") for _ in range(300)]))
    assert open_files() == before


# ---- memory that outlives its engine --------------------------------------------------------------------------------------------------


def taken_by(engine: Other, kind: str, fds: list[int], fresh: bool = False) -> list[int]:
    """The engine goes on in lent memory; what it hands to its daemon. `fds` stay open."""
    answer, out = engine.ask("take", fds, kind=kind, layout=msgspec.json.encode(USUAL).decode(), fresh=fresh)
    assert "refused" not in answer, answer
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_successor_goes_on_in_the_same_memory(kind, other, third):
    device = device_of(kind)
    lent = device.lend(USUAL, device.driver().uuid)
    view = device.open(USUAL, taken_by(other, kind, lent, fresh=True), writable=False)
    for fd in lent:
        os.close(fd)
    unit, slots = view.plan.unit_bytes, list(range(24))
    assert captured(view, slots) == [bytes(unit)] * 24  # it begins as zeros
    other.join(view)
    other.ask("write", seed=1, slots=slots, value=1)
    until(lambda: other.word[0] == 1)
    other.ask("write", seed=2, slots=[7], said=False)
    other.kill()
    left, whole = view.salvage([[0], [1, 2], [5]], 0)
    assert left is view and whole == 3  # nothing was copied, no time was needed
    handed = view.export()
    back = taken_by(third, kind, handed)
    assert len(back) == len(handed) and all(os.path.sameopenfile(*pair) for pair in zip(back, handed, strict=True))
    for fd in (*back, *handed):
        os.close(fd)
    wanted = [values_of(2 if slot == 7 else 1, slot, unit) for slot in slots]
    assert third.ask("read", slots=slots)[0]["bytes"] == [one.hex() for one in wanted]
    third.join(view)  # the same ring, from where it is
    for step in range(3, 30):
        third.ask("write", seed=step, slots=[step % 24], value=step)
        until(lambda step=step: third.word[0] == step)
        wanted[step % 24] = values_of(step, step % 24, unit)
        assert captured(view, slots) == wanted
    assert view.from_ring > 24
    view.close()
    view.close()
    assert third.ask("read", slots=[0])[0]["bytes"] == [wanted[0].hex()]  # its engine has it still


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_dead_engine_packed_is_void_for_its_successor(kind, other, third):
    """A successor writes before it has heard of the ring: what it says of its steps then, it says to nobody."""
    device = device_of(kind)
    lent = device.lend(USUAL, device.driver().uuid)
    view = device.open(USUAL, taken_by(other, kind, lent, fresh=True), writable=False)
    other.join(view)
    other.ask("write", seed=1, slots=[6, 7], value=1)
    until(lambda: other.word[0] == 1)
    unit = view.plan.unit_bytes
    assert captured(view, [6]) == [values_of(1, 6, unit)] and view.from_ring == 1
    other.ask("write", seed=2, slots=[8], value=2)  # not fetched before its death
    until(lambda: other.word[0] == 2)
    other.kill()
    handed = [view.salvage([[1], [2]], 0)[0].export(), lent]
    handed.append(taken_by(third, kind, handed[0]))
    third.ask("write", seed=3, slots=[6, 8])
    assert captured(view, [6, 7, 8]) == [values_of(3, 6, unit), values_of(1, 7, unit), values_of(3, 8, unit)]
    third.join(view)
    captured(view, [6])  # its gap is seen
    third.ask("write", seed=4, slots=[7], value=1)
    until(lambda: third.word[0] == 1)
    assert captured(view, [6, 7, 8]) == [values_of(3, 6, unit), values_of(4, 7, unit), values_of(3, 8, unit)] and view.from_ring == 2
    for fds in handed:
        exports.close_all(fds)
    view.close()


def test_lent_memory_goes_with_the_last_that_has_it():
    driver, before = Rehearsal(), open_files()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    lent = device.lend(USUAL)
    pool = device.open(USUAL, [os.dup(fd) for fd in lent])
    view = device.open(USUAL, lent, writable=False)
    assert driver.virtual.reserved_bytes == 2 * driver.virtual.granularity and driver.virtual.handles == 0
    pool.close()
    pool.close()
    view.close()
    with pytest.raises(Refused, match="closed"):  # no descriptors would be a pool, too, to whoever hands them on
        view.export()
    assert driver.virtual.reserved_bytes == 0 and open_files() == before


def test_nobody_goes_on_in_kept_memory_after_a_fault_of_the_gpu():
    driver = Rehearsal()
    device = CudaDevice(lambda: (driver,), Capturing(ring_bytes=1, staged_bytes=1))
    view = device.open(USUAL, device.lend(USUAL), writable=False)
    driver.lose("Xid 79: the GPU has fallen off the bus")
    with pytest.raises(DeviceLost, match="fallen off"):
        captured(view, [0])
    with pytest.raises(DeviceLost, match="fallen off"):
        view.salvage([[0]], 1000)
    with pytest.raises(Refused, match="fallen off"):
        view.export()
    view.close()
    with pytest.raises((Refused, DeviceLost), match="Try:"):
        device.lend(USUAL)


def test_kept_memory_that_could_not_be_handed_on_is_refused():
    driver, before = Rehearsal(), open_files()
    device = CudaDevice(lambda: (driver,))
    for writable in (True, False):
        first, *behind = device.lend(USUAL)
        for lacking in ([first], [first, *behind, os.dup(first)]):
            with pytest.raises(Refused, match="Try:"):
                device.open(USUAL, [os.dup(fd) for fd in lacking], writable=writable)
        small = msgspec.structs.replace(card.read(first), offset=driver.virtual.granularity)
        with pytest.raises(Refused, match="too few"):
            device.open(USUAL, [card.write(small), *(os.dup(fd) for fd in behind)], writable=writable)
        for fd in {first, *behind, lacking[-1]}:
            os.close(fd)
    assert driver.virtual.reserved_bytes == 0 and open_files() == before
