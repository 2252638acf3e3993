"""Answers that are there before their request's body: what is still to come of it is taken, and dropped, before the connection ends.

Knows: ASGI. Must not know: paths, what is answered, why.
Invariants: the answer goes out whole at once; no more than BYTES_MAX of a body, for WHOLE_S, and for QUIET_S without any of it, by AT_ONCE_MAX connections at
a time, and nothing of it is kept.

A connection that is closed while bytes lie in it unread is reset, and with that its client's system throws away what had come: who sends all of a body before
he reads (http.client, curl, httpx) saw a broken pipe in the place of his 429.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvguard.limits import MIB

WHOLE_S, QUIET_S = 10.0, 2.0
BYTES_MAX = 64 * MIB
AT_ONCE_MAX = 256
BODIED = (b"content-length", b"transfer-encoding")


class Unread:
    """Around an application: the end of an answer, after which its connection may be closed, waits for the end of the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = scope["type"] != "http" or not any(name in BODIED for name, _ in scope["headers"])
        held = False

        async def heard() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or _is_last(message)
            return message

        async def said(message: Message) -> None:
            nonlocal held
            held = not whole and message["type"] == "http.response.body" and not message.get("more_body", False)
            await send({**message, "more_body": True} if held else message)

        async def end() -> None:
            if held:
                await self._take_rest(receive)
                await send({"type": "http.response.body", "body": b""})

        try:
            await self._app(scope, heard, said)
        except Exception:  # a bug: starlette answers it, then raises it for the server's log
            await end()
            raise
        await end()

    async def _take_rest(self, receive: Receive) -> None:
        if self._under_way >= AT_ONCE_MAX:
            return
        self._under_way += 1
        taken = 0
        try:
            with contextlib.suppress(TimeoutError):  # it has had its time
                async with asyncio.timeout(WHOLE_S):
                    while taken <= BYTES_MAX:
                        async with asyncio.timeout(QUIET_S):
                            message = await receive()
                        if _is_last(message):
                            return
                        taken += len(message["body"])
        finally:
            self._under_way -= 1


def _is_last(message: Message) -> bool:
    return message["type"] != "http.request" or not message.get("more_body", False)
