"""Ranks with real guards and commit tables: fences anywhere, survivors cut by a plan, a lost rank adopted; the same ids, logits, and table as without."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from tests.pipeline.guarded_ranks import GuardedInstance
from tests.pipeline.test_stage_driver_scheduler import BOUNDS, LENGTHS, of, outcome, prompts, requests, started

NAMES = [f"r-{n}" for n in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def expected() -> tuple[list, dict]:
    instance = started(temperature=0.8)
    instance.finish()
    return outcome(instance)


@pytest.mark.parametrize("seed", range(25))
def test_real_tables_through_fences_and_plans(seed, tmp_path, expected) -> None:
    draw = random.Random(seed)
    with closing(GuardedInstance(BOUNDS, str(tmp_path / "nobody.sock"))) as instance:
        instance.events += instance.scheduler.add_run(requests(temperature=0.8), prompts())
        for _ in range(draw.randint(1, 4)):
            for _ in range(draw.randint(1, 9)):
                instance.step()
            if draw.random() < 0.5:
                instance.cut_step(draw.randint(0, 1))
            else:
                instance.step(reach=draw.randint(0, 2))
            tables = [rank.guard.table for rank in instance.ranks]
            known = [max(len(table.ids(table.row(name))) if name in table.sequences() else 0 for table in tables) for name in NAMES]
            fresh = draw.random() < 0.4 and all(count >= length for count, length in zip(known, LENGTHS, strict=True))
            instance.recover(lambda name, longest: max(0, longest - draw.choice((0, 0, 1, 9))), draw.choice((0, 1, -1)), fresh)
        instance.finish()
        assert not of(instance, "diverged") and not of(instance, "error")
        assert of(instance, "finished")[-1]["tokens"] == expected[0]
        again = {(event["sequence"], event["index"]): event["logits"] for event in of(instance, "token") if event["logits"]}
        assert all(expected[1][key] == logits for key, logits in again.items())
        assert len({(event["sequence"], event["index"]) for event in of(instance, "token")}) == len(of(instance, "token"))
        for rank in instance.ranks:
            for n, tokens in enumerate(expected[0]):
                assert rank.guard.table.ids(rank.guard.table.row(f"r-{n}")).tolist() == prompts()[n] + tokens
        instance.scheduler.release("r")
        instance.finish()
        assert not any(rank.guard.table.sequences() for rank in instance.ranks)


def test_decoding_goes_on_a_tape_and_what_prefills_beside_it_does_not_get_lost(tmp_path) -> None:
    """The bundled engine's steps are the fast way's: one record a step for all that decodes."""
    with closing(GuardedInstance(BOUNDS, str(tmp_path / "nobody.sock"))) as instance:
        instance.check, check = lambda: None, instance.check  # it asks for lists, which ends a tape
        instance.events += instance.scheduler.add_run(requests(lengths=(3, 8, 5), max_tokens=12), prompts((3, 8, 5)))
        taped = []
        for n in range(12):
            if n == 6:
                instance.events += instance.scheduler.add_run(requests("s", lengths=(21,)), prompts((21,)))
            instance.step()
            tapes = [rank.guard.table.tape for rank in instance.ranks]
            taped.append([tape.count if tape is not None else 0 for tape in tapes])
        check()
        assert taped[5][0] >= 3 and taped[6] == [0, 0] and all(one == other for one, other in taped), taped
        instance.finish()
        assert not of(instance, "error")
        check()
