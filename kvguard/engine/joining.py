"""How a process that is its own emitter joins: as a new rank, or in place of its former life, which left something to go on with.

Knows: the coordinator's status, standbys, claims, the emitter. Must not know: models, tokens' meaning.
Invariants: nothing is claimed while another process lives as the rank; every wait has a deadline; who can't join is told why and runs without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from kvguard import emitter as emitters
from kvguard.engine.attach import allocate, attach, attach_standby
from kvguard.engine.guard import Guard
from kvguard.errors import Fenced, KvguardError, Refused, TimedOut
from kvguard.format.layout import Layout
from kvguard.transport import keys as keyring
from kvguard.transport.ask import ask
from kvguard.transport.keys import Keys
from kvguard.types import Rank, ResumeToken

RANK = Rank(0, 0, 0)
POLL_S = 0.1  # between two looks at the status
CONNECT_S = 1.0  # how long a daemon that is there may take to be connected to
SAID_S = 2.0  # how long a coordinator that is there may take to answer
FREE, LEFT, LIVES, UNKNOWN = "free", "left", "lives", "unknown"


class Place(NamedTuple):
    """Where and how to join. `coordinator`: its address, "" for none. `wait_s`: for a coordinator, a former life's end, a claim."""

    instance: str
    coordinator: str
    keys: Keys | None
    insecure: bool
    socket: str | None
    wait_s: float
    endpoint: str = ""
    device: str = "host"  # of the pool


class Joined(NamedTuple):
    """`guard` None: not attached, `reason` says why. `earlier`: what a former life left, by sequence; `timing_ms`, `bytes_by_rung`: of its recovery."""

    guard: Guard | None
    emitter: emitters.Emitter | None
    pool: object
    earlier: tuple[ResumeToken, ...]
    reason: str
    timing_ms: dict[str, float] = {}
    bytes_by_rung: dict[str, int] = {}


def keys_of(keys: Keys | str | os.PathLike | None) -> Keys | None:
    """Loaded where a file is named. Raises BadConfig."""
    return keys if keys is None or isinstance(keys, Keys) else keyring.load(keys)


def join(place: Place, layout: Layout, remap: Callable, rows: int, positions: int) -> Joined:
    """`remap(pages)`: block id of a replica -> block id here, from format.local.ReplicaPages. Never raises an operating error: `reason` says it."""
    if not place.coordinator:
        return _fresh(place, layout, rows, positions, "no coordinator is named, so nothing can be resumed. Try: coordinator=, or KVGUARD_COORDINATOR")
    found, said = look(place)
    if found == LIVES:
        return Joined(None, None, allocate(layout, place.device), (), f"{said}. Try: another instance name, or end the other process first")
    if found == LEFT:
        try:
            return _take_over(place, layout, remap, rows, positions)
        except (KvguardError, OSError) as error:
            reason = f"what the former life of {place.instance!r} left can't be taken over: {error}"
            return Joined(None, None, allocate(layout, place.device), (), f"{reason}. Try: another instance name, to begin anew")
    return _fresh(place, layout, rows, positions, said)


def look(place: Place) -> tuple[str, str]:
    """FREE, LEFT (a former life's recovery waits), LIVES, UNKNOWN (the coordinator doesn't answer), and what to tell of it."""
    deadline, said = time.monotonic() + place.wait_s, ""
    while True:
        try:
            status = ask(place.coordinator, "status", timeout=SAID_S, keys=place.keys, insecure=place.insecure)
            found, said = _judge(place, status)
        except KvguardError as error:
            found, said = UNKNOWN, f"the coordinator didn't answer: {error}"
        if found in (FREE, LEFT) or time.monotonic() >= deadline:
            return found, said
        time.sleep(POLL_S)


