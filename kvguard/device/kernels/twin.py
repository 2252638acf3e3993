"""The kernels' index arithmetic in plain Python: what item i of a launch copies. Says in other words what pool.cu says, and is compared with it.

Knows: Launch (plan.py). Must not know: memory, layouts.
Invariant: operations work on ints and on numpy int64 arrays alike, so that the rehearsal runs the very formulas that the tests prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvguard.device.kernels.plan import Launch


def split(launch: Launch, item):
    """Item -> (token of the launch, run of the group)."""
    token = item // launch.run_count
    return token, launch.first_run + item - token * launch.run_count


def in_pool(launch: Launch, run_at, slot):
    """Byte of the pool where a run of a slot begins."""
    block = slot // launch.block_tokens
    return run_at + block * launch.block_stride + (slot - block * launch.block_tokens) * launch.slot_stride


def in_flat(launch: Launch, run_place, token, place=None):
    """Byte of the canonical side where a run begins. `token`: counted over the whole columns; `place`: the token's own, where there are places."""
    return run_place + (token * launch.unit_bytes if place is None else place)


def is_copied(launch: Launch, slot):
    """Padding and what lies beyond the pool is left alone."""
    return (slot >= 0) & (slot < launch.blocks * launch.block_tokens)


def copies(launch: Launch, runs: Sequence, slots: Sequence[int], places: Sequence[int] | None = None) -> Iterator[tuple[int, int, int]]:
    """(byte in the pool, byte of the canonical side, bytes) of every run that a launch copies. `slots`, `places`: the whole columns."""
    for item in range(launch.items):
        token, run = split(launch, item)
        slot = slots[launch.skip + token]
        if is_copied(launch, slot):
            place = None if places is None else places[launch.skip + token]
            yield in_pool(launch, runs[run][0], slot), in_flat(launch, runs[run][1], launch.skip + token, place), launch.run_units * launch.width
