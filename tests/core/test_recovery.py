"""plan(): the ladder, lineage first, survivors, ids, several losses, and the properties that I1 stands on."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.core.recovery import Plan, Situation, Unplannable, plan
from kvguard.format.lineage import agreed, newest
from kvguard.format.messages import Holding, Report, Source, StandbyBeat
from kvguard.types import Epoch, Fork, Rank, StreamId

I, E8 = "i", Epoch(8, "c")
OLD = (Fork(0, 0),)
R0, R1, R2 = (Rank(0, pp, 0) for pp in range(3))


@dataclass
class Has:
    """A holding in few words: `rows` is {sequence: (position, ids[, lineage])}."""

    node: str
    rank: Rank
    rows: dict
    kind: str = "pool"
    alive: bool = True
    life: int = 1
    fingerprint: int = 0
    generation: int = 1
    birth: int = 0


def stream(rank: Rank, life: int = 1) -> StreamId:
    return StreamId(I, rank, life)


def reports(*held: Has) -> tuple[Report, ...]:
    by_node: dict[str, list[Holding]] = {}
    for has in held:
        rows = [(name, *row, OLD)[:4] for name, row in has.rows.items()]
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        holding = Holding(stream(has.rank, has.life), has.kind, has.alive, columns[0], (has.generation,) * len(rows), columns[3], columns[1], columns[2], has.fingerprint, (has.birth,) * len(rows))
        by_node.setdefault(has.node, []).append(holding)
    return tuple(Report(I, E8, node, tuple(holdings)) for node, holdings in by_node.items())


def standby(node: str, no: int = 1, **fingerprints: int):
    return (node, StandbyBeat(I, no, "", fingerprints or {str(rank): 0 for rank in (R0, R1, R2)}))


def ask(held: list[Has], lost=(R1,), standbys=None, members=None, **more):
    members = members or {R0: "a", R1: "b", R2: "c"}
    standbys = tuple(standby(node, 10 + k) for k, node in enumerate("abc")) if standbys is None else tuple(standbys)
    return plan(Situation(I, E8, members, tuple(lost), reports(*held), standbys, {node: f"tcp://{node}" for node in "abc"}, **more))


def survivors(rows: dict) -> list[Has]:
    return [Has("a", R0, rows), Has("c", R2, rows)]


def column(answer: Plan, name: str) -> dict:
    return dict(zip(answer.order.sequences, getattr(answer.order, name), strict=True))


def test_a_holder_that_was_cut_off_does_not_offer_an_older_life_of_the_name():
    """Same name, same lineage, more positions: another sequence's, or beyond a truncation that it missed. The generation tells (simulation seeds 35, 340)."""
    longer, newer = Has("c", R1, {"s": (50, 51)}, "replica", generation=4), Has("a", R1, {"s": (45, 46)}, "replica", generation=7)
    answer = ask([*survivors({"s": (48, 49)}), longer, newer])
    assert column(answer, "positions") == {"s": 45} and column(answer, "ids") == {"s": 49}
    assert [source.node for source in answer.order.rebuilds[0].sources] == ["a"]
    alone = ask([*survivors({"s": (48, 49)}), longer])
    assert column(alone, "positions") == {"s": 48}, "the only copy is the newest life that is known"


def test_a_longer_copy_of_another_sequence_of_the_name_is_not_restored():
    """The name was given away again within one epoch, while this holder was down: one lineage, and no other copy of its stream whose generation would tell."""
    answer = ask([*(has_born(2, has) for has in survivors({"s": (48, 49), "t": (7, 8)})), Has("c", R1, {"s": (50, 51), "t": (7, 8)}, "replica", birth=1)])
    assert column(answer, "positions") == {"s": 0, "t": 0} and column(answer, "ids") == {"s": 49, "t": 8} and answer.order.births == (2, 2)
    assert answer.order.rebuilds[0].source == (-1, -1) and answer.order.rungs == ("tokens", "tokens")
    assert answer.strange == (("c", stream(R1), "s"), ("c", stream(R1), "t"))
    assert all("another sequence that bore this name is what c has of 0.1.0" in text for text in answer.order.explanations)
    same = ask([*(has_born(2, has) for has in survivors({"s": (48, 49)})), Has("c", R1, {"s": (47, 51)}, "replica", birth=2)])
    assert column(same, "positions") == {"s": 47} and same.strange == () and same.order.births == (2,)


