"""One instance under watch: fences that overtake each other, recoveries that fail, tokens for nobody."""

from __future__ import annotations

import asyncio
import threading

from kvguard import errors
from kvguard.gateway.counters import Counters
from kvguard.gateway.fleet import Fleet, Member
from kvguard.gateway.news import News
from kvguard.gateway.routing import Instance
from kvguard.gateway.watching import HEALTHY_LOOKS, Watch, key_of
from kvguard.types import Epoch, ResumeToken
from tests.gateway.conftest import FakeEmitter

KEYS = [key_of(f"kvg-{number:024x}", 0) for number in range(3)]


def token(sequence: str) -> ResumeToken:
    return ResumeToken("a", sequence, Epoch(2, "c"), 1, (2,), (1,), b"", b"", "replica")


def play(scene) -> tuple[FakeEmitter, object]:
    async def run():
        emitter, healthy = FakeEmitter("a"), [False]

        async def look() -> bool:
            return healthy[0]

        watch = Watch(Instance("a", "http://a", "n"), emitter, look)
        try:
            return emitter, await asyncio.wait_for(scene(watch, emitter, healthy), 20)
        finally:
            await watch.close()

    return asyncio.run(run())


def test_each_token_to_its_request():
    async def scene(watch, emitter, healthy):
        for key in KEYS[:2]:
            watch.begin(key)
        waiting = [asyncio.create_task(watch.token(key, 5, 5)) for key in KEYS[:2]]
        emitter.fence()
        await watch.fenced.wait()
        assert not watch.standing().active
        emitter.recover([token(f"{KEYS[0]}-abcd"), token(KEYS[2]), token("somebody else's")])
        found = await asyncio.gather(*waiting)
        for key in KEYS[:2]:
            watch.left(key)
            watch.end(key)
        return found

    emitter, found = play(scene)
    assert [one and one.sequence for one in found] == [f"{KEYS[0]}-abcd", None]
    assert emitter.deliveries == [KEYS[2], "somebody else's", f"{KEYS[0]}-abcd", KEYS[1]]
    assert emitter.in_flight == 0


def test_a_loss_that_is_noticed_after_the_recovery():
    async def scene(watch, emitter, healthy):
        watch.begin(KEYS[0])
        emitter.fence()
        await watch.fenced.wait()
        emitter.recover([token(KEYS[0])])
        while watch.fenced.is_set():
            await asyncio.sleep(0.01)
        return await watch.token(KEYS[0], 0, 0)

    assert play(scene)[1].sequence == KEYS[0]


def test_an_overtaken_recovery_takes_nothing_away():
    async def scene(watch, emitter, healthy):
        watch.begin(KEYS[0])
        adopt, refused = emitter.adopt, []

        def overtaken(resumption) -> None:
            if not refused:
                refused.append(resumption)
                emitter.recover([token(KEYS[0])])  # the newer one's end
                raise errors.Fenced("epoch 2 is over")
            adopt(resumption)

        emitter.adopt = overtaken
        emitter.fence()
        emitter.recover([])
        return await watch.token(KEYS[0], 5, 5), refused

    found, refused = play(scene)[1]
    assert refused and found.sequence == KEYS[0]


def test_a_failed_recovery_keeps_nobody_waiting():
    async def scene(watch, emitter, healthy):
        watch.begin(KEYS[0])
        emitter.fence()
        emitter.fail("no ids anywhere")
        return await watch.token(KEYS[0], 5, 5), watch.fenced.is_set()

    assert play(scene)[1] == (None, True)


def test_who_is_alive_is_not_waited_for():
    async def scene(watch, emitter, healthy):
        watch.begin(KEYS[0])
        healthy[0] = True
        return await watch.token(KEYS[0], 3600, 3600)

    assert play(scene)[1] is None


def test_nobody_fences_and_nobody_lives():
    async def scene(watch, emitter, healthy):
        watch.begin(KEYS[0])
        return await watch.token(KEYS[0], 0.05, 3600)

    assert play(scene)[1] is None


def test_the_fence_does_not_wait_for_the_end_of_a_look():
    """A server that hangs keeps a look for seconds."""

    async def scene():
        emitter, looks = FakeEmitter("a"), []

        async def hangs() -> bool:
            looks.append(1)
            return await asyncio.Event().wait()

        watch = Watch(Instance("a", "http://a", "n"), emitter, hangs)
        try:
            watch.begin(KEYS[0])
            waiting = asyncio.create_task(watch.token(KEYS[0], 3600, 3600))
            while not looks:
                await asyncio.sleep(0)
            emitter.fence()
            emitter.recover([token(KEYS[0])])
            return await asyncio.wait_for(waiting, 20)
        finally:
            await watch.close()

    assert asyncio.run(scene()).sequence == KEYS[0]


def test_many_losses_are_one_doubt():
    """However many answers an instance drops, it is looked at as often as for one."""

    async def scene():
        emitter, looks = FakeEmitter("a"), []

        async def healthy() -> bool:
            looks.append(1)
            return True

        watch = Watch(Instance("a", "http://a", "n"), emitter, healthy)
        try:
            for key in KEYS:
                watch.begin(key)
            found = await asyncio.wait_for(asyncio.gather(*(watch.token(key, 3600, 3600) for key in KEYS)), 20)
        finally:
            await watch.close()
        return found, len(looks), watch.up

    assert asyncio.run(scene()) == ([None] * len(KEYS), HEALTHY_LOOKS, True)


def test_a_life_is_the_coordinators_not_the_looks():
    async def scene(watch, emitter, healthy):
        lives = [watch.life]
        for up in (True, False, True):
            watch.looked(up)
            lives.append(watch.life)
        assert watch.up and lives == [Epoch(1, "c")] * 4
        emitter.fence()
        await watch.fenced.wait()
        assert watch.life == Epoch(1, "c"), "not before its recovery is adopted"
        emitter.recover([])
        await watch.news.until(lambda: not watch.fenced.is_set())
        assert not watch.up, "nobody is there in the new epoch"
        return watch.life

    assert play(scene)[1] == Epoch(2, "c")


def test_instances_are_left_together():
    """Each emitter's end may wait a second for a coordinator that is away: one after the other they would outlast a service manager's patience."""
    meeting = threading.Barrier(3, timeout=10)

    class Slow(FakeEmitter):
        def close(self) -> None:
            meeting.wait()
            super().close()

    async def run():
        async def look() -> bool:
            return True

        watches = [Watch(Instance(name, f"http://{name}", "n"), Slow(name), look) for name in "abc"]
        await Fleet([Member(watch, None) for watch in watches], Counters(), 1.0, {}, News()).close()

    asyncio.run(run())
    assert not meeting.broken
