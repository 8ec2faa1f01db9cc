"""Responses in pieces, so that little waits in memory for a client that reads slowly."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PIECE_BYTES = 256 * 2**10
"""Bytes that a client must read within `HttpProtocol.unread_seconds` (about 4 KiB/s)."""


class SendInPieces:
    """Middleware: sends large bodies in pieces, each after the client has read the piece before.

    uvicorn would copy a whole message into the buffer of the connection. Messages that are sent at the same time (the
    comments of an event stream) keep their order.
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