def has_born(birth: int, has: Has) -> Has:
    has.birth = birth
    return has


def test_ids_of_another_sequence_of_the_name_are_nobodys():
    stale = Has("d", R0, {"s": (60, 61)}, "replica", life=9, birth=1)
    answer = ask([*(has_born(2, has) for has in survivors({"s": (9, 11)})), Has("c", R1, {"s": (8, 10)}, "replica", birth=2), stale])
    assert (answer.order.ids, answer.order.ids_node, column(answer, "positions")) == ((11,), ("a",), {"s": 8})
    alone = ask([has_born(2, has) for has in survivors({"s": (0, 0)})] + [Has("b", R0, {"s": (60, 61)}, "replica", life=9, birth=1)])
    assert alone.order.sequences == () and [name for name, _ in alone.lost] == ["s"], "ids of the former life are not the new one's"


def test_survivors_of_two_lives_start_over():
    """A fence between two ranks' shares of the step in which the name changed hands: the first stage has the new life, the last one still the old."""
    answer = ask([Has("a", R0, {"s": (4, 9)}, birth=2), Has("c", R2, {"s": (30, 31)}, birth=1), Has("b", R1, {"s": (4, 9)}, alive=False, birth=2)])
    assert column(answer, "positions") == {"s": 0} and answer.order.births == (2,) and answer.order.ids == (9,)
    assert answer.strange == (("c", stream(R2), "s"),)


def test_what_a_former_plan_decided_is_not_found_in_an_older_sequence_of_the_name():
    forks = {"s": (Fork(0, 0), Fork(7, 5))}
    stale = Has("c", R1, {"s": (50, 51)}, "replica", birth=1)
    answer = ask([*survivors({}), stale], forks=forks, births={"s": 2})
    assert answer.order.sequences == () and [name for name, _ in answer.lost] == ["s"]
    assert column(ask([*survivors({}), stale], forks=forks, births={"s": 1}), "births") == {"s": 1}
    newer = Has("c", R1, {"s": (6, 9, (Fork(7, 0),))}, "replica", birth=3)
    assert column(ask([*survivors({}), newer], forks=forks, births={"s": 2}), "births") == {"s": 3}, "begun after that plan"


def test_the_newest_lineage_says_which_life_it_is():
    old, new = Has("a", R1, {"s": (50, 51)}, "replica", birth=1), Has("c", R1, {"s": (6, 9, (Fork(7, 0),))}, "replica", life=2, birth=2)
    for held in ([old, new], [new, old]):
        answer = ask([*survivors({}), *held])
        assert answer.order.births == (2,) and answer.order.ids == (9,) and [node for node, _, _ in answer.strange] == ["a"]


def test_a_copy_that_does_not_say_its_birth_is_judged_by_lineage_alone():
    answer = ask([*(has_born(2, has) for has in survivors({"s": (9, 11)})), Has("c", R1, {"s": (8, 10)}, "replica", birth=0)])
    assert column(answer, "positions") == {"s": 8} and answer.order.births == (2,) and answer.strange == ()


def test_dead_process_is_adopted_where_its_pool_is():
    answer = ask([*survivors({"s": (9, 11)}), Has("b", R1, {"s": (9, 10)}, alive=False), Has("c", R1, {"s": (8, 10)}, "replica")])
    (rebuild,) = answer.order.rebuilds
    assert (rebuild.rank, rebuild.node, rebuild.sources, rebuild.source) == (R1, "b", (Source("pool", "b", stream(R1)),), (0,))
    assert column(answer, "positions") == {"s": 9} and column(answer, "rungs") == {"s": "pool"}
    assert column(answer, "lineages") == {"s": (Fork(0, 0), Fork(8, 9))}
    assert answer.order.transfers == () and answer.former == (), "the stream goes on"
    assert (answer.order.ids, answer.order.ids_node, answer.order.ids_stream) == ((11,), ("a",), (stream(R0),))