def _judge(place: Place, status: dict) -> tuple[str, str]:
    ranks = [one for one in status["ranks"] if (one["instance"], one["rank"]) == (place.instance, str(RANK)) and one["state"] != "standby"]
    if not ranks:
        return FREE, ""
    state = next((one["state"] for one in status["instances"] if one["instance"] == place.instance), "running")
    if state == "recovering":
        return LEFT, ""
    if ranks[0]["state"] == "lost":  # its recovery waited for a standby, in vain until now
        ask(place.coordinator, "failover", {"instance": place.instance, "rank": str(RANK)}, SAID_S, place.keys, insecure=place.insecure)
        return LEFT, ""
    return LIVES, f"a process on {ranks[0]['node']} lives as {place.instance!r} ({ranks[0]['state']}: {ranks[0]['reason']})"


def _fresh(place: Place, layout: Layout, rows: int, positions: int, reason: str) -> Joined:
    """The emitter first: a session that begins where sequences are is taken for one that ended another."""
    emitter = _connect(place) if place.coordinator else None
    if emitter is not None and not reason:
        try:
            emitter.welcome(SAID_S)
        except KvguardError as error:
            reason = str(error)
    pool = allocate(layout, place.device)
    epoch = {} if emitter is None else {"epoch": emitter.epoch}
    guard = attach(place.instance, RANK, pool, layout, endpoint=place.endpoint, socket=place.socket, rows=rows, positions_max=positions, **epoch)
    deadline = time.monotonic() + CONNECT_S  # at start alone, so that nobody is told that there is no daemon where there is one
    while not (guard.connected or guard.refused) and time.monotonic() < deadline:
        time.sleep(CONNECT_S / 50)
    return Joined(guard, emitter, pool, (), reason)


def _connect(place: Place) -> emitters.Emitter:
    return emitters.connect(place.instance, place.coordinator, place.keys, insecure=place.insecure)


def _take_over(place: Place, layout: Layout, remap: Callable, rows: int, positions: int) -> Joined:
    deadline = time.monotonic() + place.wait_s
    spare = attach_standby(place.instance, {RANK: layout}, endpoint=place.endpoint, socket=place.socket, device=place.device)
    guard = emitter = None
    try:
        claim = _claim(spare, place, deadline)
        pool = claim.adopt[1] if claim.adopt is not None else allocate(layout, place.device)
        guard = attach(place.instance, RANK, pool, layout, endpoint=place.endpoint, claim=claim, rows=rows, positions_max=positions)
        restored = guard.restore(place.wait_s)
        if claim.adopt is not None and pool.layout != layout:
            restored.failed("its pool is of other sizes. Try: the same sequences= and positions= as before")
        restored.pull(remap(claim.order.replicas))
        restored.done()
        emitter = _connect(place)
        resumption = follow(guard, emitter, deadline - time.monotonic())
    except BaseException:
        if emitter is not None:
            emitter.close()
        (guard or spare).detach()
        raise
    return Joined(guard, emitter, pool, resumption.tokens, "", resumption.timing_ms, resumption.bytes_by_rung)


def _claim(spare, place: Place, deadline: float):
    """The claim of this rank. Raises TimedOut; Refused where it can't be taken."""
    claim = spare.wait(max(0.0, deadline - time.monotonic()))
    if claim is None:
        there = "" if spare.connected else f", and no daemon is at {spare.session.path}"
        raise TimedOut(f"no claim within {place.wait_s:g} s{there}. Try: the same model, dtype and weights as before; kvguard status says what is waited for")
    if claim.rank != RANK:
        raise Refused(f"a claim of {claim.rank}, but this adapter is rank {RANK} alone")
    return claim


def follow(guard: Guard, emitter: emitters.Emitter, timeout_s: float, when_restored: Callable | None = None) -> emitters.Resumption:
    """Carry the rank and its emitter into the newest epoch, however many are announced meanwhile. `when_restored(restored)`: before the rank goes on.

    Raises TimedOut, and KvguardError where the recovery failed for good.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if guard.fenced:
            restored = guard.restore(max(POLL_S, deadline - time.monotonic()))
            if when_restored is not None:
                when_restored(restored)
            restored.done()
        try:
            resumption = emitter.resume(POLL_S)
            emitter.adopt(resumption)
            if not guard.fenced:
                return resumption
        except (TimedOut, Fenced) as error:
            if time.monotonic() >= deadline:
                raise TimedOut(f"no resumption within {timeout_s:.3g} s: {error}") from error
