"""One question over a fresh link: what the command line and scripts use.

Knows: Query and Answer. Must not know: verbs.
Invariant: ends within the timeout, with an answer or with an operating error that says which of the two sides didn't do its part.
"""

from __future__ import annotations

import json
import os
import time

from kvguard import errors
from kvguard.errors import BadFrame, KvguardError, NotAuthorised, TimedOut, Unreachable
from kvguard.format import messages, wire
from kvguard.transport.base import Broken, Frame, Up
from kvguard.transport.keys import Keys
from kvguard.transport.zeromq import ZeromqTransport

REFUSALS_SURE = 5  # for each key that the asked one may have
_BY_CODE = {kind.exit_code: kind for kind in (errors.Unreachable, errors.Refused, errors.TimedOut, errors.Fenced, errors.NotAuthorised, errors.BadConfig)}


def ask(
    address: str,
    verb: str,
    arguments: dict | None = None,
    timeout: float = 5.0,
    keys: Keys | None = None,
    *,
    node: str = "coordinator",
    insecure: bool = False,
) -> dict:
    """The answer's body. `timeout`: seconds. `node`: whose key must answer, where keys are configured.

    Raises Unreachable (no link), TimedOut (a link, no answer), NotAuthorised, or the error that the answer carries, by its code.
    """
    transport = ZeromqTransport(own_name(keys), keys, insecure, bulk=False)
    query = messages.Query(1, verb, json.dumps(arguments or {}).encode())
    try:
        return _converse(transport, address, node, query, timeout, max(1, len(keys.of(node)) if keys is not None else 1))
    finally:
        transport.close()


def own_name(keys: Keys | None) -> str:
    """What this process calls itself: the name under which its own key is listed, else one that no other process has."""
    listed = keys.own_name() if keys is not None else ""
    return listed or f"ask-{os.getpid()}"


def body_of(answer: messages.Answer) -> dict:
    """The answer's JSON object. Raises the error that it carries instead."""
    if answer.error:
        raise _BY_CODE.get(answer.code, KvguardError)(answer.error)
    try:
        body = json.loads(answer.body)
    except ValueError as error:
        raise BadFrame(f"an answer that is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadFrame(f"an answer that is a {type(body).__name__}, not an object")
    return body


def _converse(transport: ZeromqTransport, address: str, node: str, query: messages.Query, timeout: float, attempts: int) -> dict:
    """`attempts`: how many keys the asked one may have; all but one of them are refused."""
    link, deadline, asked, last = f"{node}/ask-{os.urandom(4).hex()}", time.monotonic() + timeout, False, ""
    transport.expect(link)
    transport.dial(link, address)
    while (left := deadline - time.monotonic()) > 0:
        transport.wait(left)
        for event in transport.receive():
            if isinstance(event, Up):
                asked = transport.send(link, wire.encode(query))
            elif isinstance(event, Broken):
                last = event.reason
                # Whether their refusal or only their closing is seen is a race; who refuses again and again refuses.
                refusals = transport.counters.get("handshake_failed", 0)
                if (refusals >= attempts and "key" in event.reason) or refusals >= REFUSALS_SURE * attempts:
                    raise NotAuthorised(f"{address} refused us: {event.reason}. Try: list this process's public key there")
            elif isinstance(event, Frame):
                message, _ = wire.decode(event.head)
                if isinstance(message, messages.Answer) and message.id == query.id:
                    return body_of(message)
    why = f" ({last})" if last else ""
    if asked:
        raise TimedOut(f"{address} took the question {query.verb!r} and gave no answer within {timeout:g} s{why}. Try: a longer --timeout, or its log")
    raise Unreachable(f"nobody answers at {address} within {timeout:g} s{why}. Try: check the address, and that the process runs")
