"""Small ASGI middlewares that every request passes."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
_RAW_REQUEST_ID = REQUEST_ID_HEADER.encode()
_UNSAFE = re.compile(r"[^\w.:/+=@-]", re.ASCII)
_MAX_REQUEST_ID = 128


def request_id_for(given: str) -> str:
    """The id that the client gave, without unsafe characters; a new one where nothing is left."""
    return _UNSAFE.sub("", given)[:_MAX_REQUEST_ID] or secrets.token_hex(16)


class RequestId:
    """Gives every answer an `x-request-id`: the client's own, or a new one."""

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


class LimitBody:
    """Refuses to read bodies above `max_bytes`: 413, by their declared length or while they stream in.

    except_paths: what the paths end with of routes that count for themselves.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, except_paths: tuple[str, ...]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._except_paths = except_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith(self._except_paths):
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        num_expected = int(declared) if declared.isdecimal() else 0
        num_read = 0

        async def limited_receive() -> Message:
            nonlocal num_read
            if num_expected <= self._max_bytes:
                message = await receive()
                num_read += len(message.get("body", b""))
                if num_read <= self._max_bytes:
                    return message
            # FastAPI passes an HTTPException from its body reader on.
            raise HTTPException(413, f"The request body is larger than {self._max_bytes} bytes.")

        await self._app(scope, limited_receive, send)
