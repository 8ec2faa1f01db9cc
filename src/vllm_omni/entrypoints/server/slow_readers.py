"""Disconnection of clients that do not read their response: it must not stay in memory for ever."""

from __future__ import annotations

import asyncio
import logging

from vllm_omni.entrypoints.server.http_protocol import BoundedHttpProtocol

logger = logging.getLogger(__name__)


class HttpProtocol(BoundedHttpProtocol):
    """A bounded connection that also ends when written bytes stay unread for `unread_seconds`.

    The app sees a client that disconnected. The transport is aborted, because closing it would wait for the client.
    `SendInPieces` around the app writes one piece at a time, so a client has `unread_seconds` for each piece.
    """

    unread_seconds = 60.0
    _transport: asyncio.Transport
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # every unread byte counts; with 0, TLS never resumes
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
        logger.info("Disconnected a client that did not read its response for %g seconds", self.unread_seconds)
        self._transport.abort()
