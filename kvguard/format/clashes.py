"""Whether what a rank is to be rebuilt from can stand in one pool: replicas of two of its lives may name a block for two sequences.

Knows: a plan's columns, replica pages. Must not know: bytes of KV, how replicas came to be side by side, what is done about a clash.
Invariants: copies of one life never clash (a page of their arena is one block); where nothing is found, every block that two lives name is the same prefix at
the same place of the sequences that the rebuild takes from them; where anything is, all copies are told that no plan can take together from these lives, so
that the next one finds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

from kvguard.format.local import ReplicaPages
from kvguard.format.messages import PlanOrder, Rebuild
from kvguard.types import Clash, Position, SequenceId, StreamId


class _User(NamedTuple):
    """Who has a block, and [start, end) of its positions there. `ids`: all that are known of it (u32 LE)."""

    stream: StreamId
    sequence: SequenceId
    start: Position
    end: Position
    ids: bytes


_Users = dict[int, dict[StreamId, list[_User]]]  # by block and life


def clashes(plan: PlanOrder, rebuild: Rebuild, replicas: Mapping[StreamId, ReplicaPages]) -> tuple[Clash, ...]:
    """() where the rebuild's sources can be pulled into one pool. Else every copy of a planned sequence in these lives that clashes with one of another life,
    with the first position in a block that the other has otherwise. What `replicas` lack of the plan is passed over: the pull finds it.
    """
    taken_from = [rebuild.sources[at].stream if at >= 0 else None for at in rebuild.source]
    lives = [stream for stream in dict.fromkeys(taken_from) if stream in replicas]
    if len(lives) < 2:
        return ()
    taken, all_copies = _Users(), _Users()
    for stream in lives:
        pages = replicas[stream]
        columns = dict(zip(pages.sequences, range(len(pages.sequences)), strict=True))
        for name, position, source in zip(plan.sequences, plan.positions, taken_from, strict=True):
            if name in columns:
                _enter(pages, columns[name], position, (all_copies, taken) if source == stream else (all_copies,))
    return _clashing(all_copies) if _clashing(taken) else ()


def _enter(pages: ReplicaPages, column: int, position: Position, into: tuple[_Users, ...]) -> None:
    """The blocks of [0, position) of one copy, as far as it has that."""
    name, tokens = pages.sequences[column], pages.shape.block_tokens
    position = min(position, pages.positions[column])
    for start, block in zip(range(0, position, tokens), pages.blocks[column], strict=False):
        user = _User(pages.stream, name, start, min(start + tokens, position), pages.ids[column])
        for users in into:
            users.setdefault(block, {}).setdefault(pages.stream, []).append(user)


def _clashing(users: _Users) -> tuple[Clash, ...]:
    found: dict[tuple[StreamId, SequenceId], Position] = {}
    alike: dict[tuple[SequenceId, SequenceId], int] = {}  # ids that two sequences have in common at their beginnings
    for lives in users.values():
        longest = [max(of_life, key=lambda user: user.end) for of_life in lives.values()]  # what shares a page of one arena begins alike
        for one, other in combinations(longest, 2):
            names = (one.sequence, other.sequence)
            if names not in alike:
                alike[names] = _ids_alike(one.ids, other.ids)
            if one.start != other.start or alike[names] < min(one.end, other.end):
                for user in (*lives[one.stream], *lives[other.stream]):
                    key = (user.stream, user.sequence)
                    found[key] = min(user.start, found.get(key, user.start))
    return tuple(Clash(stream, sequence, position) for (stream, sequence), position in found.items())


def _ids_alike(one: bytes, other: bytes) -> int:
    """How many ids two sequences begin with alike."""
    least, most = 0, min(len(one), len(other)) // 4
    while least < most:
        middle = (least + most + 1) // 2
        if one[: 4 * middle] == other[: 4 * middle]:
            least = middle
        else:
            most = middle - 1
    return least
