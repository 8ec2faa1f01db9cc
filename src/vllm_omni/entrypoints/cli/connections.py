"""How many connections are held at once: each is an open file, and workers cannot be replaced when none is left."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

import uvicorn

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 60.0
_MESSAGE = b'{"error":{"message":"too many open connections","type":"server_error","param":null,"code":"unavailable"}}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_MESSAGE), _MESSAGE)
)


def most_connections() -> int:
    """Three quarters of the files that may be open; the rest is for workers and for connections being refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft * 3 // 4


def limit_connections(config: uvicorn.Config, most: int) -> None:
    """Answer connections beyond the first `most` with 503 and close them. `config` must be loaded."""
    make_protocol: Callable[..., asyncio.Protocol] = config.http_protocol_class
    refusals = _Refusals(most)

    def make_gate(*, server_state: Any, **settings: Any) -> asyncio.Protocol:
        def admit() -> asyncio.Protocol | None:
            if len(server_state.connections) >= most:
                refusals.note()
                return None
            return make_protocol(server_state=server_state, **settings)

        return _Gate(admit)

    config.http_protocol_class = make_gate  # type: ignore[assignment]  # uvicorn only calls it


class _Gate(asyncio.Protocol):
    """Decides when the connection is made: many may have been accepted before the first of them counts."""

    def __init__(self, admit: Callable[[], asyncio.Protocol | None]) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's
        if protocol := self._admit():
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
        else:
            transport.write(_REFUSAL)
            transport.close()


class _Refusals:
    def __init__(self, most: int) -> None:
        self._most = most
        self._log_at = 0.0

    def note(self) -> None:
        if (now := time.monotonic()) >= self._log_at:
            self._log_at = now + _LOG_EVERY_SECONDS
            logger.warning("Refusing connections: %d are open, as many as the limit of open files allows", self._most)
