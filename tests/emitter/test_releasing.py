"""Who may answer how far a sequence may leave: the daemon that was asked, once it was asked, and nobody else."""

from __future__ import annotations

import json

import pytest

from kvguard.emitter.releasing import QUESTIONS_MAX, Questions
from kvguard.errors import BadFrame, KvguardError
from kvguard.format import wire
from kvguard.format.messages import Answer, Member
from kvguard.types import Life, Rank

MEMBERS = tuple(Member(Rank(0, pp, 0), node, "", f"tcp://{node}:1") for pp, node in enumerate("ab"))


class Links:
    """A transport that keeps what it was given; `taking`: whether links take anything."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.dialled: dict[str, str] = {}
        self.taking = True

    def dial(self, link: str, address: str) -> None:
        self.dialled[link] = address

    def hang_up(self, link: str) -> None:
        del self.dialled[link]

    def send(self, link: str, head: bytes) -> bool:
        if self.taking:
            self.asked.append((link, wire.decode(head)[0].id))
        return self.taking


@pytest.fixture
def asked():
    """(questions, one of them to both members, the transport), asked and not yet answered."""
    links = Links()
    questions = Questions("llama", links)
    question = questions.ask(Life("s"), MEMBERS)
    assert list(questions.say(MEMBERS)) == [] and links.asked == [("peer:a", 1), ("peer:b", 2)]
    return questions, question, links


def told(number: int, position: object) -> Answer:
    return Answer(number, json.dumps({"position": position}).encode())


def test_an_answer_counts_from_the_one_who_was_asked(asked):
    questions, question, _ = asked
    questions.answered("peer:b", told(1, 99))
    questions.answered("peer:a", told(3, 99))
    assert question.positions == [] and not question.done()
    questions.answered("peer:a", told(1, 7))
    questions.answered("peer:a", told(1, 99))
    questions.answered("peer:b", told(2, 5))
    assert question.positions == [7, 5] and question.done()


def test_who_went_down_is_asked_again_and_what_he_said_before_is_too_late(asked):
    questions, question, links = asked
    questions.down("peer:a")
    questions.answered("peer:a", told(1, 99))
    links.taking = False
    assert list(questions.say(MEMBERS)) == [] and question.positions == []
    links.taking = True
    assert list(questions.say(MEMBERS)) == [] and links.asked[2:] == [("peer:a", 1)]
    questions.answered("peer:a", told(1, 7))
    assert question.positions == [7]


def test_an_answer_without_a_position_ends_the_question(asked):
    questions, question, _ = asked
    questions.answered("peer:a", told(1, "far"))
    assert question.done() and isinstance(question.error, BadFrame)


def test_who_is_no_member_any_more_is_hung_up_on(asked):
    questions, _, links = asked
    list(questions.say(MEMBERS[:1]))
    assert links.dialled == {"peer:a": "tcp://a:1"}


def test_open_questions_are_bounded_and_an_ended_one_makes_room(asked):
    questions, question, _ = asked
    for _ in range(QUESTIONS_MAX // 2 - 1):
        questions.ask(Life("s"), MEMBERS)
    with pytest.raises(KvguardError, match="still open. Try: fewer"):
        questions.ask(Life("s"), MEMBERS)
    questions.end(question)
    questions.ask(Life("s"), MEMBERS)
