"""Answers to engines that fetch sequences of a dead instance: is the token genuine, what is here of it, and where.

Knows: plans whose sequences moved, replicas, dead pools, which rank is behind a connection. Must not know: sockets beyond `tell`, how an engine copies.
Invariants: nothing is given without the recovery's own proof, in the epoch that is promised here, to a rank whose bytes are interchangeable; a descriptor is
opened for reading alone; what is given is whole up to the position, of the plan's lineage and birth, in blocks whose generations are said.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from kvguard.daemon.perform_node import NodeShell
from kvguard.daemon.ranks import LocalRank, Ranks, Tells
from kvguard.errors import Refused
from kvguard.format import local, moves
from kvguard.format.layout import Layout
from kvguard.format.lineage import agreed, is_other
from kvguard.format.messages import PlanOrder, StreamShape
from kvguard.format.rows import Row
from kvguard.format.shapes import is_shared
from kvguard.types import NO_EPOCH, Lineage, MovedToken, StreamId


class _Ending(Exception):
    """The process whose pool is asked for has been told to die, and lives for another moment."""


class _Found(NamedTuple):
    """Where [0, position) stands. The descriptor is the taker's to close. `ids`: its token ids, u32 little-endian, as far as they are known here."""

    descriptor: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    shape: StreamShape
    layout: Layout | None
    ids: bytes = b""


