"""Reports: what they say, that they are kept, and what changed from one to the next."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console
from seen import evidence

from kvguard.drill import documents
from kvguard.drill.archive import Archive, UnknownReport, default_directory, difference, name_of
from kvguard.drill.scenarios import SCENARIOS
from kvguard.errors import BadConfig

NOW = datetime(2026, 5, 4, 3, 2, 1, 5000, UTC)


def document(name: str = "kill-node", minute: int = 0, **changes) -> dict:
    run = evidence(name) | changes
    runs = [documents.judged(SCENARIOS[name], 1, "bench", run)]
    return documents.document(SCENARIOS[name], 1, runs, {"target": "bench"}, NOW + timedelta(minutes=minute))


def test_a_document_has_the_fields_that_others_rely_on() -> None:
    found = document()
    assert set(found) >= {"schema", "id", "name", "seed", "hypothesis", "runs", "passed", "failed"} and found["schema"] == "kvguard.drill/1"
    assert found["id"] == "20260504T030201.005-kill-node-1" and (found["passed"], found["failed"]) == (1, 0)
    (run,) = found["runs"]
    assert set(run) >= {"fault", "recovery", "outage", "identical", "logits_identical", "kv_identical", "invariants", "passed"}
    assert set(run["invariants"].values()) <= {"held", "violated", "not_checked"} and json.loads(json.dumps(found)) == found


def test_an_error_is_a_failed_run_with_all_its_fields() -> None:
    run = documents.judged(SCENARIOS["kill-node"], 3, "bench", {"error": "the bench ended with 1"})
    assert run["passed"] is False and run["failures"] == ["the bench ended with 1"] and run["identical"] is None and run["fault"] is None
    shown = io.StringIO()
    documents.render(documents.document(SCENARIOS["kill-node"], 3, [run], {}, NOW), Console(file=shown, width=200))
    assert "FAILED" in shown.getvalue() and "the bench ended with 1" in shown.getvalue()
    assert "failures=\"1\"" in documents.junit([documents.document(SCENARIOS["kill-node"], 3, [run], {}, NOW)])


def test_junit_has_a_case_per_run_and_a_property_per_invariant() -> None:
    root = ElementTree.fromstring(documents.junit([document(), document("kill-daemon", identical=False)]))
    suites = root.findall("testsuite")
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in suites] == [("kill-node", "1", "0"), ("kill-daemon", "1", "1")]
    assert {one.get("name"): one.get("value") for one in suites[0].iter("property")}["I3"] == "held"
    assert "identical is false" in suites[1].find("testcase/failure").get("message")
    assert "detect 2 -> fence 10 -> plan 1 -> restore 30 -> first_token 20" in suites[0].find("testcase/system-out").text


def test_reports_are_kept_listed_and_found_by_id_or_name(tmp_path) -> None:
    shelf = Archive(tmp_path / "drills")
    assert shelf.ids() == []
    first, other, second = document(), document("kill-rank", 1), document(minute=2)
    for one in (second, first, other):
        shelf.keep(one)
    assert shelf.ids() == [first["id"], other["id"], second["id"]] and [name_of(one) for one in shelf.ids()] == ["kill-node", "kill-rank", "kill-node"]
    assert shelf.load("kill-node") == second and shelf.load(first["id"]) == first
    assert shelf.before(second) == first and shelf.before(first) is None and shelf.before(other) is None
    with pytest.raises(UnknownReport, match="Try: kvguard drill report"):
        shelf.load("../../etc/passwd")


def test_a_report_that_is_not_one_is_named(tmp_path) -> None:
    shelf, found = Archive(tmp_path), document()
    (tmp_path / f"{found['id']}.json").write_text("{")
    with pytest.raises(BadConfig, match=found["id"]):
        shelf.load("kill-node")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="--reports DIR"):
        Archive(tmp_path / "file").keep(found)


def test_the_difference_shows_what_got_worse() -> None:
    worse = document(minute=1, identical=False)
    worse["runs"][0]["recovery"] = {**worse["runs"][0]["recovery"], "rolled_back": 2, "ms": {"detect": 9.0, "total": None}}
    changed = difference(document(), worse)
    assert changed["failed"] == [0, 1] and changed["comparisons"] == {"identical": [True, False]} and changed["invariants"] == {"I9": ["held", "violated"]}
    assert changed["ms"] == {"detect": [2.0, 9.0]} and changed["rolled_back"] == [0, 2]
    assert difference(document(), document(minute=1))["invariants"] == {}
    assert difference(document(), document(minute=1, kv_identical=None))["comparisons"] == {"kv_identical": [True, None]}, "not compared is not equal"


def test_where_reports_are_kept(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KVGUARD_DRILL_DIR", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.delenv("KVGUARD_DRILL_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert str(default_directory()) == "/somewhere/kvguard/drills"
