"""Server-sent events in every form that their specification allows, in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvguard.gateway.events import EVENT_BYTES_MAX, Events, Lost


def taken(parts) -> tuple[list[bytes], bytes]:
    """Data of the events that have some, and all bytes of all whole events."""
    events, whole = Events(), []
    for part in parts:
        whole += events.feed(part)
    return [event.data for event in whole if event.data], b"".join(event.raw for event in whole)


@pytest.mark.parametrize(
    ("said", "data"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"\xef\xbb\xbfdata:a\n\n", [b"a"]),
        (b'data: {"a": 1}\r\n\r\n: comment\n\nevent: x\ndata:{"b": 2}\n\ndata: [DONE]\n\n', [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]),
        (b": a comment\n\n\n\ndata: a\n\n:\n\n", [b"a"]),
        (b"event: chunk\nid: 7\nretry: 10\n: x\ndata: a\nunknown: y\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\n\ndata:\n\nid\n\n", []),
        (b"data: a\n\ndata: never whole\n", [b"a"]),
        (b"database: no\n\n", []),
    ],
)
def test_what_is_legal(said, data):
    assert taken([said])[0] == data
    assert taken(said[at : at + 1] for at in range(len(said)))[0] == data


LINES = st.sampled_from([b"data: 1", b"data: {}", b"data:", b": note", b"event: e", b"id", b"", b"", b""])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.tuples(LINES, ENDS), max_size=24), st.lists(st.integers(1, 9), max_size=30))
def test_pieces_change_nothing(lines, sizes):
    """A line's end may be cut in two; nothing is lost, or said twice."""
    said = b"".join(line + end for line, end in lines)
    parts, at = [], 0
    for size in sizes:
        parts.append(said[at : at + size])
        at += size
    whole, pieces = taken([said]), taken([*parts, said[at:]])
    assert pieces[0] == whole[0] and said.startswith(pieces[1])
    text = said.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    values = [[line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")] for event in text.split(b"\n\n")[:-1]]
    assert whole[0] == [joined for joined in (b"\n".join(value).strip() for value in values) if joined]


@pytest.mark.parametrize("said", [b"<html>\n\n", b'{"error": 1}\n\n', b"data: a\nInternal Server Error: x\n\n", b"data: " + b"x" * EVENT_BYTES_MAX, b"data: a\n" * 5000 + b"\n"])
def test_what_is_not(said):
    with pytest.raises(Lost) as lost:
        Events().feed(said)
    assert lost.value.kind == "garbage"