def test_node_death_takes_the_standby_on_the_holders_node():
    answer = ask([*survivors({"s": (9, 11), "t": (5, 6)}), Has("c", R1, {"s": (8, 10), "t": (5, 6)}, "replica")])
    (rebuild,) = answer.order.rebuilds
    assert (rebuild.node, rebuild.standby, rebuild.sources) == ("c", 12, (Source("replica", "c", stream(R1)),))
    assert column(answer, "positions") == {"s": 8, "t": 5} and answer.order.rungs == ("replica", "replica")
    assert answer.former == (stream(R1),) and answer.order.transfers == ()
    assert all(answer.order.explanations) and "0.1.0" in answer.order.explanations[0]


def test_a_standby_elsewhere_gets_the_replica_pushed():
    answer = ask([*survivors({"s": (9, 11)}), Has("c", R1, {"s": (8, 10)}, "replica")], standbys=[standby("a", 5)])
    assert answer.order.rebuilds[0].node == "a" and answer.order.transfers == (("c", "a", "tcp://a", stream(R1)),)
    assert column(answer, "positions") == {"s": 8}


def test_no_replica_leaves_the_tokens():
    answer = ask(survivors({"s": (9, 11), "new": (0, 4)}))
    assert column(answer, "positions") == {"s": 0, "new": 0} and column(answer, "rungs") == {"s": "tokens", "new": "pool"}
    assert answer.order.rebuilds[0].source == (-1, -1) and column(answer, "lineages")["s"] == (Fork(8, 0),)


def test_one_position_is_left_to_compute():
    answer = ask([*survivors({"s": (10, 10)}), Has("c", R1, {"s": (10, 10)}, "replica")])
    assert column(answer, "positions") == {"s": 9}


def test_without_ids_a_sequence_is_lost_and_named():
    answer = ask([*survivors({"s": (9, 0), "t": (4, 5)}), Has("c", R1, {"s": (9, 0), "t": (4, 5)}, "replica")])
    assert answer.order.sequences == ("t",) and [name for name, _ in answer.lost] == ["s"] and "ids" in answer.lost[0][1]


def test_ids_come_from_replicas_when_no_pool_lives():
    answer = ask([Has("b", R0, {"s": (9, 10)}, "replica"), Has("c", R0, {"s": (9, 12)}, "replica")], lost=(R0,), members={R0: "a"})
    assert answer.order.ids == (12,) and answer.order.ids_node == ("c",) and answer.order.positions == (9,)


def test_survivors_limit_and_a_survivor_without_the_sequence_means_position_0():
    answer = ask([Has("a", R0, {"s": (9, 11), "t": (3, 5)}), Has("c", R2, {"s": (7, 11)}), Has("c", R1, {"s": (9, 11), "t": (3, 5)}, "replica")])
    assert column(answer, "positions") == {"s": 7, "t": 0} and column(answer, "rungs")["t"] == "tokens"


def test_lineage_first_a_cut_off_holder_offers_nothing_beyond_the_fork():
    newer = (Fork(0, 0), Fork(7, 900))
    held = [*survivors({"s": (902, 904, newer)}), Has("c", R1, {"s": (901, 904, newer)}, "replica"), Has("a", R1, {"s": (950, 951)}, "replica", life=2)]
    assert column(ask(held), "positions") == {"s": 901}
    only_old = [*survivors({"s": (905, 907)}), Has("c", R1, {"s": (905, 907)}, "replica")]
    assert column(ask(only_old), "positions") == {"s": 905}
    answer = ask(only_old, forks={"s": newer})
    assert column(answer, "positions") == {"s": 899}, "a fork that a former plan decided counts although nobody reports it; ids end at 900"


def test_a_reused_id_that_lives_is_the_truth_over_a_fork_of_the_same_epoch():
    fresh = (Fork(7, 0),)
    held = [*survivors({"s": (20, 22, fresh)}), Has("c", R1, {"s": (20, 22, fresh)}, "replica"), Has("a", R1, {"s": (950, 951)}, "replica", life=2)]
    assert column(ask(held, forks={"s": (Fork(0, 0), Fork(7, 900))}), "positions") == {"s": 20}


def test_nothing_lost_keeps_the_live_pools():
    answer = ask([*survivors({"s": (9, 10)}), Has("b", R1, {"s": (8, 10)})], lost=())
    assert answer.order.rebuilds == () and column(answer, "rungs") == {"s": "pool"} and column(answer, "positions") == {"s": 8}


