"""Who takes a request, and who can have a moved sequence's KV."""

from __future__ import annotations

import asyncio

import pytest

from kvguard.gateway.events import Lost
from kvguard.gateway.fleet import unless
from kvguard.gateway.routing import Instance, Standing, choose, is_place
from kvguard.types import Rank


def standing(name: str, load: int = 0, active: bool = True, members=None) -> Standing:
    return Standing(Instance(name, f"http://{name}", f"node-{name}"), active, load, members or {})


def test_the_least_loaded_active_one():
    assert choose([standing("a", 3), standing("b", 1, active=False), standing("c", 2), standing("d", 2)]).name == "c"
    assert choose([standing("a", active=False)]) is None
    assert choose([standing("a"), standing("b", 5)], lambda one: one.instance.name == "b").name == "b"


def test_places():
    one = Rank(0, 0, 0)
    assert is_place(standing("a"), ((one, "node-b"), (one, "node-a")))
    assert not is_place(standing("a"), ((one, "node-b"),)) and not is_place(standing("a"), ())
    first, second = Rank(0, 0, 0), Rank(0, 1, 0)
    spread = standing("a", members={Rank(0, 0, 0): "x", Rank(0, 1, 0): "y"})
    assert is_place(spread, ((first, "x"), (second, "y")))
    assert not is_place(spread, ((first, "y"), (second, "x"))), "each rank needs its own part"
    assert not is_place(spread, ((first, "x"),) + ((second, "x"),))
    assert is_place(standing("a", members={Rank(1, 0, 0): "x"}), ((first, "x"),)), "of any dp"


def test_nothing_comes_after_the_fence():
    async def source():
        for number in range(10):
            yield number

    async def endless():
        yield 1
        await asyncio.sleep(3600)

    async def play() -> list[int]:
        fenced, got = asyncio.Event(), []
        with pytest.raises(Lost, match="fenced"):
            async for one in unless(fenced, source()):
                got.append(one)
                if one == 3:
                    fenced.set()
        fenced = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, fenced.set)
        with pytest.raises(Lost, match="fenced"):
            async for one in unless(fenced, endless()):
                got.append(one)
        assert [one async for one in unless(asyncio.Event(), source())] == list(range(10))
        return got

    assert asyncio.run(play()) == [0, 1, 2, 3, 1]
