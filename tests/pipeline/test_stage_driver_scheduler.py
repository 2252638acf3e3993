"""The driver's state machine against toy ranks: every id once, the same ids and logits wherever a resume happens, blocks and ids told as deltas."""

from __future__ import annotations

import random

import msgspec
import pytest

from kvguard.pipeline.runs import Request, pack_request, unpack_request
from kvguard.pipeline.scheduler import Bounds, Restored, Scheduler
from tests.pipeline.toy_ranks import VOCAB, ToyInstance

BOUNDS = Bounds(blocks=40, block_tokens=4, chunk=8, sequences_max=4, context=400, vocab=VOCAB, eos=(2,))
LENGTHS = (3, 21, 8, 17, 1)  # of prompts: within a chunk, several, exactly one


def prompts(lengths=LENGTHS) -> list[list[int]]:
    return [[(7 * n + 3 * i + 1) % VOCAB for i in range(length)] for n, length in enumerate(lengths)]


def requests(run="r", lengths=LENGTHS, max_tokens=6, temperature=0.0, ignore_eos=True) -> list[Request]:
    return [Request(run, n, len(lengths), length, max_tokens, temperature, 0, 1.0, 5, ignore_eos) for n, length in enumerate(lengths)]


def started(bounds=BOUNDS, **more) -> ToyInstance:
    instance = ToyInstance(bounds)
    instance.events += instance.scheduler.add_run(requests(**more), prompts(more.get("lengths", LENGTHS)))
    return instance


def of(instance: ToyInstance, kind: str) -> list[dict]:
    return [event for event in instance.events if event["event"] == kind]


def outcome(instance: ToyInstance) -> tuple[list, dict]:
    """Finished tokens, and logits by (sequence, index) of those computed here."""
    (finished,) = of(instance, "finished")
    return finished["tokens"], {(event["sequence"], event["index"]): event["logits"] for event in of(instance, "token") if event["logits"]}


@pytest.fixture(scope="module")
def undisturbed() -> dict:
    found = {}
    for temperature in (0.0, 0.8):
        instance = started(temperature=temperature)
        instance.finish()
        found[temperature] = outcome(instance)
    return found


def test_every_id_once_in_order_and_told_before_the_end(undisturbed) -> None:
    instance = started()
    instance.finish()
    tokens, _ = outcome(instance)
    for index in range(len(LENGTHS)):
        events = [event for event in of(instance, "token") if event["sequence"] == index]
        assert [event["index"] for event in events] == list(range(6))
        assert [event["id"] for event in events] == tokens[index]
        assert [event["position"] for event in events] == [LENGTHS[index] + k - 1 for k in range(6)]
        assert [event["last"] for event in events] == [False] * 5 + [True]
        row = instance.ranks[0].rows[f"r-{index}"]
        assert row.ids == prompts()[index] + tokens[index] and row.position == len(row.ids) - 1
    assert [event["position"] for event in of(instance, "prefill") if event["sequence"] == 1] == [8, 16, 21]
    assert undisturbed[0.0][0] != undisturbed[0.8][0]


def test_alone_or_together_is_the_same(undisturbed) -> None:
    for index, length in enumerate(LENGTHS):
        instance = ToyInstance(BOUNDS)
        request = Request("r", 0, 1, length, 6, 0.8, 0, 1.0, 5 + index, True)
        instance.scheduler.add_run([request], [prompts()[index]])
        instance.finish()
        assert outcome(instance)[0][0] == undisturbed[0.8][0][index]


@pytest.mark.parametrize("seed", range(60))
def test_resume_anywhere_gives_the_same_ids_and_logits(seed, undisturbed) -> None:
    draw = random.Random(seed)
    temperature = draw.choice((0.0, 0.8))
    instance = started(temperature=temperature)
    handed_out: list[dict] = []
    for _ in range(draw.randint(1, 3)):
        for _ in range(draw.randint(0, 9)):
            instance.step()
        instance.step(reach=draw.randint(0, 2))
        known = {name: len(row[2]) for name, row in instance.ranks[0].guard.table.items()}
        whole = all(known.get(f"r-{index}", 0) >= length for index, length in enumerate(LENGTHS))  # else prompts died with a driver right after a recovery
        fresh = whole and draw.random() < 0.4
        handed_out += of(instance, "token") if fresh else []
        rolls = draw.random() < 0.5
        where = instance.recover(lambda name, longest: max(0, longest - draw.randint(0, 12)) if rolls else longest, draw.randint(0, 1), fresh)
        for each in where:
            last = each["prompt_tokens"] + each["emitted"] - 1
            assert each["resume_position"] <= last and each["rolled_back"] == last - each["resume_position"]
    instance.finish()
    tokens, logits = outcome(instance) if len(of(instance, "finished")) == 1 else (of(instance, "finished")[-1]["tokens"], {})
    expected_tokens, expected_logits = undisturbed[temperature]
    assert tokens == expected_tokens
    assert not of(instance, "diverged") and not of(instance, "error")
    assert all(expected_logits[key] == value for key, value in logits.items())
    seen: set[tuple[int, int]] = set()
    for event in of(instance, "token"):
        key = (event["sequence"], event["index"])
        assert key not in seen and event["id"] == expected_tokens[event["sequence"]][event["index"]]
        seen.add(key)
    for event in handed_out:
        assert event["id"] == expected_tokens[event["sequence"]][event["index"]]


