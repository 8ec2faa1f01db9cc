"""A foreign web server with pictures and with faulty responses."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from testbed.patience import GUARD_SECONDS


@dataclass
class FarServer:
    """Files that the server serves under /files, and the requests that it got."""

    port: int
    files: dict[str, bytes]
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Paths and headers (their names in lower case)."""
    num_sent: int = 0
    """Bytes sent as the response to /endless."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client of /silent or /drip has disconnected."""

    def url(self, path: str, host: str = "photos.example", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    far: FarServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.far.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        kind, _, rest = self.path.removeprefix("/").partition("/")
        try:
            getattr(self, f"_{kind}")(unquote(rest))
        except ConnectionError:  # who asked has heard enough
            self.close_connection = True

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _files(self, name: str) -> None:
        data = self.far.files.get(name.partition("?")[0])
        if data is not None:
            self._answer(200, data, content_type="text/html", set_cookie="id=1")
        else:
            self._answer(404, b"not here")

    def _to(self, location: str) -> None:
        self._answer(302, location=location)

    def _loop(self, count: str) -> None:
        self._answer(307, location=f"/loop/{int(count) + 1}")

    def _gzip(self, _: str) -> None:
        self._answer(200, gzip.compress(bytes(100 * 2**20)), content_encoding="gzip")

    def _claims(self, num_bytes: str) -> None:
        self._answer(200, content_length=num_bytes)

    def _nowhere(self, _: str) -> None:
        self._answer(302)

    def _many(self, _: str) -> None:
        headers = {f"x{number}": "y" for number in range(100_000)}
        self._answer(200, b"", **headers)

    def _headers(self, _: str) -> None:
        self.send_response(200)
        while True:
            self.send_header("x", "y" * 2**16)
            self.flush_headers()

    def _endless(self, _: str) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        while True:
            self.far.num_sent += self.connection.send(bytes(2**16))

    def _cut(self, _: str) -> None:
        self.close_connection = True
        self._answer(200, b"only this", content_length="1000")

    def _silent(self, _: str) -> None:
        self.connection.settimeout(GUARD_SECONDS)
        if not self.connection.recv(1):
            self.far.left.set()

    def _drip(self, _: str) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        self.connection.settimeout(0.01)
        for _tick in range(int(GUARD_SECONDS / 0.01)):
            self.connection.send(b"x")
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    self.far.left.set()
                    return


@contextmanager
def far_server(files: dict[str, bytes], tls: ssl.SSLContext | None = None) -> Iterator[FarServer]:
    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that trusts us not, for one
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    Handler.far = FarServer(server.server_port, files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Handler.far
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
