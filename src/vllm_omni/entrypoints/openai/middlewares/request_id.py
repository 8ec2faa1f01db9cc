"""The `x-request-id` of every response."""

from __future__ import annotations

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
_RAW_REQUEST_ID = REQUEST_ID_HEADER.encode()
_UNSAFE = re.compile(r"[^\w.:/+=@-]", re.ASCII)
_MAX_REQUEST_ID = 128


def request_id_for(given: str) -> str:
    """`given`, the client's id, without unsafe characters; a new id if nothing is left."""
    return _UNSAFE.sub("", given)[:_MAX_REQUEST_ID] or secrets.token_hex(16)


class RequestId:
    """Middleware: gives every response an `x-request-id`, the client's own or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == _RAW_REQUEST_ID), b"")
        header = (_RAW_REQUEST_ID, request_id_for(given.decode("latin-1")).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [one for one in message.get("headers", ()) if one[0].lower() != _RAW_REQUEST_ID]
                message["headers"] = [*others, header]
            await send(message)

        await self._app(scope, receive, send_with_id)
