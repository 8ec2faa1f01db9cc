"""Clients that ask and do not read: their answers must not be kept for ever."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.entrypoints.server.http_protocol import BoundedHttpProtocol

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 2**10
"""Bytes that a client must read within `HttpProtocol.unread_seconds` (about 4 KiB/s)."""


class HttpProtocol(BoundedHttpProtocol):
    """A bounded connection that also ends when what was last written to it stays unread for `unread_seconds`.

    To the app it is a client that left. This is the place that can end it: closing waits for the reader.
    With `SendInPieces` around the app, no more than a piece is ever written ahead of a client.
    """

    unread_seconds = 60.0
    _transport: asyncio.Transport
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # what is unread counts, also the end of an answer; 0 stops TLS
        self._transport = transport

    def pause_writing(self) -> None:
        super().pause_writing()
        self._deadline = asyncio.get_running_loop().call_later(self.unread_seconds, self._end)

    def resume_writing(self) -> None:
        self._forget_deadline()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _end(self) -> None:
        logger.info("a client that did not read its answer for %g seconds was disconnected", self.unread_seconds)
        self._transport.abort()


class SendInPieces:
    """Middleware: sends large bodies in pieces, each after the client has read the one before.

    uvicorn would copy the whole of a message into the connection's buffer. Messages sent at the same time (the comments
    of an event stream) keep their order.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
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
