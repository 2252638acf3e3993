"""The gateway's paths.

Knows: starlette, which path is answered by what. Must not know: how.
Invariants: whoever can't be served now hears it before his body is read (admission.py has the bounds; unread.py takes what he still sends); every error is in
OpenAI's form.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvguard.gateway import replies
from kvguard.gateway.admission import Admission, NotAdmitted
from kvguard.gateway.answering import RETRY_AFTER_S, Answering, failure_of
from kvguard.gateway.events import Declined, Lost
from kvguard.gateway.fleet import HEALTH_S
from kvguard.gateway.journey import Surroundings
from kvguard.gateway.unread import Unread

PATH_CHARS_SAID = 100  # of a path that isn't there


def json_response(document: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, "application/json")


class Paths:
    """`around` and `admission`: made by the lifespan, before the first request."""

    def __init__(self) -> None:
        self.around: Surroundings | None = None
        self.admission: Admission | None = None
        self.ending: Callable[[], bool] = lambda: False

    async def completions(self, request: Request) -> Response:
        return self._admitted(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return self._admitted(request, chat=True)

    def _admitted(self, request: Request, chat: bool) -> Response:
        try:
            self.admission.check()
        except NotAdmitted as error:
            failure = failure_of(error)
            return json_response(failure.document, failure.status, {"retry-after": str(RETRY_AFTER_S), "connection": "close"})
        return Answering(request, self.around, chat, self.admission)

    async def models(self, request: Request) -> Response:
        """What the least loaded instance serves; all serve the same."""
        tried: set[str] = set()
        while (member := self.around.fleet.choose(without=frozenset(tried))) is not None:
            try:
                return json_response(await member.upstream.models(request.headers, HEALTH_S))
            except Declined as error:
                return Response(error.body, error.status, media_type="application/json")
            except Lost as lost:
                tried.add(member.name)
                member.doubt(lost)
        return json_response(replies.error("No instance can answer now. Try: again in a moment", "server_error", 503, "no_instance"), 503)

    async def health(self, request: Request) -> Response:
        """That this process lives."""
        return Response()

    async def ready(self, request: Request) -> Response:
        """Whether a request would be taken."""
        active = self.around.fleet.active
        return json_response({"active_instances": active, "ending": self.ending()}, 200 if active and not self.ending() else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.around.counters.text(), media_type="text/plain; version=0.0.4")


async def in_their_form(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors (no such path, wrong method), as an OpenAI client expects them."""
    message = f"{error.detail}: {request.method} {request.url.path[:PATH_CHARS_SAID]}. Try: POST /v1/completions or /v1/chat/completions, GET /v1/models"
    return json_response(replies.error(message, "invalid_request_error", error.status_code), error.status_code, error.headers)


async def a_bug(request: Request, error: Exception) -> Response:
    """What no one foresaw, said as an OpenAI client expects it; the server logs the trace."""
    return json_response(replies.error("The gateway failed at this request. Try: again, and the gateway's log", "server_error", 500), 500)


def build(paths: Paths, surroundings: Callable[[], contextlib.AbstractAsyncContextManager[Surroundings]]) -> Unread:
    """The application. `surroundings`: entered before the first request, left after the last."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with surroundings() as paths.around:
            paths.admission = Admission(paths.around, lambda: paths.ending())
            yield

    routes = [
        Route("/v1/completions", paths.completions, methods=["POST"]),
        Route("/v1/chat/completions", paths.chat, methods=["POST"]),
        Route("/v1/models", paths.models),
        Route("/health", paths.health),
        Route("/ready", paths.ready),
        Route("/metrics", paths.metrics),
    ]
    return Unread(Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: in_their_form, Exception: a_bug}))
