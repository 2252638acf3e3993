"""Both halves over a bad wire: the holder ends with exactly what was committed, and no acknowledgement ever lies (I4, I6, faults 11-14)."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamworld import MS, World

from kvguard.core.events import Tick

DEEDS = (
    "open", "open", "grow", "grow", "grow", "cut", "cut", "release", "look", "look", "look", "capture", "capture", "ids", "ids", "kv", "kv", "back", "back",
    "turn", "turn", "lose_ids", "lose_kv", "damage", "twice", "down", "up", "wait",
)  # fmt: skip


def act(world: World, deed: str, a: int, b: int) -> None:
    engine = world.engine
    match deed:
        case "open":
            engine.open(a % 4, f"s{b % 6}", b % 4)
        case "grow":
            engine.grow(a % 4, b)
        case "cut":
            engine.cut(a % 4, b)
        case "release":
            engine.release(a % 4)
        case "look":
            world.look()
        case "capture":
            world.capture(a)
        case "turn":
            world.up()
            world.look()
            for _ in range(a):
                world.capture(b)
                for pipe in (world.ids, world.kv, world.back) if b % 2 else (world.kv, world.ids, world.back):
                    world.deliver(pipe)
        case "ids" | "kv" | "back":
            world.deliver(getattr(world, deed))
        case "lose_ids" | "lose_kv":
            pipe = getattr(world, deed[5:])
            if pipe:
                pipe.popleft()
        case "damage":
            world.deliver(world.kv, damage=True)
        case "twice":
            world.deliver((world.ids, world.kv)[a % 2], twice=True)
        case "down":
            world.down()
        case "up":
            world.up()
        case "wait":
            world.now += b * 5 * MS
            world.tell(Tick())


script = st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 7), st.integers(1, 14)), max_size=150)


@pytest.mark.parametrize("addressable", [True, False])
@settings(max_examples=150, deadline=None)
@given(script=script)
def test_holder_ends_with_what_was_committed(addressable: bool, script: list) -> None:
    with closing(World(addressable)) as world:
        world.up()
        for deed in script:
            act(world, *deed)
        world.drain()
        world.compare()


@settings(max_examples=60, deadline=None)
@given(script=script)
@example([("open", 0, 1), ("grow", 0, 12), ("open", 1, 4)])
def test_a_full_store_sheds_whole_sequences_and_takes_them_later(script: list) -> None:
    """Faults 12, 17: the acknowledged prefix never has a hole, and what was refused comes once there is room."""
    with closing(World(budget_bytes=900)) as world:
        world.up()
        for deed in script:
            act(world, *deed)
        world.store.budget.resize(1 << 20)
        world.drain()
        world.compare()


def test_pieces_captured_before_a_cut_never_land_after_it() -> None:
    """The lanes overtake each other: old bytes of a tail block must not pass for those written after the cut."""
    with closing(World(window_bytes=1000)) as world:
        world.up()
        world.deliver(world.ids)
        world.deliver(world.back)
        world.engine.open(0, "s", 9)
        world.engine.grow(0, 7)
        world.look()
        world.capture()
        assert len(world.kv) == 1, "seven positions are on their way"
        world.engine.cut(0, 5)
        world.engine.grow(0, 1)
        world.look()
        while world.ids:
            world.deliver(world.ids)
        world.drain()
        world.compare()


def test_what_goes_again_is_what_the_holder_never_got() -> None:
    """At least once: two frames whose acknowledgements are lost with the link. The holder says what it has; the sender can't have known."""
    with closing(World(window_bytes=1000)) as world:
        world.engine.open(0, "s", 9)
        world.engine.grow(0, 4)
        world.drain()
        for _ in range(2):
            world.engine.grow(0, 1)
            world.look()
            world.capture()
            world.deliver(world.ids)
        world.deliver(world.kv)
        assert len(world.kv) == 1 and world.back and world.sender.flow.copies[0].acked == 4 and world.held()["s"][0] == 5
        world.down()
        world.up()
        world.deliver(world.ids)
        world.deliver(world.back)
        world.capture()
        ((frame, _),) = world.kv
        assert (frame.starts, frame.counts) == ((5,), (1,))
        world.drain()
        world.compare()
