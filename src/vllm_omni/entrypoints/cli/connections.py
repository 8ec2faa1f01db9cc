"""The server's door: how many connections are held at once, and TLS handshakes.

Each connection is an open file from the moment it is accepted, and workers cannot be replaced when none is left.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn

from vllm_omni.entrypoints.openai.bounded import BoundedHttpProtocol
from vllm_omni.entrypoints.openai.refusals import Refusal

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
MOST_LINGERING = 64
"""Connections beyond the limit that may stay open for a moment, so that their clients can read the refusal."""
_LOG_EVERY_SECONDS = 60.0


def most_connections() -> int:
    """Three quarters of the files that may be open; the rest is for workers and for connections being refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft * 3 // 4


def limit_connections(
    config: uvicorn.Config,
    most: int,
    handshake_seconds: float = HANDSHAKE_SECONDS,
    most_lingering: int = MOST_LINGERING,
) -> None:
    """Answer connections beyond the first `most` with 503 and close them; end TLS handshakes that take too long.

    `config` must be loaded, with a BoundedHttpProtocol. Its TLS context moves to the door, which so counts connections
    in their handshakes too.
    """
    door = _Door(config, most, handshake_seconds, most_lingering)
    config.ssl = None
    config.http_protocol_class = door.make_gate  # type: ignore[assignment]  # uvicorn only calls it


class _Door:
    def __init__(self, config: uvicorn.Config, most: int, handshake_seconds: float, most_lingering: int) -> None:
        self._protocol_class: Any = config.http_protocol_class
        self._tls = config.ssl
        self._most = most
        self._most_lingering = most_lingering
        self._handshake_seconds = handshake_seconds
        self._handshakes: set[asyncio.Task[None]] = set()
        self._log_at = 0.0

    def make_gate(self, **settings: Any) -> asyncio.Protocol:
        """The protocol of an accepted connection, with uvicorn's arguments for the HTTP protocol."""
        connections = settings["server_state"].connections

        def enter(transport: asyncio.Transport) -> None:
            self._enter(transport, connections, lambda: self._protocol_class(**settings))

        return _Gate(enter)

    def _enter(
        self, transport: asyncio.Transport, connections: set[Any], make_protocol: Callable[[], BoundedHttpProtocol]
    ) -> None:
        num_others = len(connections) + len(self._handshakes)
        if self._tls is None:
            self._serve(transport, make_protocol(), num_others)
        elif num_others >= self._most + self._most_lingering:
            self._note_refusal()
            transport.abort()  # no answer is possible before the handshake
        else:
            transport.pause_reading()  # the handshake's first bytes are for the TLS protocol
            handshake = self._shake_hands(transport, self._tls, make_protocol(), connections)
            task = asyncio.get_running_loop().create_task(handshake)
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(
        self, transport: asyncio.Transport, tls: ssl.SSLContext, protocol: BoundedHttpProtocol, connections: set[Any]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            encrypted = await loop.start_tls(
                transport, protocol, tls, server_side=True, ssl_handshake_timeout=self._handshake_seconds
            )
        except OSError as error:  # TLS errors and time-outs are OSErrors
            logger.debug("a TLS handshake failed: %s", error)
            transport.abort()
            return
        if encrypted is None:  # the client left meanwhile
            transport.abort()
            return
        self._serve(encrypted, protocol, len(connections) + len(self._handshakes) - 1)

    def _serve(self, transport: asyncio.Transport, protocol: BoundedHttpProtocol, num_others: int) -> None:
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if num_others >= self._most:
            self._note_refusal()
            refusal = Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many open connections", code="unavailable", retry_after=1
            )
            protocol.refuse(refusal, linger=num_others < self._most + self._most_lingering)

    def _note_refusal(self) -> None:
        if (now := time.monotonic()) >= self._log_at:
            self._log_at = now + _LOG_EVERY_SECONDS
            logger.warning("Refusing connections: %d are open, as many as the limit of open files allows", self._most)


class _Gate(asyncio.Protocol):
    """Decides when the connection is made: many may have been accepted before the first of them counts."""

    def __init__(self, enter: Callable[[asyncio.Transport], None]) -> None:
        self._enter = enter

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's
        self._enter(transport)
