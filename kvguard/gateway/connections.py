"""Clients' connections, as uvicorn keeps them, with bounds: in time where nothing is asked, or nothing of an answer is read; in number where nothing is asked.

Knows: uvicorn's protocol, h11. Must not know: what is asked.
Invariants: no connection lives for long without a request, however slowly it begins one; what nobody fetches is thrown away; a client's end is seen although
a request of his waits behind another; what is no HTTP is refused in OpenAI's form.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvguard.gateway import replies
from kvguard.limits import KIB

IDLE_CLIENT_S = 30  # how long a client's connection may be without a request
CONNECTIONS_IDLE_MAX = 1024  # at a time; beyond it the one that has been idle for longest ends
HEAD_BYTES_MAX = 64 * KIB  # of a request's head, and of what waits behind a request


class Bounded(H11Protocol):
    """A client's connection that ends IDLE_CLIENT_S after it was made, or its last answer was whole, unless a request is under way. uvicorn's own bound
    holds between two requests alone, and begins anew with every byte: half a head, or a body that nobody reads any more, kept a connection for ever; so did
    an answer that nobody fetched, because what is only closed waits until all of it is sent."""

    idle: ClassVar[dict[Bounded, None]] = {}  # of this process, whose descriptors they are; in the order in which they became idle

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._unsent = -1
        self._wait_for_request()

    def connection_lost(self, error: Exception | None) -> None:
        self._bound.cancel()
        self.idle.pop(self, None)
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        self._bound.cancel()
        self._wait_for_request()
        super().on_response_complete()  # which may begin a request that waited behind this one

    def handle_events(self) -> None:
        super().handle_events()
        if self._is_asked():
            self.idle.pop(self, None)
            # uvicorn reads no more while a request waits behind another; so its client's end was not seen.
            if len(self.conn.trailing_data[0]) < HEAD_BYTES_MAX and self.conn.their_state is h11.DONE:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What isn't HTTP, or has too large a head. Where an answer has begun there is nothing left to say."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = msgspec.json.encode(replies.error(f"{msg} Try: HTTP/1.1, with a head of less than {HEAD_BYTES_MAX} bytes", "invalid_request_error", 400))
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_request(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None
        self._bound = self.loop.call_later(IDLE_CLIENT_S, self._look)
        if len(self.idle) > CONNECTIONS_IDLE_MAX:
            self.loop.call_later(0, self._end_oldest)  # not before those who connected in the same turn were read: what they ask may be here already

    def _end_oldest(self) -> None:
        if len(self.idle) > CONNECTIONS_IDLE_MAX:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.close()

    def _look(self) -> None:
        """Each IDLE_CLIENT_S."""
        if self.transport.is_closing():
            unsent = self.transport.get_write_buffer_size()
            if unsent == self._unsent:
                self.transport.abort()
            self._unsent = unsent
        elif not self._is_asked():
            self.transport.close()
        self._bound = self.loop.call_later(IDLE_CLIENT_S, self._look)
