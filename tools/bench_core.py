"""What the core costs per rank and step: 64 sequences that decode, one event with columns, sender side and receiver side. CPU only, no sockets.

    python tools/bench_core.py [sequences] [steps]

Prints one JSON document: medians in microseconds. `sender_us`: Looked + Captured; `ack_us`: the acknowledgement of the step.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from statistics import median

from kvguard.core.effects import Apply, Capture, SendIds, SendKv
from kvguard.core.events import Applied, Arrived, Captured, Grown, LinkUp, Looked, Opened, Probed, TurnEnded
from kvguard.core.ledger import Ledger
from kvguard.core.receiver import Receiver
from kvguard.core.sender import Sender, SenderSettings
from kvguard.format.messages import Ack, Held, Hello, Holding, StreamShape
from kvguard.types import NO_EPOCH, Fork, Rank, StreamId

STREAM = StreamId("bench", Rank(0, 0, 0), 1)
BLOCK_TOKENS = 16


def started(sequences: int, steps: int) -> tuple[Sender, Ledger, Receiver]:
    shape = StreamShape(1, BLOCK_TOKENS, 2304, 2304 * BLOCK_TOKENS, 1 << 20)
    ledger = Ledger(shape)
    sender = Sender(STREAM, ledger, "h", "peer:h", NO_EPOCH, count(1), count(1), SenderSettings("a", 1))
    hello: Hello = sender.step(0, LinkUp("peer:h"))[0].message
    sender.step(0, Arrived("peer:h", Held(hello.session, NO_EPOCH, Holding(STREAM, "replica", False, (), (), (), (), ()))))
    receiver = Receiver("in:a", hello)
    receiver.start()
    receiver.step(0, Probed("in:a", hello.session, hello))
    blocks = -(-(steps + 8) // BLOCK_TOKENS)
    opened = tuple(Opened(row, f"s{row}", row + 1, (Fork(0, 0),), b"") for row in range(sequences))
    lists = [tuple(range(row * blocks, (row + 1) * blocks)) for row in range(sequences)]
    grown = tuple(Grown(row, 0, own, own) for row, own in enumerate(lists))
    event = Looked(STREAM, (), (), opened, grown)
    ledger.look(event)
    for effect in sender.step(0, event):
        assert type(effect) is SendIds
        receiver.step(0, Arrived("in:a", effect.message))
        receiver.step(0, Applied("in:a", hello.session, "ids", effect.message.number))
    return sender, ledger, receiver


def main(sequences: int = 64, steps: int = 2000) -> None:
    sender, ledger, receiver = started(sequences, steps)
    rows, clock = tuple(range(sequences)), time.perf_counter_ns
    times: dict[str, list[int]] = {"sender_us": [], "receiver_us": [], "ack_us": []}
    for step in range(1, steps + 1):
        event = Looked(STREAM, (), (), (), (), rows, (step,) * sequences, (step + 1,) * sequences)
        begin = clock()
        ledger.look(event)
        asked = sender.step(step, event)
        spent = clock() - begin
        kinds = [type(effect) for effect in asked]
        assert kinds[-1] is Capture and kinds[-2] is SendIds, kinds
        done = Captured(asked[-1].id, STREAM, NO_EPOCH, step, len(asked[-1].rows) * 2304, (), b"")
        begin = clock()
        (sent,) = sender.step(step, done)
        times["sender_us"].append(spent + clock() - begin)
        assert type(sent) is SendKv
        frames = [effect.message for effect in asked if type(effect) is SendIds] + [sent.message]
        begin = clock()
        out = [effect for frame in frames for effect in receiver.step(step, Arrived("in:a", frame, 0))]
        for effect in out:
            assert type(effect) is Apply
            receiver.step(step, Applied("in:a", effect.session, "kv" if effect.message is sent.message else "ids", effect.message.number))
        (answer,) = receiver.step(step, TurnEnded())
        times["receiver_us"].append(clock() - begin)
        assert type(answer.message) is Ack
        begin = clock()
        sender.step(step, Arrived("peer:h", answer.message))
        times["ack_us"].append(clock() - begin)
    assert sender.caught_up() and sender.flow.lag_tokens == 0
    print(json.dumps({"sequences": sequences, "steps": steps, **{name: round(median(spent) / 1000, 1) for name, spent in times.items()}}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
