"""ASGI middlewares around all routes: errors, load, paths that end in a slash, request ids, responses in pieces."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from abc import ABC, abstractmethod

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import error_response
from vllm_omni.errors import UnavailableError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_RAW_REQUEST_ID = REQUEST_ID_HEADER.encode()
_UNSAFE = re.compile(r"[^\w.:/+=@-]", re.ASCII)
_MAX_REQUEST_ID = 128
PIECE_BYTES = 256 * 2**10
"""Bytes that a client must read within `HttpProtocol.unread_seconds` (about 4 KiB/s)."""


class HttpMiddleware(ABC):
    """Middleware of HTTP requests; other messages, such as those of the lifespan, pass it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle = self.handle if scope["type"] == "http" else self._app
        await handle(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, usually by `_app`."""


class CatchErrors(HttpMiddleware):
    """Middleware: answers exceptions without a handler. It is the innermost one, so that the others add their headers.

    A second one is outside the user's middleware. A request that a stopping server cancels gets a 503; if its response
    has begun, its connection ends. Otherwise uvicorn would log a traceback and respond with a plain 500.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:  # the only place where a bug becomes a 500
            if started:
                raise
            logger.exception("%s %r failed", scope["method"], scope["path"])
            await error_response(error)(scope, receive, send)
        except asyncio.CancelledError:
            if not started:
                answer = error_response(UnavailableError("The server is stopping.", retry_after=1.0))
                answer.headers["connection"] = "close"
                await answer(scope, receive, send)


class ServerLoad:
    """Number of requests whose response is not complete yet."""

    def __init__(self) -> None:
        self.num_requests = 0


class CountLoad(HttpMiddleware):
    """Middleware: counts requests in `load`, from their first byte until their response is sent.

    paths: only POST requests whose path ends with one of these are counted.
    """

    def __init__(self, app: ASGIApp, load: ServerLoad, paths: tuple[str, ...]) -> None:
        super().__init__(app)
        self._load = load
        self._paths = paths

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or not scope["path"].endswith(self._paths):
            return await self._app(scope, receive, send)
        self._load.num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._load.num_requests -= 1


class IgnoreTrailingSlash(HttpMiddleware):
    """Middleware: serves `/path/` as `/path`. A redirect would lose the body of a POST."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "path": scope["path"].rstrip("/") or "/"}, receive, send)


def request_id_for(given: str) -> str:
    """`given`, the client's id, without unsafe characters; a new id if nothing is left."""
    return _UNSAFE.sub("", given)[:_MAX_REQUEST_ID] or secrets.token_hex(16)


class RequestId(HttpMiddleware):
    """Middleware: gives every response an `x-request-id`, the client's own or a new one."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == _RAW_REQUEST_ID), b"")
        header = (_RAW_REQUEST_ID, request_id_for(given.decode("latin-1")).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [one for one in message.get("headers", ()) if one[0].lower() != _RAW_REQUEST_ID]
                message["headers"] = [*others, header]
            await send(message)

        await self._app(scope, receive, send_with_id)


class SendInPieces(HttpMiddleware):
    """Middleware: sends large bodies in pieces, each after the client has read the piece before.

    uvicorn would copy a whole message into the buffer of the connection. Messages that are sent at the same time (the
    comments of an event stream) keep their order.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.Lock()

        async def send_pieces(message: Message) -> None:
            async with sending:
                body = message.get("body", b"")
                *starts, last = range(0, max(1, len(body)), PIECE_BYTES)
                for start in starts:
                    piece = body[start : start + PIECE_BYTES]
                    await send({"type": message["type"], "body": piece, "more_body": True})
                await send({**message, "body": body[last:]} if starts else message)

        await self._app(scope, receive, send_pieces)
