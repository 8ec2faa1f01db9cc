"""Limits of HTTP/1.1 messages, checked on the received bytes before they are parsed, and the response of a refusal.

The parser gets bytes up to the end of a head or of a message and no further. So one request is parsed at a time, even
if a client sends several without waiting for responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from starlette.responses import JSONResponse

from vllm_omni.entrypoints.openai.middlewares import REQUEST_ID_HEADER, request_id_for
from vllm_omni.entrypoints.openai.schema.images import ErrorBody, ErrorResponse

_GIVEN_ID = re.compile(rb"\n%b:[ \t]*([^\r\n]*)" % REQUEST_ID_HEADER.encode(), re.IGNORECASE)
END = b"\r\n\r\n"
"""End of a head, and of a chunked body with its trailers."""
_METHOD = re.compile(rb"[A-Z-]+(?: |\Z)")
_REQUEST_LINE = re.compile(rb"[A-Z-]+ [^\r\n]+ HTTP/1\.[01]\r\n")
_IS_1_1 = re.compile(rb"[^\r\n]+ HTTP/1\.1\r\n")
_UPGRADE = re.compile(rb"\r\nupgrade:([^\r\n]*)", re.IGNORECASE)
_PIECE_BYTES = 16 * 2**10
"""Bytes of a chunked body that are parsed before its limits are checked again."""
_LEAST_CHUNK_BYTES = 64


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
        given = found[1].decode("latin-1") if (found := _GIVEN_ID.search(head)) else ""
        retry = ("x-should-retry", "false") if self.retry_after is None else ("retry-after", str(self.retry_after))
        own = {REQUEST_ID_HEADER: request_id_for(given), retry[0]: retry[1], "connection": "close"}
        response = JSONResponse(ErrorResponse(error=error).model_dump(), self.status, own)
        lines = [b"HTTP/1.1 %d %b" % (self.status, self.status.phrase.encode())]
        lines += [b"%b: %b" % header for header in (*default_headers, *response.raw_headers)]
        return b"\r\n".join([*lines, b"", bytes(response.body)])


@dataclass(frozen=True)
class HttpLimits:
    """Limits of the bytes that a connection may send, and of the time that it may take."""

    head_bytes: int = 64 * 2**10
    """Most bytes of a head (request line, headers, empty line), together with trailers and the framing before them."""
    num_headers: int = 256
    """Most headers of a request, and most trailers."""
    head_seconds: float = 10.0
    """Longest time from the first byte of a request until its head is complete."""
    first_byte_seconds: float = 30.0
    """Longest time from the start of a connection until the first byte of its first request."""
    drain_seconds: float = 30.0
    """Longest time from a response that did not need the request's body until the end of the body."""
    linger_seconds: float = 2.0
    """Time for which a refused client may go on sending, so that it can read the refusal."""
    num_small_chunks: int = 4096
    """Most chunks of a body, besides one for each 64 bytes."""


def check_beginning(head: bytes | bytearray, limits: HttpLimits) -> None:
    """Refuse an incomplete head that is too large or that cannot become a request."""
    line_is_complete = head.find(b"\n", 0, limits.head_bytes) >= 0
    if len(head) >= limits.head_bytes:
        if not line_is_complete:
            raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, f"The URL is longer than {limits.head_bytes} bytes.")
        raise _large_head(limits)
    if not (_REQUEST_LINE if line_is_complete else _METHOD).match(head):
        raise _bad_request_line()


def check_head(head: bytes, limits: HttpLimits) -> bytes:
    """Check a complete head; return it without an `Upgrade` header. Raises Refusal.

    A server may ignore `Upgrade`, but the parser would ignore the body of such a request.
    """
    if head.find(b" HTTP/1.", 0, head.find(b"\n")) < 0:  # the parser accepts other protocols too
        raise _bad_request_line()
    if head.count(b"\n") - 2 > limits.num_headers:
        raise _large_head(limits)
    if b"\nupgrade:" not in head.lower():
        return head
    if any(b"websocket" in protocol.lower() for protocol in _UPGRADE.findall(head)):
        raise Refusal(HTTPStatus.BAD_REQUEST, "This server has no websockets; its streams are server-sent events.")
    return _UPGRADE.sub(b"", head)


