"""A client that sends the exact bytes of a test."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from testbed.live_server import LiveServer
from testbed.patience import GUARD_SECONDS


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


class RawClient:
    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._received = b""

    def send(self, data: bytes) -> bool:
        """Send `data`; whether the server accepted all of it."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def answer(self) -> Answer:
        """The next response, which has a content-length or is a single chunk."""
        head, _, self._received = self._until(b"\r\n\r\n").partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status = int(status_line.split()[1])
        num_bytes = int(headers.get("content-length", "0"))
        while len(self._received) < num_bytes:
            self._receive()
        body, self._received = self._received[:num_bytes], self._received[num_bytes:]
        return Answer(status, headers, body)

    def rest(self) -> bytes:
        """Remaining bytes until the server closes the connection."""
        try:
            while data := self.socket.recv(2**16):
                self._received += data
        except ConnectionResetError:
            pass
        return self._received

    def _until(self, end: bytes) -> bytes:
        while end not in self._received:
            self._receive()
        return self._received

    def _receive(self) -> None:
        data = self.socket.recv(2**16)
        assert data, f"the server closed the connection after {self._received!r}"
        self._received += data


@contextmanager
def raw_client(server: LiveServer) -> Iterator[RawClient]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), GUARD_SECONDS) as connection:
        yield RawClient(connection)