def test_a_rank_that_reports_no_live_pool_is_lost():
    answer = ask([*survivors({"s": (9, 10)}), Has("c", R1, {"s": (7, 8)}, "replica")], lost=())
    assert answer.lost_ranks == (R1,) and column(answer, "positions") == {"s": 7}


def test_no_standby_is_said():
    answer = ask(survivors({"s": (9, 10)}), standbys=[standby("a", 1, **{"0.0.0": 7})])
    assert isinstance(answer, Unplannable) and "0.1.0" in answer.reasons[0] and "no standby fits" in answer.reasons[0]


def test_a_standby_of_another_layout_does_not_fit():
    held = [*survivors({"s": (9, 10)}), Has("c", R1, {"s": (9, 10)}, "replica", fingerprint=77)]
    assert isinstance(ask(held, standbys=[standby("c", 1, **{"0.1.0": 78})]), Unplannable)
    assert ask(held, standbys=[standby("c", 1, **{"0.1.0": 77})]).order.rebuilds[0].node == "c"


def test_two_lost_ranks_share_two_standbys_even_if_both_prefer_the_same():
    held = [Has("a", R0, {"s": (9, 10)}), Has("a", R1, {"s": (8, 10)}, "replica"), Has("a", R2, {"s": (7, 10)}, "replica")]
    answer = ask(held, lost=(R1, R2), standbys=[standby("a", 1), standby("d", 2, **{"0.1.0": 0})])
    assert {rebuild.rank: rebuild.node for rebuild in answer.order.rebuilds} == {R1: "d", R2: "a"}
    assert answer.order.positions == (7,) and answer.order.transfers == (("a", "d", "", stream(R1)),)
    assert isinstance(ask(held, lost=(R1, R2), standbys=[standby("a", 1)]), Unplannable)


def test_rank_and_holder_lost_together_falls_to_the_tokens():
    answer = ask([Has("a", R0, {"s": (9, 10)})], lost=(R1, R2), standbys=[standby("a", 1), standby("a", 2)])
    assert answer.order.positions == (0,) and answer.order.rungs == ("tokens",) and answer.lost == ()


def test_tensor_parallel_and_dp_groups_do_not_mix():
    left, right, other = Rank(0, 0, 0), Rank(0, 0, 1), Rank(1, 0, 0)
    held = [Has("a", left, {"s": (9, 10)}), Has("c", other, {"u": (5, 6)}), Has("c", right, {"s": (6, 10)}, "replica")]
    answer = ask(held, lost=(right,), members={left: "a", right: "b", other: "c"}, standbys=[standby("c", 1, **{"0.0.1": 0})])
    assert column(answer, "positions") == {"s": 6, "u": 5} and column(answer, "rungs") == {"s": "replica", "u": "pool"}
    assert answer.order.rebuilds[0].source == (0, -1)


def test_excluded_nodes_and_delivered_sequences_do_not_count():
    held = [*survivors({"s": (9, 10), "over": (4, 5)}), Has("b", R1, {"s": (9, 10)}, "replica"), Has("c", R1, {"s": (5, 10)}, "replica")]
    answer = ask(held, excluded=("b",), over={"over": (0,)})
    assert answer.order.sequences == ("s",) and answer.order.positions == (5,)


# one life of a sequence: plans at 4, 6 and back to 3; two different lineages never end in the same epoch
lineages = st.sampled_from([OLD, (Fork(0, 0), Fork(3, 4)), (Fork(0, 0), Fork(3, 4), Fork(5, 6)), (Fork(0, 0), Fork(6, 3))])
rows = st.dictionaries(st.sampled_from("stuv"), st.tuples(st.integers(0, 12), st.integers(0, 14), lineages), max_size=4)


@st.composite
def worlds(draw):
    held = [Has("a", R0, draw(rows)), Has("c", R2, draw(rows))]
    if draw(st.booleans()):
        held.append(Has("b", R1, draw(rows), alive=False))
    for life in range(draw(st.integers(0, 3))):
        held.append(Has(draw(st.sampled_from("abc")), R1, draw(rows), "replica", life=10 + life))
    return held