def expected_body(headers: Iterable[tuple[bytes, bytes]], head: bytes, limits: HttpLimits) -> Body | None:
    """The body that follows `head`, or None if there is none. `headers`: the parsed headers. Raises Refusal.

    The parser has already refused lengths that are not numbers or that contradict each other.
    """
    body: Body | None = None
    num_hosts = 0
    for name, value in headers:
        if name == b"host":
            num_hosts += 1
        elif name == b"content-length":
            body = FixedBody(int(value))
        elif name == b"transfer-encoding":
            if value.strip().lower() != b"chunked" or not _IS_1_1.match(head):
                raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "Transfer-Encoding takes chunked alone, in HTTP/1.1.")
            body = ChunkedBody(len(head), limits)
    if num_hosts > 1:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"A request has one Host header, got {num_hosts}.")
    return body


def _large_head(limits: HttpLimits) -> Refusal:
    takes = f"{limits.head_bytes} bytes together with the URL, and at most {limits.num_headers} headers"
    return Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"The headers are too large: the server takes {takes}.")


def _bad_request_line() -> Refusal:
    return Refusal(
        HTTPStatus.BAD_REQUEST,
        "The request is not HTTP/1.1: its first line must be METHOD PATH HTTP/1.1 (or 1.0).",
    )


class FixedBody:
    """A body of known length, in bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._num_left = num_bytes

    def next_piece(self, received: bytearray) -> int:
        """Number of received bytes to parse next."""
        num_bytes = min(len(received), self._num_left)
        self._num_left -= num_bytes
        return num_bytes

    def check(self, num_content: int, num_trailers: int) -> None:
        """Check nothing: such a body has no framing."""


class ChunkedBody:
    """A body in chunks. Its framing (all bytes that are not content) is limited."""

    def __init__(self, num_head: int, limits: HttpLimits) -> None:
        self._limits = limits
        self._room = limits.head_bytes - num_head
        self._tail = b""
        self._num_bytes = 0
        self._num_bytes_at_content = 0
        self._num_content = 0
        self._num_chunks = 0
        self._num_cuts = 0

    def next_piece(self, received: bytearray) -> int:
        """Number of received bytes to parse next: up to the next possible end of the message."""
        window = self._tail + received[:_PIECE_BYTES]
        end = window.find(END)
        num_bytes = (len(window) if end < 0 else end + len(END)) - len(self._tail)
        self._tail = bytes(window[: len(self._tail) + num_bytes][-len(END) + 1 :])
        self._num_bytes += num_bytes
        self._num_cuts += end >= 0
        return num_bytes

    def count_chunk(self) -> None:
        """Count a chunk; called at the header of each chunk, also of the last one. Raises Refusal."""
        self._num_chunks += 1
        self._check_count(self._num_chunks)

    def check(self, num_content: int, num_trailers: int) -> None:
        """Check the limits after each piece. The arguments are totals of the request so far. Raises Refusal."""
        if num_content > self._num_content:
            self._num_content, self._num_bytes_at_content = num_content, self._num_bytes
        num_framing = self._num_bytes - self._num_content
        if self._num_bytes - self._num_bytes_at_content > self._room or num_trailers > self._limits.num_headers:
            raise _large_head(self._limits)
        if num_framing > self._limits.head_bytes + self._num_content:
            raise Refusal(HTTPStatus.BAD_REQUEST, "The body's chunks have more framing than content.")
        self._check_count(self._num_cuts)

    def _check_count(self, num: int) -> None:
        if num > self._limits.num_small_chunks + self._num_content // _LEAST_CHUNK_BYTES:
            least = f"{_LEAST_CHUNK_BYTES} bytes each beyond the first {self._limits.num_small_chunks}"
            raise Refusal(HTTPStatus.BAD_REQUEST, f"The body's chunks are too small: the server takes {least}.")


Body = FixedBody | ChunkedBody