class Fetching:
    """`fetch` for every local.Fetch that comes in."""

    def __init__(self, shell: NodeShell, ranks: Ranks, tell: Tells) -> None:
        self._shell, self._ranks, self._tell = shell, ranks, tell

    def fetch(self, connection: int, message: local.Fetch) -> None:
        """Answers FetchGiven or FetchRefused on the connection; never raises for what an engine may say."""
        try:
            found = self._find(connection, message.token)
            _check_ids(found, message)
        except (Refused, _Ending) as error:
            self._shell.counters["fetches_refused"] += not isinstance(error, _Ending)
            self._tell(connection, local.FetchRefused(message.number, str(error), isinstance(error, _Ending)))
            return
        try:
            self._shell.counters["fetches_given"] += 1
            given = local.FetchGiven(message.number, message.token.position, found.blocks, found.generations, found.shape, found.layout)
            self._tell(connection, given, (found.descriptor,))
        finally:
            os.close(found.descriptor)

    def _find(self, connection: int, token: MovedToken) -> _Found:
        asks = next((rank for rank in self._ranks.ranks.values() if rank.connection == connection and rank.layout is not None and rank.stream.alive), None)
        if asks is None:
            raise Refused("only a rank that is attached here may fetch")
        lineage, birth = self._checked(token)
        place = asks.stream.id.rank
        streams = [*self._ranks.ranks, *self._shell.store.streams()]
        streams = [stream for stream in dict.fromkeys(streams) if self._is_of(stream, token.instance, place.pp)]
        if is_shared(asks.stream.shape.fingerprint):  # its own first, then those of mates, which hold the same bytes where they have one fingerprint
            streams.sort(key=lambda stream: stream.rank.tp != place.tp)
        else:
            streams = [stream for stream in streams if stream.rank.tp == place.tp]
        other = False
        for stream in streams:
            found = self._in_replica(stream, token, lineage, birth)
            if stream.rank.tp != place.tp and (found is None or found.shape.fingerprint != asks.stream.shape.fingerprint):
                if found is not None:
                    os.close(found.descriptor)
                continue
            found = found or self._in_pool(stream, token, lineage, birth)
            if found is not None and found.shape.fingerprint == asks.stream.shape.fingerprint:
                return found
            if found is not None:
                other = True
                os.close(found.descriptor)
        if other:
            raise Refused(f"what is here of {token.instance!r} is of another model, dtype or shard than this rank")
        raise Refused(f"{token.position} positions for stage {place.pp}, shard {place.tp} are not on this node")

    def _checked(self, token: MovedToken) -> tuple[Lineage, int]:
        """The planned lineage and birth of a token that is genuine and not over. Raises Refused."""
        plan = self._plan(token)
        if not moves.proves(plan.secret, token):
            raise Refused("its proof doesn't hold: the token was not made by this recovery, or changed since")
        at = plan.sequences.index(token.sequence) if token.sequence in plan.sequences else -1
        if at < 0 or not token.position or plan.positions[at] != token.position:
            raise Refused("the plan of its recovery names nothing to fetch for it")
        return plan.lineages[at], plan.births[at] if plan.births else 0

    def _plan(self, token: MovedToken) -> PlanOrder:
        promised = self._shell.epochs.get(token.instance, NO_EPOCH)
        plan = self._shell.moved.get(token.instance)
        if plan is None or token.epoch != plan.epoch or promised != plan.epoch:
            raise Refused(f"nothing of epoch {token.epoch.counter} is here, {promised.counter} is promised: the token is stale, or for another node")
        return plan

    def _is_of(self, stream: StreamId, instance: str, stage: int) -> bool:
        return stream.instance == instance and stream.rank.pp == stage and stream.rank in self._shell.moved[instance].moved

    # ---- what is here ---------------------------------------------------------------------------------------------------------------

    def _in_replica(self, stream: StreamId, token: MovedToken, lineage: Lineage, birth: int) -> _Found | None:
        if stream not in self._shell.store.streams():
            return None
        replica = self._shell.store.replica(stream)
        sequence = replica.sequences.get(token.sequence)
        if sequence is None or sequence.released or is_other(sequence.birth, birth):
            return None
        if min(sequence.position, agreed(sequence.lineage, lineage)) < token.position:
            return None
        blocks = tuple(sequence.blocks[: -(-token.position // replica.shape.block_tokens)])
        generations = tuple(replica.arena.generation(block) for block in blocks)
        ids = bytes(sequence.ids[: 4 * token.position])
        return _Found(_for_reading([replica.arena.export()]), blocks, generations, replica.shape, None, ids)

    def _in_pool(self, stream: StreamId, token: MovedToken, lineage: Lineage, birth: int) -> _Found | None:
        rank = self._ranks.ranks.get(stream)
        if rank is None or rank.layout is None:
            return None
        if rank.stream.alive:
            if rank.killed or rank.stream.leaving:
                raise _Ending("its process is being ended, or its memory salvaged")
            return None
        row = _committed(rank, token, lineage, birth)
        if row is None:  # also what was to be brought out and didn't come: its facts are gone
            return None
        if self._ranks.bring_out(stream):
            raise _Ending("its memory is being copied to where another process can read it")
        blocks = row.blocks[: -(-token.position // rank.stream.shape.block_tokens)]
        of_blocks, ids = rank.reader.generations([], blocks)[1], row.ids[: token.position]
        packed = struct.pack(f"<{len(ids)}I", *ids)
        return _Found(_for_reading(rank.pool.export()), blocks, tuple(of_blocks.tolist()), rank.stream.shape, rank.layout, packed)


def _check_ids(found: _Found, asked: local.Fetch) -> None:
    """KV is of its ids alone: a genuine token beside another prompt brings an answer that nobody asked for. Closes the descriptor where it raises Refused."""
    if 0 < 4 * asked.ids <= len(found.ids) and moves.ids_sum(found.ids[: 4 * asked.ids]) != asked.ids_sum:
        os.close(found.descriptor)
        raise Refused(f"the first {asked.ids} ids of {asked.token.sequence!r} are others than those it is wanted for")


def _committed(rank: LocalRank, token: MovedToken, lineage: Lineage, birth: int) -> Row | None:
    """The row with [0, position) in a dead process's pool; None where the row is not whole, or was given up before it died."""
    known = rank.facts.find(token.sequence)
    if known is None or is_other(known[3], birth) or min(known[2], agreed(known[1], lineage)) < token.position:
        return None
    row = rank.reader.read_row(known[0])
    if row is None or row.meta is None or row.meta.name != token.sequence or rank.reader.row_generation(known[0]) != row.head.generation:
        return None
    needed = -(-token.position // rank.stream.shape.block_tokens)
    blocks, generations = row.blocks[:needed], row.block_generations[:needed]
    if len(blocks) < needed or rank.reader.generations([], blocks)[1].tolist() != list(generations):
        return None
    return row


def _for_reading(descriptors: list[int]) -> int:
    """The one memory behind `descriptors`, which are closed, opened anew for reading alone."""
    try:
        if len(descriptors) != 1:
            raise Refused("its memory is not one piece that another process could read")
        return os.open(f"/proc/self/fd/{descriptors[0]}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"its memory can't be opened for reading: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


__all__ = ["Fetching"]