def truth(held: list[Has], forks: dict) -> dict:
    """The newest lineage by sequence, live pools first: written apart from plan()."""
    known: dict[str, list] = {}
    for has in held:
        for name, row in has.rows.items():
            known.setdefault(name, []).append(row[2])
    return {name: newest([*found, *([forks[name]] if name in forks else [])]) for name, found in known.items()}


def offers(has: Has, name: str, lineage) -> int:
    row = has.rows.get(name)
    return 0 if row is None else min(row[0], agreed(row[2], lineage))


@settings(max_examples=300, deadline=None)
@given(worlds(), st.dictionaries(st.sampled_from("stuv"), lineages, max_size=2), st.sets(st.sampled_from("abc"), min_size=1))
def test_never_beyond_what_every_rank_has(held, forks, places):
    answer = ask(held, forks=forks, standbys=[standby(node, 1) for node in sorted(places)])
    right = truth(held, forks)
    (rebuild,) = answer.order.rebuilds
    named = {name for has in held for name in has.rows}
    assert set(answer.order.sequences) | {name for name, _ in answer.lost} == named
    assert not set(answer.order.sequences) & {name for name, _ in answer.lost}
    for i, name in enumerate(answer.order.sequences):
        position, at = answer.order.positions[i], rebuild.source[i]
        ids = max(min(has.rows[name][1], agreed(has.rows[name][2], right[name])) for has in held if name in has.rows)
        assert answer.order.ids[i] == ids and 0 <= position <= ids - 1
        assert all(position <= offers(has, name, right[name]) for has in held[:2]), "no survivor is ahead of its own pool"
        assert (at >= 0) == (position > 0)
        if at >= 0:
            source = rebuild.sources[at]
            copy = next(has for has in held if has.node == source.node and stream(has.rank, has.life) == source.stream)
            assert position <= offers(copy, name, right[name])
            assert source.kind == copy.kind and (source.kind == "replica" or source.node == rebuild.node)
            moved = any((source.node, rebuild.node, source.stream) == (t[0], t[1], t[3]) for t in answer.order.transfers)
            assert moved == (source.node != rebuild.node)
        assert answer.order.lineages[i][-1].epoch == 8 and answer.order.explanations[i]
    assert answer == ask(held, forks=forks, standbys=[standby(node, 1) for node in sorted(places)])


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_never_better_by_dropping_a_source(held, data):
    forks = truth(held, {})  # the lineage stays known: without it an older copy could pass for the truth
    for has in held:  # no copy has KV of ids that it doesn't know: rows and the lanes' order see to that
        has.rows = {name: (row[0], max(row[0], row[1]), *row[2:]) for name, row in has.rows.items()}
    ids = Has("d", R0, {name: (0, 13, forks[name]) for name in forks}, "replica", life=99)
    whole = ask([*held, ids], forks=forks)
    drop = data.draw(st.integers(2, len(held))) if len(held) > 2 else len(held)
    fewer = ask([*held[:drop], *held[drop + 1 :], ids], forks=forks)
    assert sum(whole.order.positions) >= sum(fewer.order.positions)


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_nothing_comes_from_a_copy_of_another_birth(held, data):
    for has in held:
        has.birth = data.draw(st.integers(0, 2))
    answer = ask(held, forks=truth(held, {}))
    assert isinstance(answer, Plan)
    births = dict(zip(answer.order.sequences, answer.order.births, strict=True))

    def is_strange(has: Has, name: str) -> bool:
        return bool(has.birth and births[name]) and has.birth != births[name]

    by_place = {(has.node, stream(has.rank, has.life)): has for has in held}
    for i, name in enumerate(answer.order.sequences):
        for rebuild in answer.order.rebuilds:
            if rebuild.source[i] >= 0:
                source = rebuild.sources[rebuild.source[i]]
                assert not is_strange(by_place[source.node, source.stream], name)
        assert not is_strange(by_place[answer.order.ids_node[i], answer.order.ids_stream[i]], name)
        assert not answer.order.positions[i] or not any(is_strange(has, name) for has in held[:2] if name in has.rows)
        told = {(node, life) for node, life, sequence in answer.strange if sequence == name}
        assert told == {(has.node, stream(has.rank, has.life)) for has in held if name in has.rows and is_strange(has, name)}