def test_kv_ahead_of_the_ids_leaves_the_last_position_to_compute(undisturbed) -> None:
    instance = started()
    for _ in range(8):
        instance.step()
    known = {name: len(track.ids) for name, track in instance.scheduler.tracks.items()}
    instance.step(reach=2)  # every rank has published it, its logits are lost
    where = instance.recover(lambda name, longest: longest, 0, fresh=False)
    ahead = [name for name, row in instance.ranks[0].rows.items() if row.position == known[name]]
    assert ahead and all(each["resume_position"] == known[f"r-{each['sequence']}"] - 1 for each in where if f"r-{each['sequence']}" in ahead)
    assert all(each["rolled_back"] == 0 for each in where if f"r-{each['sequence']}" in ahead)
    instance.finish()
    assert outcome(instance)[0] == undisturbed[0.0][0] and not of(instance, "diverged")


def test_a_new_driver_hands_out_everything_again() -> None:
    instance = started()
    for _ in range(6):
        instance.step()
    before = of(instance, "token")
    assert before
    instance.step(reach=2)  # ids are told before they are seen
    instance.recover(lambda name, longest: longest, 0, fresh=True)
    again = [event for event in of(instance, "token") if event.get("again")]
    assert sorted((event["sequence"], event["index"], event["id"]) for event in again) == sorted(
        (event["sequence"], event["index"], event["id"]) for event in before)
    assert all(event["logits"] == "" for event in again)
    instance.finish()
    assert [len(tokens) for tokens in outcome(instance)[0]] == [6] * len(LENGTHS)


def test_a_sequence_that_is_not_named_starts_over(undisturbed) -> None:
    instance = started()
    for _ in range(7):
        instance.step()
    where = instance.recover(lambda name, longest: longest, 1, fresh=False, forgotten=("r-1",))
    assert [each["resume_position"] for each in where if each["sequence"] == 1] == [0]
    assert [each["rung"] for each in where if each["sequence"] == 1] == ["tokens"]
    instance.finish()
    assert outcome(instance)[0] == undisturbed[0.0][0] and not of(instance, "diverged")


def in_mid_work():
    """(instance, what a resumption would name, each rank's rows) after seven steps."""
    instance = started()
    for _ in range(7):
        instance.step()
    scheduler, states = instance.scheduler, [{name: (row.position, tuple(row.blocks)) for name, row in rank.rows.items()} for rank in instance.ranks]
    restored = [
        Restored(name, min(track.position, len(track.ids) - 1), tuple(track.ids), "pool", pack_request(track.request))
        for name, track in scheduler.tracks.items() if name in states[0]
    ]  # fmt: skip
    return instance, restored, states


def test_ranks_that_disagree_start_over_and_say_so(undisturbed) -> None:
    instance, restored, states = in_mid_work()
    scheduler = instance.scheduler
    states[1]["r-0"] = (states[1]["r-0"][0], (39, *states[1]["r-0"][1][1:]))
    states[1]["r-1"] = (states[1]["r-1"][0], (*states[1]["r-1"][1][:5], 39))
    states[0]["r-2"] = (states[0]["r-2"][0] - 1, states[0]["r-2"][1])
    scheduler.fenced()
    where, events = scheduler.resume(restored, states)
    assert [(event["sequence"], event["agreed"]) for event in events if event["event"] == "disagreed"] == [(0, 0), (1, 20), (2, 0)]
    assert [each["resume_position"] for each in where if each["sequence"] < 3] == [0, 20, 0]
    instance.events += events
    instance.finish()
    assert outcome(instance)[0] == undisturbed[0.0][0]


def test_another_runs_kv_under_this_name_is_not_gone_on_with(undisturbed) -> None:
    instance, restored, states = in_mid_work()
    scheduler = instance.scheduler
    former = msgspec.structs.replace(scheduler.tracks["r-1"].request, born=1)
    restored = [token._replace(request=pack_request(former), ids=(9,) * len(token.ids)) if token.sequence == "r-1" else token for token in restored]
    scheduler.fenced()
    where, events = scheduler.resume(restored, states)
    assert [(event["sequence"], event["agreed"]) for event in events if event["event"] == "disagreed"] == [(1, 0)]
    assert [(each["resume_position"], each["rung"]) for each in where if each["sequence"] == 1] == [(0, "tokens")]
    instance.events += events
    instance.finish()
    assert outcome(instance)[0] == undisturbed[0.0][0] and not of(instance, "diverged")


def test_changed_kv_shows_as_diverged() -> None:
    instance = started()
    for _ in range(8):
        instance.step()
    row = instance.ranks[-1].rows["r-0"]
    instance.ranks[-1].kv[0, 0, row.blocks[0], 0] += 1.0
    instance.recover(lambda name, longest: max(0, longest - 2), 0, fresh=False)
    instance.finish()
    assert {event["sequence"] for event in of(instance, "diverged")} == {0}


