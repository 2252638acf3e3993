"""A claim whose sequences come from the replicas of two lives of a rank: a block that both name is the same prefix, or the pull is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest

import kvguard.engine as engine
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.messages import Rebuild, Source
from kvguard.format.pages import pack_sums, page_bytes, sums_of
from kvguard.types import StreamId
from tests.engine.test_guard import FIVE, LAYOUT, RANK, plan_of

SHAPE = LAYOUT.shape()
FORMER, LATER = StreamId("llama", RANK, 7), StreamId("llama", RANK, 8)


def arena(*blocks: int) -> int:
    """A replica's pages: `blocks`, in generation 1, each full of its own number."""
    made = os.memfd_create("arena")
    os.ftruncate(made, SHAPE.blocks * page_bytes(SHAPE))
    for block in blocks:
        data = memoryview(bytes([block]) * SHAPE.block_bytes)
        os.pwrite(made, bytes(data) + (1).to_bytes(8, "little") + pack_sums(sums_of(data, SHAPE.token_bytes)), block * page_bytes(SHAPE))
    return made


def pages(stream: StreamId, name: str, blocks: tuple[int, ...], ids: list[int]) -> local.ReplicaPages:
    return local.ReplicaPages(stream, SHAPE, (name,), (blocks,), ((1,) * len(blocks),), (len(ids),), ((),), (np.array(ids, "<u4").tobytes(),), (b"",), (b"{}",))


@pytest.mark.parametrize(
    ("blocks", "ids", "refused"),
    [((1, 3), [1, 2, 3, 4, 9, 9], ""), ((5, 3), [9, 9, 9, 9, 9, 9], ""), ((1, 3), [1, 2, 3, 5, 9, 9], "claim blocks"), ((3, 1), [1, 2, 3, 4, 1, 2], "claim blocks")],
)
def test_a_block_that_two_lives_name(daemon, path, blocks, ids, refused) -> None:
    spare = engine.attach_standby("llama", {RANK: LAYOUT}, socket=path)
    daemon.until(lambda: [one for one in daemon.attaches.values() if one.role == "standby"])
    connection = next(iter(daemon.attaches))
    rebuild = Rebuild(RANK, "n", spare.incarnation, (Source("replica", "n", FORMER), Source("replica", "n", LATER)), (0, 1))
    replicas = (pages(FORMER, "a", (1, 2), [1, 2, 3, 4, 5, 6]), pages(LATER, "b", blocks, ids))
    arenas = [arena(1, 2), arena(1, 3, 5)]
    assert daemon.server.send(connection, local.ClaimOrder("llama", RANK, FIVE, plan_of(FIVE, a=6, b=6), rebuild, False, None, LAYOUT, replicas), arenas)
    for one in arenas:
        os.close(one)
    claim = spare.wait(10.0)
    pool = engine.allocate(LAYOUT)
    rank = engine.attach(claim.instance, claim.rank, pool, claim=claim)
    restored = rank.restore(1.0)
    if refused:
        with pytest.raises(Refused, match=refused):
            restored.pull()
        daemon.until(lambda: daemon.messages)
        assert refused in daemon.messages[0].error and not rank.table.sequences()
        claim.close()
        spare.session.end()
    else:
        assert [(one.name, one.blocks) for one in restored.pull()] == [("a", (1, 2)), ("b", blocks)]
        restored.done()
        daemon.until(lambda: daemon.messages)
    rank.detach()
    pool.close()
