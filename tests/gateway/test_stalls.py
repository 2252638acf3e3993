"""What a stall is made of, and how whoever waits is told."""

from __future__ import annotations

import asyncio

from kvguard.gateway.news import News
from kvguard.gateway.stalls import FENCE, FIRST_TOKEN, PLACING, RECOVERY, Stall


def test_parts_follow_each_other_without_a_gap():
    stall = Stall(10.0)
    stall.until(FENCE, 10.25)
    stall.until(RECOVERY, 10.5)
    stall.until(FENCE, 10.4)  # a fence that was known before
    stall.until(PLACING, 10.5)
    stall.until(FIRST_TOKEN, 11.0)
    stall.until(RECOVERY, 11.5)  # the second instance was lost as well
    assert stall.parts == {FENCE: 0.25, RECOVERY: 0.75, PLACING: 0.0, FIRST_TOKEN: 0.5} and stall.seconds == 1.5
    assert str(stall) == "1500.0 ms: fence 250.0, recovery 750.0, placing 0.0, first_token 500.0"


def test_every_piece_of_news_is_a_look():
    async def scene() -> tuple:
        news, seen = News(), []

        def true() -> bool:
            seen.append(1)
            return len(seen) == 4

        waiting = [asyncio.create_task(news.until(true, 3600)), asyncio.create_task(news.until(lambda: len(seen) >= 3))]
        while not all(one.done() for one in waiting):
            news.tell()
            await asyncio.sleep(0)
        return [one.result() for one in waiting], len(seen), await news.until(lambda: False, 0.0), await news.until(lambda: True, 0.0)

    assert asyncio.run(scene()) == ([True, True], 4, False, True)
