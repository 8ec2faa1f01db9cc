"""Acceptance of connections, with limits of their number and of the time of TLS handshakes.

Each accepted connection is an open file, and without free file descriptors no worker can be restarted. So connections
in a TLS handshake count too; uvicorn and asyncio do not count them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from http import HTTPStatus

from vllm_omni.entrypoints.server.framing import Refusal
from vllm_omni.entrypoints.server.http_protocol import HttpProtocol

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
MOST_LINGERING = 64
"""Number of refused connections that may stay open for a moment, so that their clients can read the refusal."""
_ACCEPTS_AT_ONCE = 100
PAUSE_SECONDS = 1.0
"""Seconds without accepting after no file descriptor or memory was left."""
_LOG_EVERY_SECONDS = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def max_connections() -> int:
    """Three quarters of the files that may be open; the rest is for workers and for refused connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft * 3 // 4


class RefusedConnection(HttpProtocol):
    """A connection beyond the limit: it gets a 503 and ends."""

    refusal = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many open connections", code="unavailable", retry_after=1)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.refuse(self.refusal)


@dataclass(eq=False)
class Acceptor:
    """Accepts connections of a listening socket. uvicorn uses it as an asyncio server."""

    listener: socket.socket
    make_protocol: Callable[[bool], asyncio.Protocol]
    """Called with whether the connection is within the limit."""
    num_open: Callable[[], int]
    """Returns the number of open connections."""
    tls: ssl.SSLContext | None
    _: KW_ONLY
    most: int
    """Number of connections that are served."""
    most_lingering: int = MOST_LINGERING
    """Number of further connections that get a refusal; others are closed at once."""
    handshake_seconds: float = HANDSHAKE_SECONDS
    pause_seconds: float = PAUSE_SECONDS

    def __post_init__(self) -> None:
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._log_at = 0.0
        self.listener.setblocking(False)
        self._loop.add_reader(self.listener, self._accept)

    def close(self) -> None:
        """Accept no more connections; called before the socket is closed."""
        self._loop.remove_reader(self.listener)
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Wait for the handshakes under way; their time is limited."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _address = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause_accepting(error)
                    return
                continue  # the client has disconnected
            connection.setblocking(False)
            self._admit(connection)

    def _pause_accepting(self, error: OSError) -> None:
        logger.error("Accepting no connection for %g s: %s", self.pause_seconds, error.strerror)
        self._loop.remove_reader(self.listener)
        self._pause = self._loop.call_later(self.pause_seconds, self._loop.add_reader, self.listener, self._accept)

    def _admit(self, connection: socket.socket) -> None:
        num_others = self.num_open() + len(self._opening)
        if num_others >= self.most:
            self._log_refusal()
        if num_others >= self.most + self.most_lingering:
            connection.close()
            return
        task = self._loop.create_task(self._open(connection, self.make_protocol(num_others < self.most)))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        task = asyncio.current_task()
        assert task is not None
        opening = _OpeningProtocol(protocol, lambda: self._opening.discard(task))
        handshake_seconds = self.handshake_seconds if self.tls else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: opening, connection, ssl=self.tls, ssl_handshake_timeout=handshake_seconds
            )
        except OSError as error:  # TLS errors and time-outs are OSErrors
            logger.debug("A TLS handshake failed: %s", error)

    def _log_refusal(self) -> None:
        if (now := time.monotonic()) >= self._log_at:
            self._log_at = now + _LOG_EVERY_SECONDS
            logger.warning("Refusing connections: %d are open, as many as the limit of open files allows", self.most)


class _OpeningProtocol(asyncio.Protocol):
    """Calls `on_open` at the moment when `protocol` begins to count as an open connection."""

    def __init__(self, protocol: asyncio.Protocol, on_open: Callable[[], None]) -> None:
        self._protocol = protocol
        self._on_open = on_open

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's
        self._on_open()
        transport.set_protocol(self._protocol)
        self._protocol.connection_made(transport)