def test_what_never_fits_fails_alone_and_others_go_on() -> None:
    instance = ToyInstance(BOUNDS._replace(context=100))
    lengths = (3, 98, 5)
    instance.events += instance.scheduler.add_run(requests(lengths=lengths), prompts(lengths))
    bad = Request("s", 0, 1, 3, 6, 0.0, 0, 0.0, 5, True)
    instance.events += instance.scheduler.add_run([bad], [[1, 2, 3]])
    instance.finish()
    assert [(event["run"], event["sequence"]) for event in of(instance, "error")] == [("r", 1), ("s", 0)]
    finished = {event["run"]: [len(tokens) for tokens in event["tokens"]] for event in of(instance, "finished")}
    assert finished == {"r": [6, 0, 6], "s": [0]}


def test_a_pool_held_by_finished_sequences_is_an_error_not_a_standstill() -> None:
    instance = started(BOUNDS._replace(blocks=9))
    instance.finish()
    assert [event["sequence"] for event in of(instance, "error")] == [2, 3, 4]
    assert all("Try: release" in event["message"] for event in of(instance, "error"))
    (finished,) = of(instance, "finished")
    assert [len(tokens) for tokens in finished["tokens"]] == [6, 6, 0, 0, 0]
    instance.events += instance.scheduler.release("r")
    instance.events.clear()
    instance.scheduler.add_run(requests("s", lengths=(8, 4)), prompts((8, 4)))
    instance.finish()
    assert [len(tokens) for tokens in of(instance, "finished")[0]["tokens"]] == [6, 6]


def test_a_run_that_comes_again_is_another_life_of_its_names_also_after_a_resumption() -> None:
    lives = []
    for born in (1, 2):
        instance = ToyInstance(BOUNDS)
        instance.scheduler.add_run([msgspec.structs.replace(request, born=born) for request in requests()], prompts())
        lives.append([track.life for track in instance.scheduler.tracks.values()])
        for _ in range(6):
            instance.step()
        instance.recover(lambda name, longest: longest, 0, fresh=True)
        assert [track.life for track in instance.scheduler.tracks.values()] == lives[-1] and all(life.birth for life in lives[-1])
    first, second = lives
    assert [life.sequence for life in first] == [life.sequence for life in second] and not set(first) & set(second)


def test_release_frees_and_confirms() -> None:
    instance = started()
    instance.finish()
    instance.events += instance.scheduler.release("r")
    instance.finish()
    assert [event["run"] for event in of(instance, "released")] == ["r"]
    assert instance.scheduler.pool.free_blocks == BOUNDS.blocks and not instance.ranks[0].rows
    assert instance.scheduler.release("r")[0]["event"] == "error"
    instance.events.clear()
    instance.scheduler.add_run(requests(), prompts())
    instance.finish()
    assert len(of(instance, "finished")) == 1


def test_release_of_a_running_run_and_of_one_that_a_fence_met() -> None:
    instance = started()
    for _ in range(4):
        instance.step()
    instance.scheduler.release("r")
    instance.step(reach=1)  # one rank has let go, the other has not heard
    instance.recover(lambda name, longest: longest, 1, fresh=False)
    instance.finish()
    assert [event["run"] for event in of(instance, "released")] == ["r"]
    assert not any(rank.rows for rank in instance.ranks)


def test_eos_ends_a_sequence() -> None:
    plain = started(max_tokens=40, lengths=(3,))
    plain.finish()
    ids = outcome(plain)[0][0]
    instance = ToyInstance(BOUNDS._replace(eos=(ids[4],)))
    instance.scheduler.add_run(requests(max_tokens=40, lengths=(3,), ignore_eos=False), prompts((3,)))
    instance.finish()
    assert outcome(instance)[0][0] == ids[: ids.index(ids[4]) + 1]


def test_more_sequences_than_run_at_once_and_a_second_run_meanwhile() -> None:
    lengths = tuple(range(1, 13))
    instance = ToyInstance(BOUNDS._replace(blocks=200, sequences_max=5))
    instance.scheduler.add_run(requests(lengths=lengths), prompts(lengths))
    for _ in range(3):
        instance.step()
    instance.scheduler.add_run(requests("s", lengths=(4, 4)), prompts((4, 4)))
    instance.finish()
    assert {event["run"]: [len(tokens) for tokens in event["tokens"]] for event in of(instance, "finished")} == {"r": [6] * 12, "s": [6] * 2}


def test_orphans_of_an_older_driver_are_released() -> None:
    instance = started()
    instance.finish()
    instance.scheduler = Scheduler(BOUNDS, 500)
    instance.scheduler.forget([{name: (row.position, tuple(row.blocks)) for name, row in rank.rows.items()} for rank in instance.ranks])
    instance.finish()
    assert not any(rank.rows for rank in instance.ranks)


def test_requests_survive_packing() -> None:
    for request in requests(temperature=0.7):
        assert unpack_request(pack_request(request)) == request
