"""Questions: documents, errors with their exit codes, long answers in slices."""

from __future__ import annotations

import json

import pytest

from kvguard.daemon import questions
from kvguard.daemon.questions import Questions
from kvguard.errors import Refused
from kvguard.format.messages import Query


@pytest.fixture
def desk():
    sent, later = [], []

    def long(arguments):
        yield None
        yield None
        yield {"n": arguments["n"]}

    def refuse(arguments):
        raise Refused("not now. Try: later")

    verbs = {"echo": lambda arguments: {"said": arguments["x"]}, "long": long, "refuse": refuse}
    return Questions(verbs, lambda link, answer: sent.append((link, answer)), lambda delay, call: later.append(call)), sent, later


@pytest.mark.parametrize(
    ("query", "code", "word"),
    [
        (Query(1, "nothing"), 2, "echo, long, refuse"),
        (Query(1, "echo", b"["), 2, "arguments are wrong"),
        (Query(1, "echo", b"[]"), 2, "not a JSON object"),
        (Query(1, "echo", b" " * 70000 + b"{}"), 2, "not a JSON object"),
        (Query(1, "echo", b"{}"), 2, "KeyError"),
        (Query(1, "refuse"), 4, "Try: later"),
    ],
)
def test_refusals_carry_their_exit_code(desk, query, code, word):
    asking, sent, _ = desk
    asking.asked("in:1", query)
    [(link, answer)] = sent
    assert (link, answer.id, answer.code) == ("in:1", 1, code)
    assert word in answer.error


def test_an_answer(desk):
    asking, sent, _ = desk
    asking.asked("in:1", Query(7, "echo", b'{"x": 3}'))
    assert json.loads(sent[0][1].body) == {"said": 3}


def test_long_answers_go_on_between_turns_and_are_bounded(desk):
    asking, sent, later = desk
    for number in range(questions.SLICED_MAX + 1):
        asking.asked("in:1", Query(number, "long", json.dumps({"n": number}).encode()))
    assert [answer.id for _, answer in sent] == [questions.SLICED_MAX]  # one too many
    while later:
        later.pop(0)()
    assert sorted(json.loads(answer.body)["n"] for _, answer in sent[1:]) == list(range(questions.SLICED_MAX))
    asking.asked("in:1", Query(99, "long", b'{"n": 99}'))
    while later:
        later.pop(0)()
    assert json.loads(sent[-1][1].body) == {"n": 99}
