"""Ranks of equal bytes on the command line: who is copied as another rank says so wherever it is shown, and is found under its own name."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from kvguard.cli import check, copied, top
from tests.cli.test_check import INSTANCE, LIMITS, NODE, RANK

FIRST, SECOND, FAR = (RANK | {"rank": rank, "copied_as": "0.1.0" if rank == "0.1.0" else "0.0.0"} for rank in ("0.0.0", "0.0.1", "0.1.0"))
HOST = NODE | {"address": "tcp://a:1", "heartbeat_age_ms": 1.0, "standbys": 0}
STATUS = {
    "schema": "kvguard.status/1", "coordinator": {"issuer": "c"}, "paused": False, "nodes": [HOST, HOST | {"node": "b", "address": "tcp://b:1"}],
    "instances": [INSTANCE | {"emitter": "none"}], "ranks": [FIRST, SECOND, FAR],
}  # fmt: skip
REPLICA = {
    "instance": "llama", "rank": "0.0.0", "sequence": "one", "holder": "b", "stream": "llama/0.0.0#1", "epoch": 0, "positions": 9, "bytes": 90, "tier": "memory",
    "released": False, "verified": True,
}  # fmt: skip
DRAIN = [{"instance": "llama", "rank": rank, "to": ["a"]} for rank in ("0.0.0", "0.0.1", "0.1.0")]


class Cluster:
    """What a coordinator and two nodes answer; node b holds a replica of each rank in `held`. `asked`: what nodes were asked, by rank."""

    def __init__(self, status: dict, held: tuple[str, ...]) -> None:
        self.status, self.held, self.asked = status, held, []

    def ask(self, address: str, verb: str, arguments: dict, *_, node: str, **__) -> dict:
        if node == "coordinator":
            return self.status if verb == "status" else {"node": "b", "replicas": DRAIN, "ranks": []}
        rank = arguments.get("rank")
        self.asked.append((node, verb, rank))
        found = [REPLICA | {"rank": one} for one in self.held if node == "b" and rank in (None, one)]
        if verb == "resync":
            found = [{"instance": "llama", "rank": one["rank"], "holder": "b", "sequences": 1, "positions": 9, "dropped": 4} for one in found]
        return {"schema": "kvguard.replicas/1", "replicas": found}


@pytest.fixture
def told(cli, monkeypatch):
    """Runs a command line against what a cluster answers."""

    def run(*words: str, status: dict = STATUS, held: tuple[str, ...] = ("0.0.0", "0.1.0")) -> tuple:
        cluster = Cluster(status, held)
        monkeypatch.setattr("kvguard.transport.ask.ask", cluster.ask)
        return *cli(*words, "--coordinator", "tcp://127.0.0.1:1", "--keys", ""), cluster.asked

    return run


def rows(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


@pytest.mark.parametrize(("more", "verb"), [((), "resync"), (("--dry-run",), "verify")])
def test_a_resync_of_a_covered_rank_works_on_the_rank_that_it_is_copied_as(told, more, verb) -> None:
    code, out, err, asked = told("resync", "llama", "0.0.1", *more, "-o", "json")
    found = json.loads(out)
    assert code == 0 and (found["schema"], found["unreachable"]) == ("kvguard.resync/1", [])
    assert [(one["rank"], one["copied_for"]) for one in found["replicas"]] == [("0.0.0", ["0.0.1"])]
    assert asked == [(node, verb, rank) for node in "ab" for rank in ("0.0.1", "0.0.0")], "its own name's, too: a former life may be held under it"
    assert err == "llama/0.0.1 is copied as 0.0.0: the replicas of that rank are verified, for both\n"


def test_what_is_held_under_its_own_name_is_not_forgotten(told) -> None:
    _, out, _, _ = told("resync", "llama", "0.0.1", held=("0.0.0", "0.0.1"))
    assert rows(out)[1:] == [
        "instance rank copied_for holder sequences positions damaged, sent again", "llama 0.0.0 0.0.1 b 1 9 4", "llama 0.0.1 - b 1 9 4",
    ]  # fmt: skip


def test_other_ranks_are_asked_for_as_ever(told) -> None:
    for words, asked in ((("llama", "0.1.0"), "0.1.0"), (("llama", "0.0.0"), "0.0.0"), (("llama",), None), ((), None), (("llama", "0.00.0"), "0.0.0")):
        code, _, err, questions = told("resync", *words)
        assert (code, err, questions) == (0, "", [("a", "resync", asked), ("b", "resync", asked)])


@pytest.mark.parametrize(
    ("words", "said"),
    [(("llama", "0.0.1"), " of llama/0.0.1 or llama/0.0.0."), (("llama", "0.1.0"), " of llama/0.1.0."), (("nobody",), " of nobody."), ((), ".")],
)
def test_what_nobody_holds_is_refused_by_name(told, words, said) -> None:
    code, out, err, _ = told("resync", *words, held=())
    assert code == 4 and not out and f"no node holds a replica{said} Try: kvguard replicas list" in err


def test_what_is_no_rank_is_a_usage_error(told) -> None:
    assert told("resync", "llama", "x")[0] == 2


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_replicas_say_whom_else_they_are_for(told, verb) -> None:
    _, out, _, _ = told("replicas", verb, "-o", "json")
    assert [(one["rank"], one["copied_for"]) for one in json.loads(out)["replicas"]] == [("0.0.0", ["0.0.1"]), ("0.1.0", [])]
    _, out, _, _ = told("replicas", verb)
    assert rows(out)[2:] == ["llama 0.0.0 0.0.1 one b 0 9 90 B memory yes", "llama 0.1.0 - one b 0 9 90 B memory yes"]
    _, out, _, _ = told("replicas", verb, status=STATUS | {"ranks": [FIRST, FAR]})
    assert rows(out)[1] == "instance rank sequence holder epoch positions bytes tier verified", "without such ranks nobody has to know of them"


def test_the_status_names_the_rank_that_one_is_copied_as(told) -> None:
    for output in ("table", "wide"):
        _, out, _, _ = told("status", "-o", output)
        lines = [line[: line.index(" a ") + 2] for line in rows(out) if line.startswith("llama 0.")]
        assert lines == ["llama 0.0.0 - a", "llama 0.0.1 0.0.0 a", "llama 0.1.0 - a"]
    _, out, _, _ = told("status", "-o", "json")
    assert json.loads(out) == STATUS


def test_top_names_it_too() -> None:
    said = io.StringIO()
    Console(file=said, width=250).print(top.screen(top.Seen(STATUS, [], {"a": {"ranks": []}, "b": "away"})))
    assert "0.0.1 as 0.0.0" in said.getvalue() and said.getvalue().count(" as 0.0.0") == 1


def test_findings_about_a_covered_rank_name_whose_copy_it_is() -> None:
    away = {"state": "unprotected", "reason": "b: holder unreachable"}
    found = check.findings(STATUS | {"ranks": [FIRST | away, SECOND | away, SECOND | {"lag_tokens": 65}]}, LIMITS)
    assert [(one.subject, one.reason) for one in found] == [
        ("rank 0.0.0 of llama", "unprotected: b: holder unreachable"),
        ("rank 0.0.1 of llama", "unprotected, copied as 0.0.0: b: holder unreachable"),
        ("rank 0.0.1 of llama", "65 tokens behind at its holders, copied as 0.0.0, 64 are tolerated"),
    ]  # fmt: skip


def test_orders_say_it_before_they_are_given(told) -> None:
    _, out, _, _ = told("drain", "b", "--dry-run")
    assert out == "would do: the replica of llama/0.0.0 (also that of 0.0.1) goes to a; the replica of llama/0.1.0 goes to a\n", "there is one, not two"
    _, out, _, _ = told("failover", "llama", "0.0.1", "--dry-run")
    assert out == "would fence it and rebuild the rank: llama 0.0.1 on a is protected, holders b, copied as 0.0.0\n"


def test_a_coordinator_that_says_nothing_of_it_is_understood() -> None:
    plain = {"ranks": [RANK, RANK | {"rank": "0.0.1"}, RANK | {"rank": "", "state": "standby"}]}
    assert copied.covered(plain) == {} and copied.names(plain, "llama", "0.0.1") == ["0.0.1"]
