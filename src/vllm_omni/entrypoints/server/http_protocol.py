"""HTTP connections that limit the bytes and the time of requests, and disconnect slow readers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vllm_omni.entrypoints.server.framing import (
    END,
    Body,
    ChunkedBody,
    HttpLimits,
    Refusal,
    check_beginning,
    check_head,
    expected_body,
)

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, which has no limits, with the limits of `limits`.

    Received bytes wait in `_received` until they are parsed: a head until it is complete, a further request until the
    request before it is answered. A request that breaks a limit gets the error object, and the connection ends; if the
    response has begun, the connection ends without one.

    A response that nobody reads must not stay in memory for ever: when written bytes stay unread for `unread_seconds`,
    the transport is aborted, because closing it would wait for the client. The app sees a client that disconnected.
    `SendInPieces` around the app writes one piece at a time, so a client has `unread_seconds` for each piece.
    """

    limits = HttpLimits()
    unread_seconds = 60.0

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._received = bytearray()
        self._num_searched = 0
        """Number of received bytes of an incomplete head that were searched for its end."""
        self._head = b""
        """Head of the request that is being parsed."""
        self._body: Body | None = None
        """Body that the parsed head announced, until it is complete."""
        self._num_content = 0
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # every unread byte counts; with 0, TLS never resumes
        if self.client is not None:
            host, port = self.client
            self.client = (host.removeprefix("::ffff:") if "." in host else host, port)  # IPv4 on an IPv6 socket
        self._set_timer(self.limits.first_byte_seconds, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._cancel_unread_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.unread_seconds, self._abort_unread)

    def resume_writing(self) -> None:
        self._cancel_unread_timer()
        super().resume_writing()

    def _cancel_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    def _abort_unread(self) -> None:
        logger.info("Disconnected a client that did not read its response for %g seconds", self.unread_seconds)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            if self._is_whole_head(data):  # the usual case, without the buffer
                self._cancel_timer()
                self._unset_keepalive_if_required()
                self._parse_head(data)
            else:
                self._received += data
                self._parse_received()
        except (Refusal, httptools.HttpParserError) as error:
            self._refuse_for(error)

    def _is_whole_head(self, data: bytes) -> bool:
        """Whether `data` is exactly one head without a body, and no other bytes wait to be parsed."""
        cycle = self.cycle
        return (
            not self._received
            and self._body is None
            and (cycle is None or cycle.response_complete)
            and 0 <= data.find(END, 0, self.limits.head_bytes) == len(data) - len(END)
            and data[0] not in b"\r\n"
        )

    def _parse_received(self) -> None:
        while self._received and not self.transport.is_closing() and self._parse_piece():
            pass

    def _parse_piece(self) -> bool:
        """Parse the next piece; False if it must wait for more bytes or for the response of the request before."""
        if (body := self._body) is not None:
            self.parser.feed_data(self._take(body.next_piece(self._received)))
            body.check(self._num_content, len(self.headers))
        elif self.cycle is not None and not self.cycle.response_complete:
            self.flow.pause_reading()
            return False
        elif (head := self._take_head()) is None:
            return False
        else:
            self._parse_head(head)
        return True

    def _parse_head(self, head: bytes) -> None:
        self._head, self._num_content = head, 0
        self.parser.feed_data(check_head(head, self.limits))
        if self._body is not None:
            self.headers = []  # the app has the headers already; trailers are counted and dropped

    def _take(self, num_bytes: int) -> bytes:
        taken = bytes(self._received[:num_bytes])
        del self._received[:num_bytes]
        return taken

    def _take_head(self) -> bytes | None:
        """The complete head of the next request, or None. The time limit of a head begins with its first byte."""
        if self._num_searched == 0:
            if self._received[0] in b"\r\n":  # allowed before a request; does not end keep-alive
                del self._received[: len(self._received) - len(self._received.lstrip(b"\r\n"))]
                if not self._received:
                    return None
            self._unset_keepalive_if_required()
        end = self._received.find(END, max(0, self._num_searched - len(END) + 1), self.limits.head_bytes)
        if end >= 0:
            self._cancel_timer()
            self._num_searched = 0
            return self._take(end + len(END))
        check_beginning(self._received, self.limits)
        if self._num_searched == 0:
            self._set_timer(self.limits.head_seconds, self._refuse_slow_head)
        self._num_searched = len(self._received)
        return None

    def _refuse_slow_head(self) -> None:
        seconds = f"{self.limits.head_seconds:g} seconds"
        self.refuse(Refusal(HTTPStatus.REQUEST_TIMEOUT, f"The request's headers were not complete after {seconds}."))

    # Callbacks of the parser and of the response.

    def on_headers_complete(self) -> None:
        self._body = expected_body(self.headers, self._head, self.limits)
        if self.parser.should_upgrade():
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "This server is no proxy: it has no CONNECT.")
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        if isinstance(self._body, ChunkedBody):
            self._body.count_chunk()

    def on_body(self, body: bytes) -> None:
        self._num_content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._body, self._head = None, b""
        super().on_message_complete()
        if self.cycle.response_complete:  # the response did not need the body
            self._cancel_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or self._refused:
            return
        if self._body is not None:
            self._unset_keepalive_if_required()
            self._set_timer(self.limits.drain_seconds, self.transport.close)
        if self._received:
            try:
                self._parse_received()
            except (Refusal, httptools.HttpParserError) as error:
                self._refuse_for(error)

    # Refusals and timers.

    def _refuse_for(self, error: Refusal | httptools.HttpParserError) -> None:
        if isinstance(error, httptools.HttpParserError):
            cause = error.__context__  # raised by a callback: a Refusal, or a URL that uvicorn cannot parse
            reason = "its URL cannot be parsed" if isinstance(error, httptools.HttpParserCallbackError) else str(error)
            invalid = Refusal(HTTPStatus.BAD_REQUEST, f"The request is not valid HTTP/1.1: {reason}.")
            error = cause if isinstance(cause, Refusal) else invalid
        self.refuse(error)

    def refuse(self, refusal: Refusal) -> None:
        """Respond with `refusal`, unless a response has begun, and end the connection.

        The client's bytes are read for `linger_seconds` more: closing with unread bytes would lose the response.
        """
        self._refused = True
        head = self._head or bytes(self._received)
        self._received.clear()
        self._cancel_timer()
        self._unset_keepalive_if_required()
        client = ":".join(map(str, self.client or ("a client",)))
        logger.info("%s - refused with %d: %s", client, refusal.status, refusal.message)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self.transport.write(refusal.answer(head, self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(self.limits.linger_seconds, self.transport.close)

    def _set_timer(self, seconds: float, end: Callable[[], None]) -> None:
        """Call `end` after `seconds`. Replaces the timer that was set before."""
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, end)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
