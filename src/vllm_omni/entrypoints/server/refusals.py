"""Refusals before a request reaches the app: the error object as bytes of an HTTP response."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from vllm_omni.entrypoints.openai.middlewares.request_id import REQUEST_ID_HEADER, request_id_for
from vllm_omni.entrypoints.openai.schema.images import ErrorBody, ErrorResponse

_GIVEN_ID = re.compile(rb"\n%b:[ \t]*([^\r\n]*)" % REQUEST_ID_HEADER.encode(), re.IGNORECASE)


class Refusal(Exception):
    """An error response that ends its connection. `retry_after`: seconds after which the client may try again."""

    def __init__(self, status: HTTPStatus, message: str, *, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or status.name.lower()
        self.retry_after = retry_after

    def answer(self, head: bytes = b"", default_headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
        """Bytes of the whole response. `head`: bytes of the request's head, whose `x-request-id` is returned."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = ErrorBody(message=self.message, type=kind, param=None, code=self.code)
        body = ErrorResponse(error=error).model_dump_json().encode()
        given = found[1].decode("latin-1") if (found := _GIVEN_ID.search(head)) else ""
        retry = ("x-should-retry", "false") if self.retry_after is None else ("retry-after", str(self.retry_after))
        own = {
            REQUEST_ID_HEADER: request_id_for(given),
            "content-type": "application/json",
            "content-length": str(len(body)),
            retry[0]: retry[1],
            "connection": "close",
        }
        lines = [b"HTTP/1.1 %d %b" % (self.status, self.status.phrase.encode())]
        lines += [b"%b: %b" % header for header in default_headers]
        lines += [f"{name}: {value}".encode() for name, value in own.items()]
        return b"\r\n".join([*lines, b"", body])
