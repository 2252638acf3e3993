"""The emitter against a stand-in coordinator that speaks the real messages over a real transport.

Knows: messages, the emitter's calls. Must not know: how the real coordinator decides.
"""

from __future__ import annotations

import json
import os
import select
import struct
import threading
import time

import pytest

from kvguard import emitter as emitters
from kvguard import errors
from kvguard.format import messages, wire
from kvguard.transport.ask import ask
from kvguard.transport.base import Down, Frame, Up
from kvguard.transport.keys import Keys, generate
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH, Epoch, Life, Rank

DEADLINE_S = 20
EPOCH = Epoch(3, "c")


def within(condition, what: str):
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)
    return value


class Standin:
    """A thread with a listening transport: keeps what it heard, says what it is told to, answers queries from a table."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", name: str = "coordinator", keys: Keys | None = None):
        self.transport = ZeromqTransport(name, keys, bulk=False)
        self.address = self.transport.listen(address)
        self.heard: list[messages.Message] = []
        self.answers: dict = {}
        self.links: list[str] = []
        self.welcome: messages.Welcome | None = None
        self._to_say: list[messages.Message] = []
        self._ends = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def say(self, message: messages.Message) -> None:
        self._to_say.append(message)

    def heard_of(self, kind) -> list:
        return [message for message in list(self.heard) if isinstance(message, kind)]

    def _run(self) -> None:
        while not self._ends:
            self.transport.wait(0.01)
            for event in self.transport.receive():
                if isinstance(event, Up):
                    self.links.append(event.link)
                elif isinstance(event, Down):
                    self.links.remove(event.link)
                elif isinstance(event, Frame):
                    self._take(event.link, wire.decode(event.head)[0])
            while self._to_say:
                head = wire.encode(self._to_say.pop(0))
                for link in self.links:
                    assert self.transport.send(link, head)

    def _take(self, link: str, message: messages.Message) -> None:
        self.heard.append(message)
        if isinstance(message, messages.EmitterHello) and self.welcome is not None:
            self.transport.send(link, wire.encode(self.welcome))
        elif isinstance(message, messages.Query) and message.verb == "heard":
            self.transport.send(link, wire.encode(messages.Answer(message.id, b"{}", "not a question that is answered here", 2)))  # as an older one says it
        elif isinstance(message, messages.Query) and message.verb in self.answers:
            answer = self.answers[message.verb](json.loads(message.arguments))
            fields = {"body": b"", **answer} if "error" in answer else {"body": json.dumps(answer).encode()}
            self.transport.send(link, wire.encode(messages.Answer(message.id, **fields)))

    def close(self) -> None:
        self._ends = True
        self._thread.join()
        self.transport.close()


@pytest.fixture
def coordinator():
    standin = Standin()
    standin.welcome = messages.Welcome("llama", NO_EPOCH, (), False)
    yield standin
    standin.close()


@pytest.fixture
def client(coordinator):
    with emitters.connect("llama", coordinator.address, beat_ms=20) as client:
        yield client


def resume_of(epoch: Epoch, position: int = 3, ids=(1, 2, 3, 4, 5), error: str = "") -> messages.Resume:
    known = messages.KnownIds("s", struct.pack(f"<{len(ids)}I", *ids), b"smp", b"req")
    member = messages.Member(Rank(0, 0, 0), "n1", "engine:1", "tcp://127.0.0.1:1")
    return messages.Resume("llama", epoch, (member,), (messages.ResumeSequence("s", position, "replica", known),), {"fence": 1.5}, {"replica": 99}, error)


def test_it_says_how_long_its_silence_may_be_and_promises_nothing_that_its_beats_cannot_keep(coordinator, client):
    (hello,) = within(lambda: coordinator.heard_of(messages.EmitterHello), "a hello")
    assert hello.silence_ms == 0, "nothing said: as the coordinator is set"
    with emitters.connect("llama", coordinator.address, beat_ms=20, silence_ms=5000) as patient:
        said = within(lambda: [one for one in coordinator.heard_of(messages.EmitterHello) if one.incarnation == patient.incarnation], "its hello")
        assert said[0].silence_ms == 5000
    for wrong in (59, -1):
        with pytest.raises(errors.BadConfig, match="Try: 60 or more"):
            emitters.connect("llama", coordinator.address, beat_ms=20, silence_ms=wrong)


def test_hello_beats_and_welcome(coordinator, client):
    welcome = client.welcome(DEADLINE_S)
    assert welcome == coordinator.welcome
    assert not client.fenced and client.epoch == NO_EPOCH
    client.scheduled(7)
    client.progress(41)
    within(lambda: any((beat.scheduled, beat.progress) == (7, 41) for beat in coordinator.heard_of(messages.EmitterBeat)), "a beat with the numbers set")
    hello = coordinator.heard_of(messages.EmitterHello)[0]
    assert (hello.instance, hello.incarnation, hello.epoch) == ("llama", client.incarnation, NO_EPOCH)


def test_fenced_then_resume_then_adopt_once(coordinator, client):
    client.welcome(DEADLINE_S)
    coordinator.say(messages.Fenced("llama", EPOCH, "rank 0.1.0 died"))
    within(lambda: client.fenced, "fenced")
    assert client.fenced.epoch == EPOCH and client.fenced.reason == "rank 0.1.0 died"
    assert select.select([client.fileno()], [], [], 0)[0]
    with pytest.raises(errors.TimedOut):
        client.resume(0.05)
    coordinator.say(resume_of(Epoch(2, "c")))  # of an epoch that is over already
    coordinator.say(resume_of(EPOCH))
    resumption = client.resume(DEADLINE_S)
    (token,) = resumption
    assert (token.epoch, token.position, token.prefix, token.tokens) == (EPOCH, 3, (1, 2, 3), (4, 5))
    assert (token.sampler, token.request, token.rung) == (b"smp", b"req", "replica")
    assert resumption.timing_ms == {"fence": 1.5} and resumption.bytes_by_rung == {"replica": 99} and resumption.members == client.members
    assert client.adopt(token) == client.adopt(resumption) == messages.Adopted("llama", client.incarnation, EPOCH)
    assert not client.fenced and client.epoch == EPOCH and not select.select([client.fileno()], [], [], 0)[0]
    within(lambda: coordinator.heard_of(messages.Adopted), "Adopted")
    within(lambda: coordinator.heard_of(messages.EmitterBeat)[-1].epoch == EPOCH, "a beat in the new epoch")
    with pytest.raises(errors.TimedOut):
        client.resume(0.05)  # the same resumption is not given twice


def test_an_older_resumption_is_refused(coordinator, client):
    coordinator.say(messages.Fenced("llama", Epoch(1, "c"), "first"))
    within(lambda: coordinator.links, "a link")
    coordinator.say(resume_of(Epoch(1, "c")))
    older = client.resume(DEADLINE_S)
    coordinator.say(messages.Fenced("llama", Epoch(2, "c"), "second, while the first was being taken up"))
    within(lambda: client.fenced.epoch.counter == 2, "the second fence")
    with pytest.raises(errors.Fenced):
        client.adopt(older)
    coordinator.say(resume_of(Epoch(2, "c")))
    client.adopt(client.resume(DEADLINE_S))
    with pytest.raises(errors.Fenced):
        client.adopt(older)
    assert client.epoch == Epoch(2, "c")


def test_an_older_resumption_that_comes_late_takes_no_newer_ones_place(coordinator, client):
    client.welcome(DEADLINE_S)
    for counter in (3, 2):
        coordinator.say(resume_of(Epoch(counter, "c")))
    coordinator.say(messages.Welcome("llama", Epoch(3, "c"), (), False, 7))
    within(lambda: client.welcome(DEADLINE_S).sequences == 7, "everything is read")
    assert client.resume(DEADLINE_S).epoch == Epoch(3, "c")


def test_a_recovery_that_failed_is_said(coordinator, client):
    client.welcome(DEADLINE_S)
    coordinator.say(resume_of(EPOCH, error="no replica and no ids"))
    with pytest.raises(errors.KvguardError, match="no replica and no ids"):
        client.resume(DEADLINE_S)
    coordinator.say(resume_of(Epoch(4, "c")))
    within(lambda: client.fenced.epoch.counter == 4, "the next epoch")
    assert client.resume(DEADLINE_S).epoch.counter == 4


@pytest.mark.parametrize("position, ids", [(6, (1, 2, 3, 4, 5)), (-1, (1,)), (1, ())])
def test_ids_that_cannot_be_split_are_refused(coordinator, client, position, ids):
    client.welcome(DEADLINE_S)
    coordinator.say(resume_of(EPOCH, position, ids))
    with pytest.raises(errors.BadFrame):
        client.resume(DEADLINE_S)


def test_messages_of_another_instance_change_nothing(coordinator, client):
    client.welcome(DEADLINE_S)
    coordinator.say(messages.Fenced("other", EPOCH, "not ours"))
    coordinator.say(messages.Fenced("llama", Epoch(1, "c"), "ours"))
    within(lambda: client.fenced, "our fence")
    assert client.fenced.epoch.counter == 1


def test_coordinator_away_and_back(coordinator, client):
    client.welcome(DEADLINE_S)
    coordinator.say(resume_of(EPOCH))
    client.adopt(client.resume(DEADLINE_S))
    coordinator.close()
    within(lambda: not client.connected, "the session's end")
    started = time.monotonic()
    client.delivered("while it was away")
    client.progress(5)
    assert not client.fenced and time.monotonic() - started < DEADLINE_S
    with pytest.raises(errors.TimedOut):
        client.resume(0.05)
    again = Standin(coordinator.address)
    try:
        hello = within(lambda: again.heard_of(messages.EmitterHello), "hello to the new one")[0]
        assert (hello.incarnation, hello.epoch) == (client.incarnation, EPOCH)
        within(lambda: again.heard_of(messages.Adopted), "Adopted said again")
        told = within(lambda: again.heard_of(messages.Delivered), "Delivered said late")
        assert told[0].sequences == ("while it was away",)
    finally:
        again.close()


def test_delivered_in_order_and_in_bulk(coordinator, client):
    client.welcome(DEADLINE_S)
    client.delivered("a")
    client.delivered([f"s{n}" for n in range(1200)])
    expected = ["a"] + [f"s{n}" for n in range(1200)]
    within(lambda: [name for message in coordinator.heard_of(messages.Delivered) for name in message.sequences] == expected, "all names, in order")


def test_what_was_delivered_last_is_heard_before_the_end(coordinator):
    """Not even the link is up when close() is called."""
    client = emitters.connect("llama", coordinator.address)
    names = [f"s{n}" for n in range(600)]
    client.delivered(names)
    client.close(DEADLINE_S)
    assert [name for message in coordinator.heard_of(messages.Delivered) for name in message.sequences] == names
    assert not client.problems


def test_an_end_without_a_coordinator_is_bounded_and_says_what_it_left_unsaid(coordinator, client, caplog):
    client.welcome(DEADLINE_S)
    coordinator.close()
    within(lambda: not client.connected, "the session's end")
    client.delivered(["a", "b"])
    client.close(0.05)
    assert "up to 2" in client.problems[-1] and "up to 2" in caplog.text and "Try:" in client.problems[-1]
    with emitters.connect("llama", coordinator.address) as idle:
        pass
    assert not idle.problems, "who delivered nothing has nothing to wait for"


def test_which_life_was_delivered_is_said_again_with_every_session(coordinator, client):
    client.welcome(DEADLINE_S)
    lives = [emitters.life_of("s", b"first"), emitters.life_of("s", b"second")]
    client.delivered(lives[0])
    client.delivered([lives[1], "t"])
    within(lambda: [life for message in coordinator.heard_of(messages.Delivered) for life in message.lives()] == [*lives, Life("t")], "which lives")
    coordinator.close()
    again = Standin(coordinator.address)
    try:
        within(lambda: [life for message in again.heard_of(messages.Delivered) for life in message.lives()] == [*lives, Life("t")], "which lives, again")
    finally:
        again.close()


def test_releasable_is_the_least_of_all_ranks(coordinator, client):
    daemons = [Standin(name=f"n{n}") for n in range(2)]
    try:
        members = tuple(messages.Member(Rank(0, n, 0), f"n{n}", "", daemon.address) for n, daemon in enumerate(daemons))
        client.welcome(DEADLINE_S)
        with pytest.raises(errors.KvguardError, match="members"):
            client.releasable("s")
        coordinator.say(messages.Welcome("llama", NO_EPOCH, members, False))
        within(lambda: client.members == members, "the members")
        daemons[0].answers["releasable"] = lambda arguments: {"position": 12}
        daemons[1].answers["releasable"] = lambda arguments: {"position": 9 if arguments == {"instance": "llama", "rank": "0.1.0", **asked} else -1}
        asked = {"sequence": "s", "birth": 0}
        assert client.releasable("s", DEADLINE_S) == 9
        asked = {"sequence": "s", "birth": 7}
        assert client.releasable(Life("s", 7), DEADLINE_S) == 9
        daemons[1].answers["releasable"] = lambda arguments: {"error": "no such sequence", "code": 4}
        with pytest.raises(errors.Refused, match="no such sequence"):
            client.releasable("s", DEADLINE_S)
        del daemons[1].answers["releasable"]
        with pytest.raises(errors.TimedOut):
            client.releasable("s", 0.05)
        again = Standin(daemons[1].address, "n1") if daemons[1].close() is None else None
        daemons[1] = again
        again.answers["releasable"] = lambda arguments: {"position": 20}
        assert client.releasable("s", DEADLINE_S) == 12
    finally:
        for daemon in daemons:
            daemon.close()


def test_close_leaves_nothing_behind(coordinator):
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        client = emitters.connect("llama", coordinator.address)
        client.welcome(DEADLINE_S)
        client.close()
        client.close()
        with pytest.raises(errors.KvguardError, match="closed"):
            client.welcome(1)
    within(lambda: not coordinator.links and len(os.listdir("/proc/self/fd")) <= fds and threading.active_count() == threads, "all descriptors closed")


def test_bad_arguments(tmp_path):
    with pytest.raises(errors.BadConfig):
        emitters.connect("", "tcp://127.0.0.1:1")
    with pytest.raises(errors.BadConfig, match="insecure"):
        emitters.connect("llama", "tcp://192.0.2.1:1")


def test_ask(coordinator):
    coordinator.answers = {"status": lambda arguments: {"got": arguments}, "no": lambda arguments: {"error": "fenced already", "code": 6}}
    assert ask(coordinator.address, "status", {"a": 1}, DEADLINE_S) == {"got": {"a": 1}}
    with pytest.raises(errors.Fenced, match="fenced already"):
        ask(coordinator.address, "no", timeout=DEADLINE_S)
    with pytest.raises(errors.TimedOut):
        ask(coordinator.address, "silence", timeout=0.2)
    with pytest.raises(errors.Unreachable):
        ask("tcp://127.0.0.1:1", "status", timeout=0.2)


def test_an_emitter_gets_other_keys_while_it_runs():
    theirs, ours, former = generate(), generate(), generate()
    standin = Standin(keys=Keys(theirs.secret, theirs.public, {"gateway": ours.public}))
    standin.welcome = messages.Welcome("llama", NO_EPOCH, (), False)
    try:
        with emitters.connect("llama", standin.address, Keys(ours.secret, ours.public, {"coordinator": former.public})) as client:
            with pytest.raises(errors.TimedOut):
                client.welcome(0.3)
            client.rekey(Keys(ours.secret, ours.public, {"coordinator": former.public}, {"coordinator": (theirs.public,)}))
            assert client.welcome(DEADLINE_S) == standin.welcome
        with emitters.connect("llama", standin.address) as plain, pytest.raises(errors.BadConfig, match="made without keys"):
            plain.rekey(ours)
    finally:
        standin.close()


def test_ask_and_session_with_keys():
    """The client's file lists the coordinator alone: it need not know under which name it is listed itself."""
    theirs, ours, stranger = generate(), generate(), generate()
    standin = Standin(keys=Keys(theirs.secret, theirs.public, {"gateway": ours.public}))
    standin.welcome = messages.Welcome("llama", NO_EPOCH, (), False)
    standin.answers = {"status": lambda arguments: {"ok": True}}
    try:
        listed = Keys(ours.secret, ours.public, {"coordinator": theirs.public})
        assert ask(standin.address, "status", None, DEADLINE_S, listed) == {"ok": True}
        with emitters.connect("llama", standin.address, listed) as client:
            assert client.welcome(DEADLINE_S) == standin.welcome
        with pytest.raises(errors.NotAuthorised):
            ask(standin.address, "status", None, DEADLINE_S, Keys(stranger.secret, stranger.public, {"coordinator": theirs.public}))
        with pytest.raises(errors.NotAuthorised):
            ask(standin.address, "status", timeout=DEADLINE_S)
        with pytest.raises(errors.BadConfig, match="no key is listed"):
            ask(standin.address, "status", None, DEADLINE_S, listed, node="elsewhere")
    finally:
        standin.close()
